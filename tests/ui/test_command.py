from __future__ import annotations

from pathlib import Path

import pytest

from appliance.wire import Progress
from ui import command
from ui.command import Command, CommandError, Outcome, read_progress
from ui_support import BUNDLES, FakeSolocard


async def run(home: Path, *arguments: str) -> tuple[Outcome, list[Progress]]:
    steps: list[Progress] = []
    outcome = await command.run(Command(arguments, home), steps.append)
    return outcome, steps


async def test_progress_comes_line_by_line(home: Path, solocard: FakeSolocard) -> None:
    outcome, steps = await run(home, "rollback")
    assert [step.step for step in steps] == ["check", "trial", "done"]
    assert steps[0].total_bytes == 11_744_051
    assert outcome.ok
    assert outcome.message == f"in service: {BUNDLES[1]['bundle_id']}"
    assert solocard.calls == [["rollback"]]


async def test_a_failure_shows_what_the_command_said(home: Path, solocard: FakeSolocard) -> None:
    solocard.fail_with("solocard: another installation is running; wait for it", 7)
    outcome, steps = await run(home, "rollback")
    assert not outcome.ok
    assert (outcome.exit_code, steps) == (7, [])
    assert outcome.message == "solocard: another installation is running; wait for it"


async def test_exit_0_without_a_last_line_is_not_success(home: Path, solocard: FakeSolocard) -> None:
    solocard.program.write_text("#!/bin/sh\necho '{\"step\": \"copy\", \"message\": \"half\"}'\n")
    outcome, _ = await run(home, "rollback")
    assert outcome.exit_code == 0
    assert not outcome.ok


async def test_a_line_that_is_no_json_is_shown_as_it_is(home: Path, solocard: FakeSolocard) -> None:
    solocard.program.write_text("#!/bin/sh\necho hello\necho '[1]'\n")
    _, steps = await run(home, "list")
    assert [step.message for step in steps] == ["hello", "[1]"]


async def test_an_endless_line_is_refused_and_the_child_ends(
    home: Path, solocard: FakeSolocard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MAX_LINE_BYTES", 1000)
    solocard.program.write_text("#!/bin/sh\nhead -c 300000 /dev/zero\n")
    with pytest.raises(CommandError, match="longer than 1000 bytes"):
        await run(home, "list")


async def test_a_missing_program_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr(command.sys, "executable", str(home / "python"))
    with pytest.raises(CommandError, match="neither on PATH nor at"):
        await run(home, "list")


async def test_a_program_that_cannot_start_is_one_line(home: Path, solocard: FakeSolocard) -> None:
    solocard.program.write_text("#!/no/such/interpreter\n")
    with pytest.raises(CommandError, match="cannot be started"):
        await run(home, "list")


def test_the_program_beside_the_interpreter_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "solocard").touch()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(command.sys, "executable", str(home / "python"))
    assert command.executable() == str(home / "solocard")


def test_the_shown_line_names_the_home_only_where_the_shell_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Command(("activate", "a b"), Path("/srv/x"))
    monkeypatch.delenv("SOLOCARD_HOME", raising=False)
    assert wanted.shown == "SOLOCARD_HOME=/srv/x solocard activate 'a b' --json"
    monkeypatch.setenv("SOLOCARD_HOME", "/srv/x")
    assert wanted.shown == "solocard activate 'a b' --json"


def test_fields_of_another_type_fall_back_to_their_defaults() -> None:
    progress = read_progress('{"step": 3, "message": "m", "done_bytes": "x", "elapsed_s": 2, "data": {"a": 1}, "new": 1}')
    assert progress == Progress(step="", message="m", elapsed_s=2, data={"a": 1})
