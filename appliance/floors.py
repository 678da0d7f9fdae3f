"""What this machine must never fall behind: TUF versions, release counters, time. Two copies, each with a checksum.

A copy zeroed by a power cut or edited by hand is ignored; with both gone nothing is installed until a person resets
the trust, because a machine that forgot its floors would take the oldest stick.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from appliance.bundle_writer import write_synced
from appliance.errors import StoreError
from appliance.layout import Layout
from appliance.manifest import canonical_json

MAX_FLOORS_BYTES = 4096
COPIES = ("floors.a.json", "floors.b.json")


@dataclass(frozen=True, slots=True)
class Floors:
    """``generation`` counts writes. ``root_version`` names the trusted root; ``time_s`` is Unix time, UTC.

    Timestamp, snapshot, targets version and ``release_counter`` rise when a model has proved itself,
    ``security_counter`` as soon as signed metadata asks for it.
    """

    generation: int = 0
    root_version: int = 0
    timestamp_version: int = 0
    snapshot_version: int = 0
    targets_version: int = 0
    release_counter: int = 0
    security_counter: int = 0
    time_s: int = 0

    @staticmethod
    def read(home: Path) -> Floors | None:
        """The newest valid copy; None before the first root was trusted. StoreError when both copies are lost."""
        trust = Layout(home).trust
        found = [floors for floors in (_copy(trust / name) for name in COPIES) if floors is not None]
        if found:
            return max(found, key=lambda floors: floors.generation)
        if trust.is_dir() and any(path.suffix != ".partial" for path in trust.iterdir()):  # that one came to nothing
            raise StoreError(
                f"both copies of the version floors in {trust} are lost or damaged; nothing is installed without them. "
                "If you know why, start over with `solocard trust add ROOT.json --reset`"
            )
        return None

    def raised(self, **at_least: int) -> Floors:
        """These floors with each named one at least that high."""
        return Floors(**asdict(self) | {name: max(getattr(self, name), value) for name, value in at_least.items()})

    def write(self, home: Path) -> Floors:
        """Both copies, one after the other, fsynced, one generation on; returns what was written."""
        written = Floors(**asdict(self) | {"generation": self.generation + 1})
        payload = asdict(written)
        data = canonical_json({"floors": payload, "sha256": hashlib.sha256(canonical_json(payload)).hexdigest()})
        for name in COPIES:
            write_synced(Layout(home).trust / name, data)
        return written


def _copy(path: Path) -> Floors | None:
    """A valid copy, None for a missing or damaged one: the other copy, or the error in read(), speaks then."""
    try:
        data = path.read_bytes()[: MAX_FLOORS_BYTES + 1]
        raw = json.loads(data)
        payload = raw["floors"]
        whole = hashlib.sha256(canonical_json(payload)).hexdigest() == raw["sha256"]
        names = {item.name for item in fields(Floors)}
        if not whole or set(payload) != names or not all(type(v) is int and v >= 0 for v in payload.values()):
            return None
        return Floors(**payload)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
