from __future__ import annotations

from pathlib import Path

import pytest
from ui_support import BUNDLES, FakeSolocard

from appliance.config import home as usual_home
from appliance.wire import Progress
from ui import command
from ui.command import Command, CommandError, Outcome, read_progress


def run(home: Path, *arguments: str) -> tuple[Outcome, list[Progress]]:
    steps: list[Progress] = []
    outcome = command.run(Command(arguments, home), steps.append)
    return outcome, steps


def test_progress_comes_line_by_line(home: Path, solocard: FakeSolocard) -> None:
    outcome, steps = run(home, "rollback")
    assert [step.step for step in steps] == ["check", "trial", "rollback"]
    assert steps[0].total_bytes == 11_744_051
    assert outcome.ok
    assert outcome.message == f"{BUNDLES[1]['bundle_id']} is current; no server is running"
    assert solocard.calls == [["rollback"]]


def test_a_failure_shows_what_the_command_said(home: Path, solocard: FakeSolocard) -> None:
    solocard.fail_with("another installation is running; wait for it", 7)
    outcome, steps = run(home, "rollback")
    assert not outcome.ok
    assert (outcome.exit_code, len(steps)) == (7, 1)
    assert outcome.message == "another installation is running; wait for it"
    assert outcome.error == "solocard: another installation is running; wait for it"


def test_exit_0_without_a_last_line_is_not_success(home: Path, solocard: FakeSolocard) -> None:
    solocard.program.write_text('#!/bin/sh\necho \'{"step": "copy", "message": "half"}\'\n')
    outcome, _ = run(home, "rollback")
    assert outcome.exit_code == 0
    assert not outcome.ok


def test_a_line_that_is_no_json_is_shown_as_it_is(home: Path, solocard: FakeSolocard) -> None:
    solocard.program.write_text("#!/bin/sh\necho hello\necho '[1]'\n")
    _, steps = run(home, "list")
    assert [step.message for step in steps] == ["hello", "[1]"]


def test_endless_output_is_refused_once_the_child_has_ended(
    home: Path, solocard: FakeSolocard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MAX_OUTPUT_BYTES", 1000)
    solocard.program.write_text("#!/bin/sh\nhead -c 300000 /dev/zero\necho done >> ${0}.ended\n")
    with pytest.raises(CommandError, match="more than 1000 bytes"):
        run(home, "list")
    assert solocard.program.with_suffix(".ended").exists()


def test_a_missing_program_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.setattr(command.sys, "executable", str(home / "python"))
    with pytest.raises(CommandError, match="neither on PATH nor at"):
        run(home, "list")


def test_a_program_that_cannot_start_is_one_line(home: Path, solocard: FakeSolocard) -> None:
    solocard.program.write_text("#!/no/such/interpreter\n")
    with pytest.raises(CommandError, match="cannot be started"):
        run(home, "list")


def test_the_program_beside_the_interpreter_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "solocard").touch()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(command.sys, "executable", str(home / "python"))
    assert command.executable() == str(home / "solocard")


def test_the_shown_line_works_in_any_shell_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLOCARD_HOME", "/srv/x")
    assert Command(("activate", "a b"), Path("/srv/x")).shown == "solocard --home /srv/x activate 'a b' --json"
    monkeypatch.delenv("SOLOCARD_HOME")
    assert Command(("rollback",), Path("/srv/x")).shown == "solocard --home /srv/x rollback --json"
    assert Command(("rollback",), usual_home()).shown == "solocard rollback --json"


def test_fields_of_another_type_fall_back_to_their_defaults() -> None:
    line = '{"step": 3, "message": "m", "done_bytes": "x", "elapsed_s": 2, "data": {"a": 1}, "new": 1}'
    progress = read_progress(line)
    assert progress == Progress(step="", message="m", elapsed_s=2, data={"a": 1})
