"""docs/console.md names every key, option and screen the code has."""

from __future__ import annotations

from pathlib import Path

import pytest

from ui.__main__ import parser
from ui.actions import ACTIONS, MODES
from ui.strings.en import EN
from ui.terminal import PLAIN_TERMS

DOC = (Path(__file__).resolve().parents[2] / "docs" / "console.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.name)
def test_every_key_is_in_the_table(action: object) -> None:
    rows = [line for line in DOC.splitlines() if line.startswith("| ")]
    shown = action.shown  # type: ignore[attr-defined]
    assert [row for row in rows if shown in row.split("|")[1]]


def test_every_option_is_named() -> None:
    options = [name for row in parser()._actions for name in row.option_strings if name.startswith("--")]
    assert [name for name in options if name != "--help" and name not in DOC] == []


def test_screens_and_terminals_are_named() -> None:
    assert all(f"**F{number} {getattr(EN, mode)}.**" in DOC for number, mode in enumerate(MODES, 1))
    assert [term for term in PLAIN_TERMS if term not in DOC] == []
