"""The demo's steps from checkpoint to installed model, each run as the installed commands, each skipped when done.

A step is done when ``.demo/done.json`` holds the digest of everything its result was made from: the checkpoint's
files, the sources of the packages that make it, and pyproject.toml's pins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import question
from environment import ROOT, VENV, SetupError, clean_environment, read_json, write_json
from progress import heartbeat, megabytes, say, talking, tree_bytes

SAMPLE_MODEL = ROOT / "packaging" / "sample-model"
ENCODING = "dsv4-0731"
KEY_NAME = "demo"
QUESTION = "How do I go back to the previous model?"


class Demo:
    """Folder ``.demo``: checkpoint (random weights only), keys, bundle, home (SOLOCARD_HOME), key.txt, done.json."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.keys = folder, folder / "home", folder / "keys"
        self.bundle, self.key_file, self._done = folder / "bundle", folder / "key.txt", folder / "done.json"
        self.trained = (SAMPLE_MODEL / "checkpoint" / "config.json").is_file()
        self.checkpoint = SAMPLE_MODEL / "checkpoint" if self.trained else folder / "checkpoint"
        self.question = QUESTION

    @property
    def checkpoint_note(self) -> str:
        if self.trained:
            return "packaging/sample-model/checkpoint, a small model trained on Solocard's manual"
        return "random weights in the official layout (preset tiny)"

    def make_checkpoint(self) -> None:
        """Random weights, where there is no trained model."""
        digest = digest_of(ROOT / "exporter", ROOT / "appliance", ROOT / "pyproject.toml")
        if self.trained or (self._is_done("checkpoint", digest) and self.checkpoint.is_dir()):
            return
        self._forget("checkpoint", self.checkpoint)
        self._run("solocard-export", "sample", self.checkpoint, "--preset", "tiny")
        self._mark("checkpoint", digest)

    def make_bundle(self) -> str:
        """Build and sign; the bundle's id."""
        prompts = SAMPLE_MODEL / "golden_prompts.jsonl"
        golden: list[str | Path] = ["--golden-prompts", prompts] if self.trained and prompts.is_file() else []
        sources = [ROOT / name for name in ("exporter", "appliance", "runtime", "pyproject.toml")]
        digest = digest_of(self.checkpoint, *sources, *golden[1:])
        if not self._is_done("bundle", digest) or not self.bundle.is_dir() or not (self.keys / "root.json").is_file():
            self._forget("bundle", self.bundle)
            release = int(read_json(self._done).get("release", 0)) + 1
            self._run(
                "solocard-export", "build", self.checkpoint, self.bundle, "--encoding", ENCODING,
                "--release-counter", str(release), "--release-version", f"0.1.{release}", *golden,
            )  # fmt: skip
            if not (self.keys / "root.json").is_file():
                shutil.rmtree(self.keys, ignore_errors=True)
                self._run("solocard-export", "keys", "new", self.keys)
            said = self._run("solocard-export", "sign", self.bundle, "--keys", self.keys, "--expires-days", "3650")
            found = re.search(r"^signed (\S+):", said, re.MULTILINE)
            if found is None:
                raise SetupError(f"`solocard-export sign` did not name the bundle it signed: {said}")
            self._mark("bundle", digest, release=release, bundle_id=found[1])
        return str(read_json(self._done)["bundle_id"])

    def install(self, bundle_id: str) -> None:
        """Trust the demo's own keys, install, and drop what the demo installed before the last two."""
        installed = {entry["bundle_id"]: entry for entry in self._list()}
        if installed.get(bundle_id, {}).get("current"):
            say(f"  {bundle_id} is installed and current")
            return
        try:
            self._run("solocard", "trust", "add", self.keys / "root.json", "--yes")
        except SetupError:  # other keys were trusted here before they were lost
            self._run("solocard", "trust", "add", self.keys / "root.json", "--yes", "--reset")
        self._run("solocard", "install", self.bundle)
        for entry in self._list():
            if not entry["current"] and not entry["previous"]:
                self._run("solocard", "remove", entry["bundle_id"])

    def api_key(self, port: int) -> str:
        """The demo's API key, from key.txt while the server takes it, else a new one."""
        with contextlib.suppress(OSError):
            key = self.key_file.read_text().strip()
            if question.key_works(port, key):
                return key
        names = [entry["name"] for entry in self._json("key", "list")["keys"]]
        if KEY_NAME in names:
            self._json("key", "revoke", KEY_NAME)
        key = str(self._json("key", "new", KEY_NAME)["key"])
        self.key_file.unlink(missing_ok=True)
        with os.fdopen(os.open(self.key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key + "\n")
        return key

    def _list(self) -> list[dict[str, Any]]:
        return list(self._json("list")["bundles"]) if self.home.is_dir() else []

    # ------------------------------------------------------------------------------------------------- what is done
    def _is_done(self, step: str, digest: str) -> bool:
        return bool(read_json(self._done).get(step) == digest)

    def _mark(self, step: str, digest: str, **more: Any) -> None:
        write_json(self._done, read_json(self._done) | {step: digest} | more)

    def _forget(self, step: str, result: Path) -> None:
        write_json(self._done, read_json(self._done) | {step: ""})
        shutil.rmtree(result, ignore_errors=True)

    # ---------------------------------------------------------------------------------------------- running commands
    def _json(self, *arguments: str) -> dict[str, Any]:
        """The data of the last JSON line of ``solocard … --json``."""
        command = [str(VENV / "bin" / "solocard"), *arguments, "--json"]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SetupError(f"`solocard {' '.join(arguments)}` failed:\n{done.stderr.strip()}")
        return dict(json.loads(done.stdout.splitlines()[-1])["data"])

    def _run(self, program: str, *arguments: str | Path) -> str:
        """Run one command, show what it says and its time; returns its last lines."""
        shown = [str(a.relative_to(ROOT)) if isinstance(a, Path) else a for a in arguments]
        say(f"  {program} {' '.join(shown)}")
        tail: list[str] = []
        started_s = time.monotonic()
        with (
            heartbeat(lambda: f".demo has {megabytes(tree_bytes(self.folder))}") as line,
            talking([VENV / "bin" / program, *arguments], ROOT, self._environment()) as process,
        ):
            assert process.stdout is not None
            for text in process.stdout:
                tail = [*tail[-9:], text.rstrip()]
                line(text.rstrip())
            process.wait()
        if process.returncode:
            raise SetupError(f"`{program} {' '.join(shown)}` failed with exit code {process.returncode}: {tail[-1:]}")
        say(f"    {time.monotonic() - started_s:.1f} s")
        return "\n".join(tail)

    def _environment(self) -> dict[str, str]:
        return clean_environment() | {"SOLOCARD_HOME": str(self.home)}


def digest_of(*paths: str | Path) -> str:
    """SHA-256 over names and bytes of files, and of folders' .py and data files in order of name."""
    total = hashlib.sha256()
    for start in map(Path, paths):
        files = sorted(p for p in start.rglob("*") if p.is_file()) if start.is_dir() else [start]
        for path in files:
            if "__pycache__" not in path.parts:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                total.update(f"{path.relative_to(ROOT)} {content}\n".encode())
    return total.hexdigest()
