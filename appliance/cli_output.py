"""What a command says: results on stdout, narration on stderr; with ``--json`` only Progress lines, on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from appliance.errors import SolocardError
from appliance.journal import readable
from appliance.wire import Progress


class Output:
    """One command's mouth."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._open_line = False  # a progress line on a terminal waits to be overwritten

    def progress(self, progress: Progress) -> None:
        """A step, or how far it is."""
        if self.as_json:
            self._line(progress)
            return
        text = f"{progress.step}: {progress.message}"
        if progress.total_bytes:
            share = 100 * progress.done_bytes // progress.total_bytes
            sizes = f"{size(progress.done_bytes)} of {size(progress.total_bytes)}"
            text += f" ({sizes}, {share} %, {progress.elapsed_s:.0f} s)"
        unfinished = progress.done_bytes < progress.total_bytes
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="" if unfinished else "\n", file=sys.stderr, flush=True)
            self._open_line = unfinished
        else:
            print(text, file=sys.stderr, flush=True)

    def result(self, step: str, lines: list[str], data: dict[str, Any], *, ok: bool = True) -> None:
        """The end of a command that did its work: ``lines`` for a person, ``data`` for a program.

        ``ok`` is False where what it found is bad; the exit code says so too.
        """
        if self.as_json:
            self._line(Progress(step, lines[0] if lines else "", done=True, ok=ok, data=data))
        else:
            self._close_line()
            print(readable("\n".join(lines)))

    def error(self, error: SolocardError) -> None:
        """The end of a command that did not."""
        if self.as_json:
            data = {"error": type(error).__name__, "exit_code": error.exit_code}
            self._line(Progress("error", str(error), done=True, ok=False, data=data))
        self._close_line()
        print(readable(f"solocard: {error}"), file=sys.stderr)

    def _close_line(self) -> None:
        if self._open_line:
            print(file=sys.stderr)
            self._open_line = False

    def _line(self, progress: Progress) -> None:
        print(json.dumps(readable(progress.to_dict()), ensure_ascii=False), flush=True)


def counted(count: int, noun: str) -> str:
    """``1 block``, ``1,204 blocks``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(size_bytes: int) -> str:
    """A size for a person: bytes below 10 KiB, then KiB, MiB, GiB."""
    if size_bytes < 10 << 10:
        return f"{size_bytes:,} B"
    for shift, unit in ((10, "KiB"), (20, "MiB")):
        if size_bytes < 10 << (shift + 10):
            return f"{size_bytes / (1 << shift):,.1f} {unit}"
    return f"{size_bytes / (1 << 30):,.1f} GiB"
