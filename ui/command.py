"""Acting: the console runs ``solocard … --json`` as a child process and reads its progress lines.

The command a person sees is the command that runs; the same line typed in a shell does the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import SolocardError
from appliance.wire import Progress

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
PROGRAM = "solocard"


class CommandError(SolocardError):
    """The child process could not be started or its output could not be read."""


@dataclass(frozen=True, slots=True)
class Command:
    """``solocard`` with ``arguments``, on the appliance at ``home``."""

    arguments: tuple[str, ...]
    home: Path

    @property
    def shown(self) -> str:
        """The line a person can type; SOLOCARD_HOME is part of it unless the person's shell has it already."""
        line = shlex.join((PROGRAM, *self.arguments, "--json"))
        if os.environ.get("SOLOCARD_HOME") == str(self.home):
            return line
        return f"SOLOCARD_HOME={shlex.quote(str(self.home))} {line}"


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
        """One line for a person."""
        if self.error and not self.ok:
            return self.error.splitlines()[-1]
        if self.last is not None and self.last.message:
            return self.last.message
        return f"{PROGRAM} ended with exit code {self.exit_code}"


async def run(command: Command, on_progress: Callable[[Progress], None]) -> Outcome:
    """Run ``command`` to its end; ``on_progress`` gets each line as it comes. Raises CommandError.

    The child has a session of its own: a dropped SSH line does not interrupt it.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            executable(), *command.arguments, "--json",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "SOLOCARD_HOME": str(command.home)}, start_new_session=True, limit=MAX_LINE_BYTES,
        )
    except OSError as error:
        raise CommandError(f"{PROGRAM} cannot be started: {error}") from error
    if child.stdout is None or child.stderr is None:
        raise CommandError(f"{PROGRAM} was started without pipes")
    errors = asyncio.ensure_future(_tail(child.stderr))
    try:
        last = await _read_progress(child.stdout, on_progress)
    finally:
        await _tail(child.stdout)  # a child must never wait for a reader that gave up
        error_text = await errors
        exit_code = await child.wait()
    return Outcome(exit_code, last, error_text.strip())


def executable() -> str:
    """``solocard`` on PATH, else the one beside this interpreter. Raises CommandError where there is none."""
    found = shutil.which(PROGRAM)
    beside = Path(sys.executable).parent / PROGRAM
    if found is None and beside.is_file():
        return str(beside)
    if found is None:
        raise CommandError(f"{PROGRAM} is neither on PATH nor at {beside}; install it or set PATH")
    return found


async def _read_progress(
    stream: asyncio.StreamReader, on_progress: Callable[[Progress], None]
) -> Progress | None:
    last = None
    try:
        async for line in stream:
            if text := line.decode(errors="replace").strip():
                last = read_progress(text)
                on_progress(last)
    except ValueError as error:  # a line over the limit
        raise CommandError(f"{PROGRAM} printed a line longer than {MAX_LINE_BYTES} bytes") from error
    return last


async def _tail(stream: asyncio.StreamReader) -> str:
    kept = b""
    while part := await stream.read(MAX_ERROR_BYTES):
        kept = (kept + part)[-MAX_ERROR_BYTES:]
    return kept.decode(errors="replace")


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
