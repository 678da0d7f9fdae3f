from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ui.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
LOADED = """
import sys
sys.argv = ["solocard-console", "--help"]
from ui.__main__ import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = ("textual", "rich", "numpy", "torch", "onnxruntime", "runtime", "exporter")
print("loaded:", sorted(m for m in heavy if m in sys.modules))
"""
ALLOWED = {"appliance", "appliance.errors", "appliance.wire", "appliance.config"}
APP = """
import sys
import ui.app, ui.__main__
print(sorted(m for m in sys.modules if m.split(".")[0] in ("appliance", "runtime", "exporter", "numpy", "torch")))
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_help_is_short_and_loads_no_textual() -> None:
    printed = python(LOADED)
    assert printed.rstrip().endswith("loaded: []")
    assert "--replay FILE.jsonl" in printed
    assert "solocard ... --json" in printed


def test_the_console_takes_only_its_three_modules_from_the_appliance() -> None:
    loaded = set(eval(python(APP)))  # noqa: S307  a list our own process printed
    assert loaded <= ALLOWED


def test_without_a_terminal_it_is_one_line(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert main(["--home", str(home)]) == 2
    assert capsys.readouterr().err == (
        "solocard-console: the console needs a terminal; the same actions are commands: solocard --help\n"
    )


def test_a_bad_recording_is_one_line(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert main(["--home", str(home), "--replay", str(home / "none")]) == 2
    assert "cannot be read as a recording" in capsys.readouterr().err


def test_textual_missing_is_one_line(home: Path, tmp_path: Path) -> None:
    (tmp_path / "textual.py").write_text("raise ModuleNotFoundError('no', name='textual')")
    code = f"import pty, sys; pty.spawn([sys.executable, '-m', 'ui', '--home', {str(home)!r}])"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "textual is not installed; install solocard with its extra: console" in done.stdout
