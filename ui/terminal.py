"""What the terminal can show: glyph set, colour and size. Decided once at the start, from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIN_COLUMNS = 80
MIN_ROWS = 24
PLAIN_TERMS = ("linux", "vt100", "vt102", "vt220", "dumb")  # few glyphs or a serial line


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Characters the console draws with; every one is a single cell. ``spark`` runs from none to most."""

    spark: str
    bar_full: str
    bar_empty: str
    rule: str
    ellipsis: str


UNICODE = Glyphs(spark="▁▁▂▃▄▅▆▇█", bar_full="█", bar_empty="░", rule="─", ellipsis="…")
ASCII = Glyphs(spark="__.-:=+*#", bar_full="#", bar_empty=".", rule="-", ellipsis="...")


@dataclass(frozen=True, slots=True)
class Terminal:
    """``plain`` draws in ASCII only; ``native_colors`` leaves colours to the terminal (16 of them, or none)."""

    plain: bool
    native_colors: bool

    @property
    def glyphs(self) -> Glyphs:
        return ASCII if self.plain else UNICODE


def detect(environ: Mapping[str, str], *, encoding: str = "utf-8", ascii_wanted: bool = False) -> Terminal:
    """Choose for ``environ`` (TERM, NO_COLOR) and the encoding of stdout.

    NO_COLOR counts when it is set at all. A Linux virtual terminal holds 512 glyphs at most and a serial line
    often less, so these get ASCII.
    """
    unicode_ok = encoding.lower().replace("-", "") in {"utf8", "utf8sig"}
    few_glyphs = environ.get("TERM", "") in PLAIN_TERMS
    plain = ascii_wanted or few_glyphs or not unicode_ok
    return Terminal(plain=plain, native_colors=few_glyphs or "NO_COLOR" in environ)


def too_small(columns: int, rows: int) -> bool:
    """True below 80x24."""
    return columns < MIN_COLUMNS or rows < MIN_ROWS
