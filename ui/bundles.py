"""The list of installed bundles, as ``solocard list --json`` prints it in the data of its last line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from appliance.errors import SolocardError

MAX_BUNDLES = 1000


class ListError(SolocardError):
    """``solocard list --json`` printed something this console cannot read."""


@dataclass(frozen=True, slots=True)
class BundleRow:
    """One installed bundle; ``current`` is in service, ``previous`` is where a roll back goes;
    ``trial`` is being tried."""

    bundle_id: str
    name: str
    version: str
    release_counter: int
    size_bytes: int
    current: bool
    previous: bool
    trial: bool


@dataclass(frozen=True, slots=True)
class BundleList:
    """Installed bundles, newest release first."""

    rows: tuple[BundleRow, ...] = ()
    problem: str = ""  # what `solocard list` found wrong with its own state

    @property
    def current(self) -> BundleRow | None:
        return next((row for row in self.rows if row.current), None)

    @property
    def previous(self) -> BundleRow | None:
        return next((row for row in self.rows if row.previous), None)

    def find(self, bundle_id: str) -> BundleRow | None:
        return next((row for row in self.rows if row.bundle_id == bundle_id), None)


def read_bundles(data: dict[str, Any]) -> BundleList:
    """Raises ListError naming the field that is missing or of another type."""
    listed = data.get("bundles")
    if not isinstance(listed, list):
        raise ListError("solocard list --json: data.bundles is not a list; console and appliance differ in version")
    rows = [_read_row(n, raw) for n, raw in enumerate(listed[:MAX_BUNDLES])]
    rows.sort(key=lambda row: (-row.release_counter, row.bundle_id))
    return BundleList(tuple(rows), str(data.get("problem") or ""))


def _read_row(number: int, raw: Any) -> BundleRow:
    where = f"solocard list --json: data.bundles[{number}]"
    if not isinstance(raw, dict):
        raise ListError(f"{where} is not an object; console and appliance differ in version")
    values: dict[str, Any] = {}
    for field, kind in BundleRow.__annotations__.items():
        value = raw.get(field, False if field == "trial" else None)
        if type(value).__name__ != kind:
            raise ListError(f"{where}.{field} is {value!r}, not {kind}; console and appliance differ in version")
        values[field] = value
    return BundleRow(**values)
