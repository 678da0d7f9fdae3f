"""The ``solocard`` command as a person and as a program use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from bundle_support import Desk, Machine

from appliance import cli, cli_admin
from appliance.cli import build_parser, main
from appliance.journal import Journal
from appliance.trial import child_command, child_environment, run_trial
from appliance.wire import Progress


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path / "desk")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLOCARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def golden_trial(monkeypatch):
    """The trial of the real command, replaced through Python; the command line has no such switch."""
    monkeypatch.setattr("appliance.install.run_trial", lambda *_: "1 golden, 1 token: all as recorded")


def lines(text: str) -> list[Progress]:
    return [Progress(**json.loads(line)) for line in text.splitlines()]


def test_first_day(desk, home, golden_trial, capsys):
    stick = desk.release(1)
    assert main(["install", str(stick)]) == 5
    assert "solocard trust add" in capsys.readouterr().err
    assert main(["trust", "add", str(desk.keys / "root.json"), "--yes"]) == 0
    assert desk.root.fingerprint in capsys.readouterr().out
    assert main(["install", str(stick)]) == 0
    shown = capsys.readouterr()
    assert "is current" in shown.out
    assert "no server is running" in shown.out
    assert "copy: " in shown.err
    assert main(["install", str(desk.release(2))]) == 0
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["current", "previous"]
    assert main(["verify", "--full"]) == 0
    assert "every byte" in capsys.readouterr().out
    assert main(["rollback"]) == 0
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "server:    down" in out
    assert "sample-1-" in out.split("current:")[1].splitlines()[0]


def test_json_is_progress_lines_and_the_last_is_done(desk, home, golden_trial, capsys):
    main(["trust", "add", str(desk.keys / "root.json"), "--yes"])
    capsys.readouterr()
    assert main(["install", str(desk.release(1)), "--json"]) == 0
    shown = capsys.readouterr()
    progress = lines(shown.out)
    assert shown.err == ""
    assert [p.done for p in progress] == [False] * (len(progress) - 1) + [True]
    assert progress[-1].data["changed"] is True
    assert progress[-1].data["bundle_id"].startswith("sample-1-")
    for command in (["list"], ["status"], ["verify"], ["key", "list"], ["config", "show"]):
        assert main([*command, "--json"]) == 0
        (line,) = lines(capsys.readouterr().out)
        assert line.done
        assert line.ok
        assert line.data
    assert main(["list", "--json"]) == 0
    (row,) = lines(capsys.readouterr().out)[0].data["bundles"]
    assert set(row) == {
        "bundle_id", "name", "version", "release_counter", "size_bytes", "profiles", "current", "previous", "trial",
    }  # fmt: skip
    assert (row["current"], row["previous"]) == (True, False)


def test_json_errors_say_what_and_how(home, capsys):
    assert main(["rollback", "--json"]) == 6
    shown = capsys.readouterr()
    last = lines(shown.out)[-1]
    assert (last.done, last.ok, last.data) == (True, False, {"error": "StoreError", "exit_code": 6})
    assert shown.err == f"solocard: {last.message}\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["install", "/nonexistent"], 2), (["verify"], 6), (["verify", "nonsense"], 6), (["activate", "x"], 6),
        (["remove", "x"], 6), (["trust", "add", "/nonexistent/root.json"], 4), (["key", "revoke", "x"], 2),
        (["key", "new", "../x"], 2),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_the_class_exit_code(home, command, code, capsys):
    assert main(command) == code
    err = capsys.readouterr().err
    assert err.startswith("solocard: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["install", "."], ["key", "new", "app"], ["list"], ["status"], ["config", "show"]])
def test_a_home_that_cannot_be_is_one_line_too(tmp_path, command, capsys):
    (tmp_path / "file").write_text("not a folder")
    code = main(["--home", str(tmp_path / "file" / "home"), *command])
    shown = capsys.readouterr()
    assert code in (0, 2, 6)
    assert (code == 0) == (shown.err == "")
    assert code == 0 or (shown.err.startswith("solocard: ") and shown.err.count("\n") == 1)


def test_trust_add_asks_a_person(desk, home, monkeypatch, capsys):
    command = ["trust", "add", str(desk.keys / "root.json")]
    assert main(command) == 2
    assert "--yes" in capsys.readouterr().err

    class Terminal:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return self.answer

    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert main(command) == 2
    assert not list((home / "trust").glob("*.json")) if home.exists() else True
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    assert main(command) == 0
    assert desk.root.fingerprint in capsys.readouterr().err
    assert main(command) == 0
    assert "trusted already" in capsys.readouterr().out


def test_keys_by_command(home, capsys):
    assert main(["key", "new", "my-app"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("sk-solo-")
    assert shown.out.count("\n") == 1
    assert main(["key", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("my-app")
    assert shown.out.strip() not in listed
    assert main(["key", "revoke", "my-app"]) == 0
    assert main(["key", "list"]) == 0
    assert "no API keys" in capsys.readouterr().out


def test_config_show_can_be_read_back_as_a_config_file(home, capsys):
    home.mkdir()
    (home / "config.yaml").write_text("server:\n  port: 9001\n")
    assert main(["config", "show"]) == 0
    text = capsys.readouterr().out
    assert "port: 9001" in text
    assert "# config.yaml" in text
    (home / "config.yaml").write_text(text)
    assert main(["config", "show"]) == 0
    (home / "config.yaml").write_text("server:\n  prot: 9001\n")
    capsys.readouterr()
    assert main(["config", "show"]) == 2
    assert "unknown key server.prot" in capsys.readouterr().err


def test_every_command_has_help(home, capsys):
    parser = build_parser()
    commands = parser._subparsers._group_actions[0].choices
    assert set(commands) == {
        "install", "rollback", "activate", "list", "verify", "remove", "status", "trust", "key", "kv", "config",
        "serve", "console",
    }  # fmt: skip
    for name in commands:
        if name not in ("serve", "console"):
            with pytest.raises(SystemExit) as ended:
                main([name, "--help"])
            assert ended.value.code == 0
            assert "usage: solocard" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "first day:" in capsys.readouterr().out


def test_serve_and_console_become_their_commands(home, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(cli_admin.os, "execve", lambda path, command, env: ran.append((command, env["SOLOCARD_HOME"])))
    monkeypatch.setattr(cli_admin.sys, "executable", str(tmp_path / "python"))
    main(["serve", "--port", "1"])
    main(["console", "--help"])
    (tmp_path / "solocard-serve").touch()
    main(["serve"])
    assert [command for command, _ in ran] == [
        [str(tmp_path / "python"), "-P", "-m", "runtime", "serve", "--port", "1"],
        [str(tmp_path / "python"), "-P", "-m", "ui", "--help"],
        [str(tmp_path / "solocard-serve")],
    ]
    assert {where for _, where in ran} == {str(home)}


def test_the_command_needs_no_numeric_or_screen_library(home):
    code = (
        "import sys; from appliance import cli; cli.build_parser();"
        "print([m for m in ('numpy','onnx','onnxruntime','torch','textual','starlette') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(home), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_as_a_process(home):
    done = subprocess.run(
        child_command("appliance.cli", "--home", str(home), "status"), env=child_environment(home),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert f"home:      {home}" in done.stdout
    assert not home.exists()


def test_the_trial_runs_the_runtime_and_tells_why_it_failed(desk, tmp_path):
    """The synthetic graph is no graph, so the real trial must fail, whatever runtime is installed."""
    from appliance.errors import TrialError

    machine = Machine(tmp_path / "home", desk.root)
    bundle_id = machine.install(desk.release(1)).bundle_id
    with pytest.raises(TrialError, match=f"the trial of {bundle_id} failed"):
        run_trial(machine.home, bundle_id, 60)


def test_an_interrupted_command_says_how_to_go_on(home, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.cli_models, "status", interrupted)
    assert main(["status"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_file_names_that_are_no_utf8(desk, home, golden_trial, capsys):
    """A stick's file system may hold any bytes: they are shown as escapes, in the journal and on stdout."""
    main(["trust", "add", str(desk.keys / "root.json"), "--yes"])
    stick = desk.release(1).rename(desk.folder / os.fsdecode(b"st\xffick"))
    (stick / os.fsdecode(b"extra\xfe.txt")).write_text("x")
    capsys.readouterr()
    assert main(["install", str(stick), "--json"]) == 0
    assert lines(capsys.readouterr().out)[-1].data["unlisted"] == ["extra\\udcfe.txt"]
    assert main(["install", str(stick)]) == 0
    assert "extra\\udcfe.txt" in capsys.readouterr().out
    assert main(["install", str(desk.folder / os.fsdecode(b"none\xff")), "--json"]) == 2
    assert "none\\udcff is not a directory" in lines(capsys.readouterr().out)[-1].message
    assert "st\\udcffick" in next(record["source"] for record in Journal(home).read() if "source" in record)


def test_trust_add_after_a_power_cut_in_its_first_write(desk, home, capsys):
    (home / "trust").mkdir(parents=True)
    (home / "trust" / "floors.a.json.partial").write_bytes(b"")
    assert main(["trust", "add", str(desk.keys / "root.json"), "--yes"]) == 0, capsys.readouterr().err


def test_a_bundle_with_a_damaged_list_can_be_removed(desk, home, golden_trial, capsys):
    main(["trust", "add", str(desk.keys / "root.json"), "--yes"])
    for counter in (1, 2, 3):
        assert main(["install", str(desk.release(counter))]) == 0
    oldest = next(path for path in (home / "models").glob("*.manifest.json") if path.name.startswith("sample-1-"))
    oldest.unlink()
    oldest.write_bytes(b"{")
    assert main(["remove", oldest.name.removesuffix(".manifest.json")]) == 0, capsys.readouterr().err
    assert main(["verify", "--full"]) == 0  # what the others list is still there
    assert main(["rollback"]) == 0
