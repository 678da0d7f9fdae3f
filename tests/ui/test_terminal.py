from __future__ import annotations

import dataclasses

import pytest

from ui.terminal import ASCII, UNICODE, detect, too_small


@pytest.mark.parametrize("term", ["linux", "vt100", "vt220", "dumb"])
def test_plain_terminals_get_ascii_and_their_own_colors(term: str) -> None:
    terminal = detect({"TERM": term})
    assert terminal.plain
    assert terminal.native_colors
    assert terminal.glyphs is ASCII


def test_xterm_gets_everything() -> None:
    terminal = detect({"TERM": "xterm-256color"})
    assert (terminal.plain, terminal.native_colors) == (False, False)
    assert terminal.glyphs is UNICODE


@pytest.mark.parametrize("value", ["1", ""])
def test_no_color_counts_when_set_at_all(value: str) -> None:
    assert detect({"TERM": "xterm", "NO_COLOR": value}).native_colors


def test_ascii_by_wish_and_by_encoding() -> None:
    assert detect({"TERM": "xterm"}, ascii_wanted=True).plain
    assert detect({"TERM": "xterm"}, encoding="ISO-8859-1").plain
    assert not detect({"TERM": "xterm"}, encoding="UTF-8").plain


def test_the_ascii_set_is_ascii_and_both_have_one_cell_each() -> None:
    assert all(getattr(ASCII, f.name).isascii() for f in dataclasses.fields(ASCII))
    assert all(len(getattr(UNICODE, name)) == 1 for name in ("bar_full", "bar_empty", "rule", "ellipsis"))


def test_80x24_is_enough() -> None:
    assert not too_small(80, 24)
    assert too_small(79, 24)
    assert too_small(80, 23)
