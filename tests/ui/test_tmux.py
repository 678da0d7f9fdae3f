"""The console as a person runs it: ``python -m ui`` in a real terminal, driven and read through tmux."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ui_support import FakeAdmin, FakeSolocard

ROOT = Path(__file__).resolve().parents[2]
SECOND = "solocard-demo-2-fedcba987654"
# Where CI is set nothing is skipped: without tmux the tests fail there, so that somebody has looked at a terminal.
pytestmark = pytest.mark.skipif(
    shutil.which("tmux") is None and not os.environ.get("CI"), reason="tmux is not installed"
)


class Terminal:
    """One tmux server of its own with one 80x24 window."""

    def __init__(self, folder: Path) -> None:
        self.socket = str(folder / "tmux.sock")

    def tmux(self, *words: str) -> str:
        done = subprocess.run(("tmux", "-S", self.socket, "-f", "/dev/null", *words), capture_output=True, text=True,
                              check=True)  # fmt: skip
        return done.stdout

    def start(self, program: str, environ: dict[str, str], columns: int = 80, rows: int = 24) -> None:
        named = [word for name, value in environ.items() for word in ("-e", f"{name}={value}")]
        self.tmux("new-session", "-d", "-x", str(columns), "-y", str(rows), *named, program,
                  ";", "set", "status", "off")  # fmt: skip

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def until(self, wanted: str, timeout_s: float = 20.0) -> str:
        """The screen once it shows ``wanted``."""
        deadline, shown = time.monotonic() + timeout_s, ""
        while time.monotonic() < deadline:
            shown = self.tmux("capture-pane", "-p")
            if wanted in shown:
                return shown
            time.sleep(0.05)
        raise AssertionError(f"waited {timeout_s} s in vain for {wanted!r}:\n{shown}")


@pytest.fixture
def terminal(home: Path) -> Iterator[Terminal]:
    made = Terminal(home)
    yield made
    subprocess.run(("tmux", "-S", made.socket, "kill-server"), check=False, capture_output=True)


def console_command(home: Path, *more: str) -> str:
    return shlex.join((sys.executable, "-m", "ui", "--home", str(home), *more)) + "; echo left with $?; sleep 60"


def environ(**more: str) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **more}


def test_a_real_terminal_too_small_says_so_and_q_leaves(home: Path, terminal: Terminal) -> None:
    terminal.start(console_command(home), environ(), columns=70, rows=20)
    terminal.until("terminal too small: need 80x24, have 70x20")
    terminal.press("q")
    terminal.until("left with 0")


@pytest.mark.slow
def test_watch_filter_roll_back_and_leave(
    home: Path, terminal: Terminal, admin: FakeAdmin, solocard: FakeSolocard
) -> None:
    admin.lines = [f"INFO request {n}" for n in range(30)]
    terminal.start(console_command(home), environ())
    shown = terminal.until("ready")
    assert "17.2 tok/s" in shown
    assert "█" in shown
    terminal.press("F3")
    terminal.until("request 29")
    terminal.press("/")
    terminal.until("filter:")
    terminal.press("1", "7", "Enter")
    assert "request 29" not in terminal.until('1 of 30 lines contain "17"')
    terminal.press("F2")
    terminal.until("in service")
    terminal.press("b")
    terminal.until("[>Cancel<]")
    terminal.press("Tab")
    terminal.until("[ Cancel ]")
    terminal.press(SECOND)
    terminal.until("That matches.")
    terminal.press("Enter")
    terminal.until("[>Roll back<]")
    terminal.press("Enter")
    terminal.until(f"done: {SECOND} is current")
    assert solocard.calls == [["rollback"]]
    terminal.press("q")
    terminal.until("left with 0")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"TERM": "linux"}, {"TERM": "vt100"}, {"NO_COLOR": "1"}])
def test_plain_terminals(home: Path, terminal: Terminal, admin: FakeAdmin, more: dict[str, str]) -> None:
    settings = " ".join(f"{name}={value}" for name, value in more.items())
    terminal.start(f"env {settings} {console_command(home)}", environ())
    shown = terminal.until("ready")
    assert "TERM" not in more or shown.isascii()
    colours = terminal.tmux("capture-pane", "-p", "-e")
    assert "38;2;" not in colours
    assert "48;2;" not in colours
    terminal.press("F2")
    terminal.until("Installed bundles")
    terminal.press("q")
    terminal.until("left with 0")
