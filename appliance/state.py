"""``models/state.json``: which bundle is current, which was before it, and which is being tried. Replaced by rename."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from appliance.bundle_writer import write_synced
from appliance.errors import StoreError
from appliance.layout import Layout
from appliance.manifest import canonical_json, is_bundle_id

MAX_STATE_BYTES = 4096
_REPAIR = "name the bundle to serve with `solocard activate BUNDLE_ID` (`solocard list` shows them)"


@dataclass(frozen=True, slots=True)
class State:
    """Bundle ids; an empty one means none."""

    current: str = ""
    previous: str = ""
    trial: str = ""

    @staticmethod
    def read(home: Path) -> State:
        """The state; State() when nothing was ever installed. StoreError when the file is damaged."""
        path = Layout(home).state
        try:
            data = path.read_bytes()[: MAX_STATE_BYTES + 1]
        except FileNotFoundError:
            return State()
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
        return State._parse(data, path)

    @staticmethod
    def _parse(data: bytes, path: Path) -> State:
        try:
            raw = json.loads(data)
            state = State(raw["current"], raw["previous"], raw["trial"])
            if len(data) > MAX_STATE_BYTES or state.to_bytes() != data:
                raise ValueError("not as written")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StoreError(f"{path} is damaged; {_REPAIR}") from None
        for bundle_id in (state.current, state.previous, state.trial):
            if bundle_id and not is_bundle_id(bundle_id):
                raise StoreError(f"{path} is damaged: {bundle_id!r} is no bundle id; {_REPAIR}")
        return state

    def to_bytes(self) -> bytes:
        return canonical_json(asdict(self))

    def write(self, home: Path) -> None:
        """Replace the file, fsynced; the old or the new state is there whenever the power goes."""
        write_synced(Layout(home).state, self.to_bytes())
