"""The root of trust on this machine: which one it is, how a person adds it, and how a person starts over."""

from __future__ import annotations

from pathlib import Path

from appliance.bundle_writer import write_synced
from appliance.errors import BundleError, StoreError, TrustError
from appliance.floors import Floors
from appliance.journal import Journal
from appliance.layout import Layout
from appliance.lock import change_lock
from appliance.store import disk_errors
from appliance.tree import Tree
from appliance.trust import MAX_METADATA_BYTES, TrustedRoot


def trusted_root(home: Path, floors: Floors) -> TrustedRoot:
    """The root that the floors name, as it was accepted. StoreError when its file is gone or damaged."""
    name = f"{floors.root_version}.root.json"
    try:
        data = Tree(Layout(home).trust, remedy="put it back").read(name, MAX_METADATA_BYTES["root"])
        return TrustedRoot.from_bytes(data, name)
    except BundleError as error:
        raise StoreError(f"the trusted root is unusable: {error}") from None


def read_root(path: Path) -> TrustedRoot:
    """A root.json a person names. TrustError or BundleError naming it."""
    data = Tree(path.parent, remedy="name the root.json you were given").read(path.name, MAX_METADATA_BYTES["root"])
    return TrustedRoot.from_bytes(data, str(path))


def add_root(home: Path, root: TrustedRoot, source: Path, *, reset: bool = False) -> bool:
    """Trust ``root``; False when it is trusted already. The caller has shown its fingerprint to a person.

    Beside a root already trusted only its successor, signed by it, is taken; ``reset`` forgets the old root and every
    version floor instead, and that is journaled. TrustError otherwise.
    """
    with disk_errors(home), change_lock(home):
        floors = None if reset else Floors.read(home)
        if floors is not None and floors.root_version > 0:
            current = trusted_root(home, floors)
            if current.data == root.data:
                return False
            root = _successor(current, root, source)
        journal, layout = Journal(home), Layout(home)
        journal.append("root", version=root.version, fingerprint=root.fingerprint, reset=reset)
        if reset:
            for path in layout.trust.glob("*.json"):
                path.unlink()
        if floors is None:
            floors = Floors().write(home)  # says "none trusted yet" should the power go before the root is written
        write_synced(layout.root(root.version), root.data)
        floors.raised(root_version=root.version).write(home)
        return True


def _successor(current: TrustedRoot, root: TrustedRoot, source: Path) -> TrustedRoot:
    try:
        return current.successor(root.data, str(source))
    except TrustError as error:
        raise TrustError(
            f"{error}. This machine trusts root version {current.version} with fingerprint {current.fingerprint}; "
            "to forget it, and with it every installed model, use --reset"
        ) from None
