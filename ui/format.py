"""Numbers, durations and foreign text as the console prints them: pure functions, no textual.

Widths are terminal cells, never ``len``: a CJK character takes two cells.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

KIB = 1024
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def byte_size(size_bytes: int) -> str:
    """``1536`` → ``1.5 KiB``; three significant places at most, binary units."""
    value, unit = float(max(size_bytes, 0)), 0
    while value >= KIB and unit < len(UNITS) - 1:
        value, unit = value / KIB, unit + 1
    if unit == 0:
        return f"{int(value)} B"
    return f"{value:.1f} {UNITS[unit]}" if value < 100 else f"{value:.0f} {UNITS[unit]}"


def count(value: int) -> str:
    """``12345`` → ``12,345``."""
    return f"{value:,}"


def rate(tokens_per_s: float) -> str:
    """Tokens per second: one decimal below 1000, none above."""
    value = max(tokens_per_s, 0.0)
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def share(part: float, whole: float) -> float:
    """``part / whole`` in 0…1; 0 where nothing was counted yet."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0


def percent(fraction: float) -> str:
    """``0.154`` → ``15 %``; 100 only when it is all of it, 0 only when it is none."""
    whole = round(fraction * 100)
    if whole == 100 and fraction < 1:
        whole = 99
    if whole == 0 and fraction > 0:
        return "<1 %"
    return f"{whole} %"


def duration(seconds: float) -> str:
    """``7503`` → ``2 h 05 min``; two units at most."""
    total_s = int(max(seconds, 0))
    days, rest_s = divmod(total_s, 86400)
    hours, rest_s = divmod(rest_s, 3600)
    minutes, rest_s = divmod(rest_s, 60)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest_s:02d} s" if minutes else f"{rest_s} s"


def bar(fraction: float, width: int, full: str, empty: str) -> str:
    """A bar of ``width`` cells; a sliver is drawn for anything above nothing."""
    cells = round(min(max(fraction, 0.0), 1.0) * width)
    if fraction > 0:
        cells = max(cells, 1)
    return full * cells + empty * (width - cells)


def sparkline(values: Sequence[float], width: int, levels: str) -> str:
    """The last ``width`` values, newest at the right, scaled to their own maximum; ``levels`` from low to high."""
    shown = list(values[-width:]) if width > 0 else []
    peak = max(shown, default=0.0)
    top = len(levels) - 1
    cells = [levels[0] if peak <= 0 or v <= 0 else levels[max(1, round(v / peak * top))] for v in shown]
    return "".join(cells).rjust(width)


def printable(text: str) -> str:
    """Text from outside, made safe for a terminal: control and direction characters become ``?``, tabs a space."""
    return "".join(_safe(c) for c in text)


def _safe(character: str) -> str:
    if character == "\t":
        return " "
    if character in BIDI_CONTROLS or unicodedata.category(character) in {"Cc", "Cs", "Co", "Zl", "Zp"}:
        return "?"
    return character


def cell_width(text: str) -> int:
    """Cells ``text`` takes: two for wide characters, none for combining marks."""
    return sum(_cells(c) for c in text)


def fit(text: str, width: int, ellipsis: str = "...") -> str:
    """``text`` in exactly ``width`` cells, cut with ``ellipsis`` or padded with spaces at the right."""
    if cell_width(text) > width:
        room = max(width - cell_width(ellipsis), 0)
        kept, used = [], 0
        for character in text:
            used += _cells(character)
            if used > room:
                break
            kept.append(character)
        text = ("".join(kept) + ellipsis)[:width]
    return text + " " * (width - cell_width(text))


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1
