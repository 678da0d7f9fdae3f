"""Small plots as SVG text: bars and lines, readable on a light and on a dark page, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 72, 20, 56, 56
MAX_LABELS = 12  # below the x axis
TICKS = 5
_STYLE = """<style>
  text { font: 12px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600; font-size: 14px }
  .page { fill: #ffffff } .grid { stroke: #d1d9e0 } .axis { stroke: #59636e }
  .s0 { fill: #0969da; stroke: #0969da } .s1 { fill: #bc4c00; stroke: #bc4c00 } .s2 { fill: #8250df; stroke: #8250df }
  polyline { fill: none !important; stroke-width: 2 } .bar { stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .page { fill: #0d1117 } .grid { stroke: #30363d } .axis { stroke: #8b949e }
    .s0 { fill: #58a6ff; stroke: #58a6ff } .s1 { fill: #f0883e; stroke: #f0883e }
    .s2 { fill: #bc8cff; stroke: #bc8cff }
  }
</style>"""


def bars(title: str, labels: Sequence[str], series: Mapping[str, Sequence[float]], *, y_label: str) -> str:
    """One group of bars per label, one bar per series in it (at most 3 series)."""
    scale = _Scale([value for values in series.values() for value in values], from_zero=True)
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(labels))
    width = 0.72 * slot / max(1, len(series))
    body = []
    for number, values in enumerate(series.values()):
        for at, value in enumerate(values):
            x = LEFT + slot * at + 0.14 * slot + width * number
            top, zero = scale.y(max(value, 0)), scale.y(min(value, 0))
            body.append(
                f'<rect class="bar s{number}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{max(zero - top, 0.5):.1f}"><title>{escape(labels[at])}: {value:.6g}</title></rect>'
            )
    places = [(LEFT + slot * (at + 0.5), label) for at, label in enumerate(labels)]
    return _page(title, y_label, "", list(series), scale, places, body)


def lines(
    title: str, x: Sequence[float], series: Mapping[str, Sequence[float]], *, x_label: str, y_label: str,
    log_x: bool = False, from_zero: bool = True,
) -> str:  # fmt: skip
    """One line per series over the same x (at most 3 series); ``log_x`` for lengths that double."""
    scale = _Scale([value for values in series.values() for value in values], from_zero=from_zero)
    place = _along(x, log_x)
    body = []
    for number, values in enumerate(series.values()):
        points = [(place(a), scale.y(b)) for a, b in zip(x, values, strict=True)]
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        body.append(f'<polyline class="s{number}" points="{joined}"/>')
        body += [
            f'<circle class="s{number}" cx="{a:.1f}" cy="{b:.1f}" r="3"><title>{at:g}: {value:.6g}</title></circle>'
            for (a, b), at, value in zip(points, x, values, strict=True)
        ]
    return _page(title, y_label, x_label, list(series), scale, [(place(a), f"{a:g}") for a in x], body)


class _Scale:
    """Values to y coordinates, with ticks at round numbers."""

    def __init__(self, values: Sequence[float], *, from_zero: bool) -> None:
        low, high = min(values, default=0.0), max(values, default=1.0)
        if from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low < 1e-12:
            high = low + (abs(low) or 1.0)
        step = _round_step((high - low) / TICKS)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        self.ticks = [step * at for at in range(first, last + 1)]
        self._low, self._high = self.ticks[0], self.ticks[-1]

    def y(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _round_step(wanted: float) -> float:
    """The smallest of 1, 2, 5 · 10^n that is not below ``wanted``."""
    power: float = 10.0 ** math.floor(math.log10(wanted))
    return next((m * power for m in (1, 2, 5) if m * power >= wanted * (1 - 1e-9)), 10 * power)


def _along(x: Sequence[float], log_x: bool) -> Callable[[float], float]:
    """x values to x coordinates, half a step away from both ends."""
    measure: Callable[[float], float] = math.log2 if log_x else float
    low, high = measure(min(x)), measure(max(x))
    inner = WIDTH - LEFT - RIGHT - 40

    def place(value: float) -> float:
        share = (measure(value) - low) / (high - low) if high > low else 0.5
        return LEFT + 20 + share * inner

    return place


def _page(
    title: str, y_label: str, x_label: str, names: Sequence[str], scale: _Scale, places: Sequence[tuple[float, str]],
    body: Sequence[str],
) -> str:  # fmt: skip
    """The whole file: frame, grid, labels and the plot itself."""
    floor = HEIGHT - BOTTOM
    skip = -(-len(places) // MAX_LABELS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>", _STYLE, f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="16" y="22">{escape(title)}</text>', *_legend(names),
        *(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{scale.y(t):.1f}" y2="{scale.y(t):.1f}"/>'
          f'<text x="{LEFT - 8}" y="{scale.y(t) + 4:.1f}" text-anchor="end">{t:.6g}</text>' for t in scale.ticks),
        *body, f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>',
        *(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{escape(label)}</text>'
          for x, label in places[::skip]),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {(TOP + floor) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>", "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _legend(names: Sequence[str]) -> list[str]:
    """Names of the series at the upper right, if there is more than one."""
    parts, x = [], WIDTH - RIGHT
    for number, name in reversed(list(enumerate(names if len(names) > 1 else ()))):
        x -= 7 * len(name) + 26
        parts.append(
            f'<rect class="bar s{number}" x="{x}" y="12" width="12" height="12"/>'
            f'<text x="{x + 17}" y="22">{escape(name)}</text>'
        )
    return parts
