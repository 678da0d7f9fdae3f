"""The trial of a new bundle: a child process answers its golden prompts before anything is switched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from appliance.errors import TrialError

OUTPUT_CHARS = 2000
Trial = Callable[[Path, str, int], str]  # (home, bundle_id, timeout_s) -> what it printed; raises TrialError


def run_trial(home: Path, bundle_id: str, timeout_s: int) -> str:
    """``python -m runtime trial BUNDLE_ID``: exit 0 means every golden token came out. TrialError tells why not."""
    command = child_command("runtime", "trial", bundle_id)
    try:
        done = subprocess.run(
            command, env=child_environment(home), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TrialError(
            f"the trial of {bundle_id} did not end within {timeout_s} s (install.trial_timeout_s)"
        ) from None
    printed = done.stdout.decode("utf-8", "replace").strip()[-OUTPUT_CHARS:]
    if done.returncode != 0:
        errors = done.stderr.decode("utf-8", "replace").strip()[-OUTPUT_CHARS:].removeprefix("solocard: ")
        said = errors or printed or "it printed nothing"
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise TrialError(f"the trial of {bundle_id} failed ({how}): {said}")
    return printed


def child_command(module: str, *arguments: str) -> list[str]:
    """This interpreter running one of our packages, whatever the working directory holds."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(home: Path) -> dict[str, str]:
    """The environment of a child: SOLOCARD_HOME, and our packages found where this one lies."""
    here = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "SOLOCARD_HOME": str(home),
        "PYTHONPATH": f"{here}{os.pathsep}{inherited}" if inherited else here,
        "HF_HUB_OFFLINE": "1",
    }
