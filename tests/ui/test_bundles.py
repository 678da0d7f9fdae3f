from __future__ import annotations

from typing import Any

import pytest
from ui_support import BUNDLES

from ui.bundles import ListError, read_bundles
from ui.plans import activation, rollback
from ui.strings.en import EN


def shown(*arguments: str) -> str:
    return "solocard " + " ".join(arguments)


def test_newest_release_first_whatever_the_order() -> None:
    bundles = read_bundles({"bundles": BUNDLES[::-1]})
    assert [row.release_counter for row in bundles.rows] == [3, 2, 1]
    assert bundles.current is not None
    assert bundles.previous is not None
    assert (bundles.current.release_counter, bundles.previous.release_counter) == (3, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "data.bundles is not a list"),
        ({"bundles": [3]}, r"bundles\[0\] is not an object"),
        ({"bundles": [{**BUNDLES[0], "size_bytes": "big"}]}, r"bundles\[0\].size_bytes is 'big', not int"),
        ({"bundles": [BUNDLES[0], {**BUNDLES[1], "current": 1}]}, r"bundles\[1\].current is 1, not bool"),
    ],
)
def test_a_list_of_another_shape_names_the_field(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ListError, match=message):
        read_bundles(data)


def test_a_plan_names_what_changes_the_command_and_the_undo() -> None:
    bundles = read_bundles({"bundles": BUNDLES})
    plan = activation(bundles.rows[2], bundles.current, EN, shown)
    assert plan.expected == "solocard-demo-1-00aa11bb22cc"
    assert [label for label, _ in plan.rows] == [EN.change_from, EN.change_to, EN.command_label, EN.undo_label]
    before, after, command, undo = (text for _, text in plan.rows)
    assert before.startswith("solocard-demo-3-0123456789ab, version 1.2.0")
    assert after.startswith("solocard-demo-1-00aa11bb22cc, version 1.0.0")
    assert command == "solocard activate solocard-demo-1-00aa11bb22cc"
    assert undo == "solocard rollback"
    assert EN.older_release.format(new=1, old=3) in plan.warnings


def test_rolling_back_runs_rollback_and_asks_for_the_previous_id() -> None:
    bundles = read_bundles({"bundles": BUNDLES})
    assert bundles.previous is not None
    plan = rollback(bundles.previous, bundles.current, EN, shown)
    assert (plan.arguments, plan.expected) == (("rollback",), "solocard-demo-2-fedcba987654")


def test_the_first_activation_has_no_undo() -> None:
    bundles = read_bundles({"bundles": [{**BUNDLES[0], "current": False}]})
    plan = activation(bundles.rows[0], None, EN, shown)
    assert dict(plan.rows)[EN.change_from] == EN.change_nothing
    assert dict(plan.rows)[EN.undo_label] == EN.undo_none
