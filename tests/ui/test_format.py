from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ui import format as fmt
from ui.terminal import ASCII, UNICODE


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (102_400, "100 KiB"),
        (8 << 30, "8.0 GiB"),
        (-1, "0 B"),
        (9 << 60, "9216 PiB"),
    ],
)
def test_sizes(size_bytes: int, shown: str) -> None:
    assert fmt.byte_size(size_bytes) == shown


@pytest.mark.parametrize(
    ("fraction", "shown"), [(0.0, "0 %"), (0.001, "<1 %"), (0.154, "15 %"), (0.9999, "99 %"), (1.0, "100 %")]
)
def test_percent_is_none_or_all_only_when_it_is(fraction: float, shown: str) -> None:
    assert fmt.percent(fraction) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (59.9, "59 s"), (61, "1 min 01 s"), (7503, "2 h 05 min"), (90_061, "1 d 01 h")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert fmt.duration(seconds) == shown


def test_share_of_nothing_is_nothing() -> None:
    assert fmt.share(5, 0) == 0.0
    assert fmt.share(9, 3) == 1.0


def test_rates() -> None:
    assert [fmt.rate(r) for r in (0, 17.24, 1234.5, -1)] == ["0.0", "17.2", "1,234", "0.0"]


@given(st.lists(st.floats(0, 1e6), max_size=50), st.integers(0, 60), st.sampled_from([UNICODE, ASCII]))
def test_sparkline_has_its_width_and_its_peak(values: list[float], width: int, glyphs: object) -> None:
    levels = glyphs.spark  # type: ignore[attr-defined]
    line = fmt.sparkline(values, width, levels)
    assert len(line) == width
    assert set(line) <= {" ", *levels}
    assert (levels[-1] in line) == (max(values[-width:] if width else [], default=0) > 0)


@given(st.floats(0, 1), st.integers(1, 60))
def test_bar_has_its_width_and_shows_a_sliver(fraction: float, width: int) -> None:
    drawn = fmt.bar(fraction, width, "#", ".")
    assert len(drawn) == width
    assert ("#" in drawn) == (fraction > 0)


@given(st.text(max_size=40), st.integers(0, 40), st.sampled_from(["...", "…"]))
def test_fit_gives_exactly_the_cells(text: str, width: int, ellipsis: str) -> None:
    assert fmt.cell_width(fmt.fit(fmt.printable(text), width, ellipsis)) == width


def test_wide_characters_take_two_cells() -> None:
    assert fmt.cell_width("模型a") == 5
    assert fmt.fit("模型模型", 6, "…") == "模型… "


def test_nothing_from_outside_can_steer_the_terminal() -> None:
    assert fmt.printable("a\x1b[2Jb\r\x07\t\u202ec\x9b") == "a?[2Jb?? ?c?"


@given(st.text())
def test_printable_has_no_control_character(text: str) -> None:
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in fmt.printable(text))
