"""``quality.json``: what was measured on a student, its gates and waivers, and what it was measured with.

The bundle carries it. Nothing in it is believed that can be computed again: whether a gate passed follows from its
measurement and bound, whether it is waived from the waivers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError
from exporter.evaluate.gates import NAMES, Gate, Waiver, judge
from exporter.stage import read_json, write_json

QUALITY = "quality.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Quality:
    """See the module. ``recipe_sha256`` = ``View.recipe_sha256`` of the student, ``metrics`` as docs/export.md says."""

    recipe_sha256: str
    source_sha256: str
    teacher: Mapping[str, Any]
    texts_sha256: str
    code: Mapping[str, str]
    metrics: Mapping[str, Any]
    gates: tuple[Gate, ...]
    waivers: tuple[Waiver, ...]

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """Names of gates that failed or were not measured, and that no waiver names."""
        return tuple(gate.name for gate in self.gates if not gate.passed and not gate.waived)

    @property
    def waived_gates(self) -> tuple[str, ...]:
        return tuple(gate.name for gate in self.gates if gate.waived)

    def to_dict(self) -> dict[str, Any]:
        gates = [
            {"name": g.name, "bound": g.bound, "measured": g.measured, "passed": g.passed, "waived": g.waived}
            for g in self.gates
        ]
        waivers = [{"gate": w.gate, "reason": w.reason, "by": w.by} for w in self.waivers]
        return {
            "format": FORMAT, "recipe_sha256": self.recipe_sha256, "source_sha256": self.source_sha256,
            "teacher": dict(self.teacher), "texts_sha256": self.texts_sha256, "code": dict(self.code),
            "metrics": dict(self.metrics), "gates": gates, "waivers": waivers,
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_json(path, self.to_dict())

    @staticmethod
    def read(path: Path) -> Quality:
        """CheckpointError names file and field; a gate that claims another result than its numbers give is refused."""
        raw = read_json(path)
        if raw.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {raw.get('format')!r}, expected {FORMAT}; evaluate again")
        for field, kind in _FIELDS.items():
            if not isinstance(raw.get(field), kind):
                found = str(raw.get(field))[:60]
                raise CheckpointError(f"{path}: {field}: found {found!r}, expected a {kind.__name__}")
        waivers = tuple(_waiver(path, entry) for entry in raw["waivers"])
        return Quality(
            raw["recipe_sha256"], raw["source_sha256"], raw["teacher"], raw["texts_sha256"], raw["code"],
            raw["metrics"], _gates(path, raw["gates"], waivers), waivers,
        )  # fmt: skip


_FIELDS: Mapping[str, type] = {
    "recipe_sha256": str, "source_sha256": str, "teacher": dict, "texts_sha256": str, "code": dict,
    "metrics": dict, "gates": list, "waivers": list,
}  # fmt: skip


def _waiver(path: Path, entry: Any) -> Waiver:
    fields = [entry.get(field) for field in ("gate", "reason", "by")] if isinstance(entry, dict) else [None]
    if not all(isinstance(field, str) and field for field in fields):
        raise CheckpointError(f"{path}: waivers: found {str(entry)[:80]!r}, expected {{gate, reason, by}}")
    return Waiver(*map(str, fields))


def _gates(path: Path, entries: list[Any], waivers: tuple[Waiver, ...]) -> tuple[Gate, ...]:
    """Judged again from bound, measurement and waivers. Every known gate must be there once."""
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if sorted(map(str, names)) != sorted(NAMES):
        raise CheckpointError(f"{path}: gates: found {names}, expected each of {', '.join(NAMES)} once; evaluate again")
    for entry in entries:
        if not _number(entry.get("bound")) or not (entry.get("measured") is None or _number(entry["measured"])):
            raise CheckpointError(f"{path}: gates: {entry['name']}: bound and measured must be numbers")
    measured = {entry["name"]: entry["measured"] for entry in entries}
    gates = judge({entry["name"]: entry["bound"] for entry in entries}, measured, waivers)
    for entry, gate in zip(entries, gates, strict=True):
        if (entry.get("passed"), entry.get("waived")) != (gate.passed, gate.waived):
            raise CheckpointError(
                f"{path}: gates: {gate.name}: says passed {entry.get('passed')}, waived {entry.get('waived')}; its "
                f"numbers and waivers give {gate.passed}, {gate.waived}; evaluate again"
            )
    return gates


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
