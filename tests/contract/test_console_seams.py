"""The console against the real server and the real command: both sides of each seam in one test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bundle_support import Desk, Machine
from serve_live import BUNDLE_ID, live
from serve_support import FakeEngine, FakeKv
from ui_support import short_home

from appliance.wire import ADMIN_SOCKET, Progress
from ui import command
from ui.backend import ServerDownError, SocketBackend
from ui.bundles import read_bundles
from ui.command import Command
from ui.widgets.logtail import MAX_LINES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def solocard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ``solocard`` of this checkout, first on PATH."""
    program = tmp_path / "bin" / "solocard"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable} -P\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from appliance.cli import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("SOLOCARD_HOME", raising=False)


def run(home: Path, *arguments: str) -> tuple[command.Outcome, list[Progress]]:
    steps: list[Progress] = []
    return command.run(Command(arguments, home), steps.append), steps


def test_the_console_reads_the_real_server() -> None:
    with short_home() as home:
        backend = SocketBackend(home / ADMIN_SOCKET)
        with live(home, FakeEngine(), FakeKv()) as server:
            server.chat(max_tokens=5)
            status = backend.status()
            assert (status.state, status.bundle_id, status.notes) == ("ready", BUNDLE_ID, ("unverified on hardware",))
            assert status.kv.enabled
            assert backend.log(MAX_LINES)
        with pytest.raises(ServerDownError):
            backend.status()


@pytest.mark.usefixtures("solocard")
def test_the_console_reads_the_real_list(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "desk")
    machine = Machine(tmp_path / "home", desk.root)
    for counter in (1, 2, 3):
        machine.install(desk.release(counter))
    outcome, _ = run(machine.home, "list")
    assert outcome.ok, outcome.message
    bundles = read_bundles(outcome.last.data if outcome.last else {})
    assert [row.release_counter for row in bundles.rows] == [3, 2, 1]
    assert bundles.current is bundles.rows[0]
    assert bundles.previous is bundles.rows[1]
    assert bundles.current.bundle_id == machine.state.current


@pytest.mark.usefixtures("solocard")
def test_a_refusal_of_the_real_command_is_one_sentence_and_changes_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "desk")
    machine = Machine(tmp_path / "home", desk.root)
    for counter in (1, 2):
        machine.install(desk.release(counter))
    before = machine.state
    outcome, steps = run(machine.home, "rollback")  # these toy bundles hold no graph: the trial must fail
    assert not outcome.ok
    assert outcome.exit_code == 9, outcome
    assert "trial" in {step.step for step in steps}
    assert "the trial of sample-1-" in outcome.message
    assert machine.state == before
    outcome, _ = run(machine.home, "activate", "no-such-bundle")
    assert outcome.exit_code != 0
    assert "no-such-bundle" in outcome.message


@pytest.mark.usefixtures("solocard")
def test_an_empty_appliance_is_an_empty_list(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "list")
    assert outcome.ok, outcome.message
    assert read_bundles(outcome.last.data if outcome.last else {}).rows == ()
