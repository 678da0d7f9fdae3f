"""The runtime's own engine as a child process: what is compared is the engine that serves, never a copy of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appliance.errors import EngineError, SolocardError

Logits = npt.NDArray[np.float32]


def run_logits(arguments: Sequence[str]) -> None:
    """``python -m runtime logits …`` with these arguments; raises with its one line and exit code."""
    root = str(Path(__file__).resolve().parent.parent)
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "runtime", "logits", *arguments]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        sys.stderr.write(done.stderr)
        return
    lines = done.stderr.strip().splitlines() or [f"the engine ended with exit code {done.returncode}"]
    error: SolocardError = EngineError(lines[-1].removeprefix("solocard: "))
    error.exit_code = done.returncode if done.returncode > 0 else error.exit_code
    raise error


def engine_logits(
    bundle: Path, prompts: Sequence[Sequence[int]], *, generate: int = 0, chunks: Sequence[int] = (),
    profile: str = "full",
) -> list[Logits]:  # fmt: skip
    """Logits f32 [len(prompt) + generate, vocab] for each prompt, by the engine on one profile of the built bundle."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), -1, np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    with tempfile.TemporaryDirectory(prefix="solocard-logits-") as folder:
        source, out = Path(folder) / "ids.npy", Path(folder) / "logits.npy"
        np.save(source, ids)
        arguments = [str(bundle), "--ids", str(source), "--out", str(out), "--generate", str(generate)]
        if profile != "full":
            arguments += ["--profile", profile]
        if chunks:
            arguments += ["--chunks", ",".join(str(chunk) for chunk in chunks)]
        run_logits(arguments)
        result = np.load(out)
    return [result[index, : len(prompt) + generate] for index, prompt in enumerate(prompts)]
