"""``python -m runtime kv …`` as a child process: its progress passed on, its last line's data, its errors as ours."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from appliance import errors
from appliance.errors import SolocardError
from appliance.trial import child_command, child_environment
from appliance.wire import Progress

MAX_ERROR_BYTES = 64 << 10
_BY_EXIT_CODE = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SolocardError) and kind is not errors.RequestError
}


def run_kv(home: Path, words: Sequence[str], report: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
    """The data of the child's last line; ``report`` gets the lines before it.

    Raises the error that the child ended with, by its exit code.
    """
    last: Progress | None = None
    with tempfile.TemporaryFile() as said:
        command = child_command("runtime", "kv", *words)
        with subprocess.Popen(command, env=child_environment(home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=said) as child:  # fmt: skip
            assert child.stdout is not None  # noqa: S101 - for the type checker: PIPE was asked for
            for line in child.stdout:
                if last is not None:
                    report(last)
                last = _progress(line)
        said.seek(0)
        errors_said = said.read(MAX_ERROR_BYTES).decode(errors="replace").strip()
    if child.returncode == 0 and last is not None and last.done:
        return last.data
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    silent = f"python -m runtime kv {words[0]} ended with {how}, saying nothing"
    raise _BY_EXIT_CODE.get(child.returncode, SolocardError)(errors_said.removeprefix("solocard: ") or silent)


def _progress(line: bytes) -> Progress:
    try:
        return Progress(**json.loads(line))
    except (ValueError, TypeError):
        text = line.decode(errors="replace").strip()
        raise SolocardError(f"python -m runtime kv printed {text[:200]!r}, not a progress line") from None
