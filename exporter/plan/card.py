"""Cards as data: memory, bandwidth and link of each, every number with its source and whether it was confirmed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from appliance.errors import UsageError

MAX_CARD_BYTES = 64 << 10
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,27}")
_NUMBERS: Mapping[str, tuple[int, int]] = {  # field → least, most
    "devices": (1, 64), "device_memory_bytes": (1, 1 << 50), "bandwidth_bytes_per_s": (1, 1 << 50),
    "host_link_bytes_per_s": (1, 1 << 50), "free_percent": (0, 90), "workspace_bytes": (0, 1 << 50),
}  # fmt: skip
_WORDS: Mapping[str, tuple[str, ...]] = {"soc": (), "fp4": ("native", "storage")}
_FIELDS = {"id", "name", "notes", *_NUMBERS, *_WORDS}


@dataclass(frozen=True, slots=True)
class Card:
    """One card class. A card of several devices is planned for one of them: they do not share memory."""

    id: str
    name: str
    soc: str
    devices: int
    device_memory_bytes: int
    bandwidth_bytes_per_s: int
    host_link_bytes_per_s: int
    fp4: str  # "native": the matrix unit takes it; "storage": kernels convert
    free_percent: int  # of the memory, left alone
    workspace_bytes: int
    notes: tuple[str, ...]
    sources: Mapping[str, str]
    unverified: tuple[str, ...]  # fields that no card and no page of the vendor has confirmed

    @property
    def free_bytes(self) -> int:
        """Left alone, rounded up."""
        return -(-self.device_memory_bytes * self.free_percent // 100)

    def to_dict(self) -> dict[str, Any]:
        """As plan.json holds it."""
        values = {field: getattr(self, field) for field in ("id", "name", *_WORDS, *_NUMBERS)}
        return {**values, "notes": list(self.notes), "sources": dict(self.sources), "unverified": list(self.unverified)}


def ids() -> tuple[str, ...]:
    """Ids of the package's cards, by name; no file is read."""
    names = (entry.name for entry in resources.files("exporter.plan").joinpath("cards").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def built_in() -> tuple[Card, ...]:
    """The cards of the package, largest memory first."""
    folder = resources.files("exporter.plan").joinpath("cards")
    cards = [parse(folder.joinpath(f"{card}.yaml").read_text("utf-8"), f"{card}.yaml") for card in ids()]
    return tuple(sorted(cards, key=lambda card: (-card.device_memory_bytes, card.id)))


def load(card: str) -> Card:
    """A card by its id, or from a file named *.yaml of the same form. UsageError names the choices or the field."""
    if card.endswith((".yaml", ".yml")):
        path = Path(card)
        try:
            if path.stat().st_size > MAX_CARD_BYTES:
                raise UsageError(f"{path}: more than {MAX_CARD_BYTES:,} bytes; not a card")
            return parse(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read as text ({error})") from None
    if card not in ids():
        raise UsageError(f"--card {card}: not known; choose {', '.join(ids())} or give a file FILE.yaml")
    return next(known for known in built_in() if known.id == card)


def parse(text: str, source: str) -> Card:
    """A card's YAML. UsageError names ``source`` and the field."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{source}: found a {type(raw).__name__}, expected the fields {', '.join(sorted(_FIELDS))}")
    for field in sorted({str(key) for key in raw} ^ _FIELDS):
        known = "is missing" if field in _FIELDS else "is not known"
        raise UsageError(f"{source}: {field} {known}; expected {', '.join(sorted(_FIELDS))}")
    if not isinstance(raw["id"], str) or _ID.fullmatch(raw["id"]) is None:
        raise UsageError(f"{source}: id: found {raw['id']!r}, expected {_ID.pattern}")
    notes = raw["notes"]
    if not isinstance(raw["name"], str) or not isinstance(notes, list) or not all(isinstance(n, str) for n in notes):
        raise UsageError(f"{source}: name and notes: expected text and a list of texts")
    facts = {field: _fact(source, field, raw[field]) for field in (*_NUMBERS, *_WORDS)}
    return Card(
        id=raw["id"], name=raw["name"], notes=tuple(notes),
        sources={field: str(fact["source"]) for field, fact in facts.items()},
        unverified=tuple(field for field, fact in facts.items() if not fact["verified"]),
        **{field: fact["value"] for field, fact in facts.items()},
    )  # fmt: skip


def _fact(source: str, field: str, fact: Any) -> dict[str, Any]:
    """{value, source, verified} of one field, checked."""
    if not isinstance(fact, dict) or set(fact) != {"value", "source", "verified"}:
        raise UsageError(f"{source}: {field}: expected {{value, source, verified}}")
    if not isinstance(fact["source"], str) or not isinstance(fact["verified"], bool):
        raise UsageError(f"{source}: {field}: source must be text, verified true or false")
    value = fact["value"]
    if field in _NUMBERS:
        least, most = _NUMBERS[field]
        if type(value) is not int or not least <= value <= most:
            raise UsageError(f"{source}: {field}: found {value!r}, expected an integer from {least:,} to {most:,}")
    elif not isinstance(value, str) or (_WORDS[field] and value not in _WORDS[field]):
        raise UsageError(f"{source}: {field}: found {value!r}, expected {' or '.join(_WORDS[field]) or 'text'}")
    return fact
