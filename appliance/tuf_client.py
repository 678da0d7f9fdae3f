"""The TUF client workflow over a directory instead of a network: python-tuf's Updater, our fetcher, nothing on disk.

The Updater walks root, timestamp, snapshot and targets as the TUF specification orders, with the machine's clock. The
very bytes it read then pass :func:`appliance.trust.verify_chain`, which is stricter and yields the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.ngclient import Updater, UpdaterConfig  # type: ignore[attr-defined] # documented names, without __all__
from tuf.ngclient.fetcher import FetcherInterface

from appliance.errors import BundleError, TrustError
from appliance.tree import Tree
from appliance.trust import (
    MAX_METADATA_BYTES,
    MAX_ROOT_ROTATIONS,
    Chain,
    TrustedRoot,
    declared_root_version,
    verify_chain,
)

_BASE = "stick:///"


@dataclass(frozen=True, slots=True)
class Release:
    """What a stick's metadata amounts to. ``roots`` are those newer than the trusted one, oldest first."""

    chain: Chain
    roots: tuple[TrustedRoot, ...]


def read_release(stick: Tree, trusted: TrustedRoot) -> Release:
    """Verify the stick's ``metadata/`` from the trusted root on, each file read once.

    TrustError or BundleError names the first file that is missing, damaged, expired or signed by others.
    """
    own = f"{trusted.version}.root.json"
    fetcher = _TreeFetcher(stick)
    if fetcher.read(own, MAX_METADATA_BYTES["root"]) != trusted.data:
        raise TrustError(
            f"metadata/{own} is not the root trusted here (fingerprint {trusted.fingerprint[:16]}…): it is damaged, or "
            "the bundle comes from someone this machine does not trust"
        )
    _require_roots(fetcher, trusted.version, declared_root_version(fetcher.read))
    _run_updater(fetcher, trusted)
    roots, last = [], trusted
    while f"{last.version + 1}.root.json" in fetcher.seen:
        name = f"{last.version + 1}.root.json"
        last = last.successor(fetcher.seen[name], f"metadata/{name}")
        roots.append(last)
    return Release(verify_chain(last, fetcher.read), tuple(roots))


def _require_roots(fetcher: _TreeFetcher, trusted: int, declared: int) -> None:
    """A stick signed under a newer root must carry every root on the way; the Updater would only stop early."""
    if declared > trusted + MAX_ROOT_ROTATIONS:
        raise TrustError(f"metadata/ names root version {declared}, too far from version {trusted} trusted here")
    for version in range(trusted + 1, declared + 1):
        fetcher.read(f"{version}.root.json", MAX_METADATA_BYTES["root"])


def _run_updater(fetcher: _TreeFetcher, trusted: TrustedRoot) -> None:
    config = UpdaterConfig(
        max_root_rotations=MAX_ROOT_ROTATIONS,
        root_max_length=MAX_METADATA_BYTES["root"],
        timestamp_max_length=MAX_METADATA_BYTES["timestamp"],
        snapshot_max_length=MAX_METADATA_BYTES["snapshot"],
        targets_max_length=MAX_METADATA_BYTES["targets"],
    )
    with tempfile.TemporaryDirectory(prefix="solocard-") as scratch:
        try:
            updater = Updater(scratch, _BASE, fetcher=fetcher, config=config, bootstrap=trusted.data)
            updater.refresh()
        except ExpiredMetadataError as error:
            message = f"metadata/{fetcher.last}: {error}; ask for a bundle signed anew, or set this machine's clock"
            raise TrustError(message) from None
        except (RepositoryError, DownloadError) as error:
            if fetcher.refused is not None:
                raise fetcher.refused from None
            raise TrustError(
                f"metadata/{fetcher.last} is not acceptable ({error}): it is damaged, or signed by someone this "
                "machine does not trust"
            ) from None


class _TreeFetcher(FetcherInterface):
    """Serves a directory's files to the Updater and keeps what it served."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.seen: dict[str, bytes] = {}
        self.last = ""
        self.refused: BundleError | None = None

    def read(self, name: str, max_bytes: int) -> bytes:
        """The bytes served under this name, or those of the file now; a stick's file is opened once."""
        if name not in self.seen:
            self.seen[name] = self._tree.read(f"metadata/{name}", max_bytes)
        return self.seen[name]

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(_BASE)
        role = Path(name).stem.rpartition(".")[2]
        if role == "root" and not self._tree.holds(f"metadata/{name}"):
            raise DownloadHTTPError(f"{name} does not exist", 404)
        self.last = name
        try:
            yield self.read(name, MAX_METADATA_BYTES[role])
        except BundleError as error:
            self.refused = error
            raise DownloadError(str(error)) from None
