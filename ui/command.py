"""Acting: the console runs ``solocard … --json`` as a child process and reads its progress lines.

The line a person sees is the line that runs. The child writes into an unlinked file, not a pipe, and has a session of
its own: when the console's SSH line drops, the command goes on to its end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from appliance.config import home as usual_home
from appliance.errors import SolocardError
from appliance.wire import Progress

PROGRAM = "solocard"
MAX_OUTPUT_BYTES = 16 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
LOOK_S = 0.03  # between two looks at the child's output


class CommandError(SolocardError):
    """The child process could not be started or its output could not be read."""


@dataclass(frozen=True, slots=True)
class Command:
    """``solocard`` with ``arguments``, on the appliance at ``home``."""

    arguments: tuple[str, ...]
    home: Path

    @property
    def words(self) -> tuple[str, ...]:
        """What follows ``solocard``; the home is named unless it is the one every shell of this user would choose."""
        everywhere = "SOLOCARD_HOME" not in os.environ and self.home == usual_home()
        return (*(() if everywhere else ("--home", str(self.home))), *self.arguments)

    @property
    def shown(self) -> str:
        """The line that runs, as a person would type it."""
        return f"{self.line} --json"

    @property
    def line(self) -> str:
        """As ``shown``, for a person who wants words instead of JSON."""
        return shlex.join((PROGRAM, *self.words))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended: ``last`` is its final progress line, ``error`` what it said on stderr."""

    exit_code: int
    last: Progress | None = None
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and self.last is not None and self.last.done and self.last.ok

    @property
    def message(self) -> str:
        """One line for a person: the last line's message, and what became of the server; else what stderr said."""
        if self.last is not None and self.last.done and self.last.message:
            restart = self.last.data.get("restart")
            more = restart.get("message") if isinstance(restart, dict) else None
            return f"{self.last.message}; {more}" if more else self.last.message
        if self.error:
            return self.error.splitlines()[-1]
        return f"{PROGRAM} ended with exit code {self.exit_code} and said nothing"


def run(
    command: Command, on_progress: Callable[[Progress], None], stop: threading.Event | None = None
) -> Outcome:  # fmt: skip
    """Run ``command`` to its end, in this thread; ``on_progress`` gets each line as it comes. Raises CommandError.

    Once ``stop`` is set the command and its children are interrupted.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                (executable(), *command.words, "--json"), stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise CommandError(f"{PROGRAM} cannot be started: {error}") from error
        last = None
        for line in _lines(child, output, stop or threading.Event()):
            last = read_progress(line)
            on_progress(last)
        size_bytes = os.fstat(errors.fileno()).st_size
        said = os.pread(errors.fileno(), MAX_ERROR_BYTES, max(size_bytes - MAX_ERROR_BYTES, 0))
    return Outcome(child.returncode, last, said.decode(errors="replace").strip())


def executable() -> str:
    """``solocard`` on PATH, else the one beside this interpreter. Raises CommandError where there is none."""
    found = shutil.which(PROGRAM)
    beside = Path(sys.executable).parent / PROGRAM
    if found is None and beside.is_file():
        return str(beside)
    if found is None:
        raise CommandError(f"{PROGRAM} is neither on PATH nor at {beside}; install it or set PATH")
    return found


def _lines(child: subprocess.Popen[bytes], output: IO[bytes], stop: threading.Event) -> Iterator[str]:
    """Lines of ``output`` until ``child`` has ended; the child is always waited for."""
    kept, read_bytes, ended, stopped = b"", 0, False, False
    while not ended:
        if stop.is_set() and not stopped:
            stopped = True
            os.killpg(child.pid, signal.SIGINT)  # it leads a process group of its own and is not waited for yet
        ended = child.poll() is not None
        while part := os.pread(output.fileno(), MAX_ERROR_BYTES, read_bytes):  # by offset: the child shares the file
            read_bytes += len(part)
            if read_bytes > MAX_OUTPUT_BYTES:
                child.wait()
                raise CommandError(f"{PROGRAM} printed more than {MAX_OUTPUT_BYTES} bytes")
            *whole, kept = (kept + part).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole if line.strip())
        if not ended:
            time.sleep(LOOK_S)
    if kept.strip():
        yield kept.decode(errors="replace")


def read_progress(text: str) -> Progress:
    """One line of output; a line that is not a Progress object becomes the message of one."""
    try:
        raw = json.loads(text)
    except ValueError:
        raw = None
    template = Progress(step="", message=text)
    if not isinstance(raw, dict):
        return template
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Progress):
        default = getattr(template, field.name) if field.name != "message" else ""
        wanted = (int, float) if isinstance(default, float) else type(default)
        values[field.name] = raw[field.name] if isinstance(raw.get(field.name), wanted) else default
    return Progress(**values)
