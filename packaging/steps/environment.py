"""The virtual environment that demo and check share: made, filled by pip under pip's own settings, and remembered.

What is installed is remembered in ``.venv/solocard.json`` by a digest of what was asked for, so a second run asks pip
nothing, and a changed pyproject.toml, interpreter or folder asks it again. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from progress import heartbeat, megabytes, say, talking, tree_bytes

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "solocard.json"
EXTRAS = ("serve", "console", "export")
LEAST_GLIBC = (2, 28)  # the wheels are manylinux_2_28
LEAST_FREE_BYTES = 1_000_000_000
TAIL_LINES = 25
_FETCHED = re.compile(r"\s*Downloading (\S+) \(([\d.]+) (bytes|kB|MB|GB)\)")
_UNITS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}


class SetupError(Exception):
    """Something the machine lacks, or a step that failed: one line, then hints."""


def check_machine() -> None:
    """SetupError naming what is missing: glibc, write access, disk space."""
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "another C library").partition(" ")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if name != "glibc" or numbers < LEAST_GLIBC:
        raise SetupError(f"glibc 2.28 or newer is needed, this system has {name} {version}; use a newer distribution")
    try:
        with tempfile.TemporaryFile(dir=ROOT):
            pass
    except OSError as error:
        raise SetupError(f"{ROOT} cannot be written ({error.strerror}); run this in a clone of your own") from None
    free = shutil.disk_usage(ROOT).free
    if not STAMPS.exists() and free < LEAST_FREE_BYTES:
        raise SetupError(f"1 GB free is needed, {ROOT} is on a disk with {megabytes(free)} free; make room")


def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def clean_environment() -> dict[str, str]:
    """This environment without what would lead Python or pip away from ``.venv``."""
    drop = {"PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"}
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    return kept | {"PYTHONUNBUFFERED": "1", "VIRTUAL_ENV": str(VENV)}


def ensure_product() -> None:
    """``.venv`` with this checkout, editable, and the extras the demo needs."""
    _make_venv()
    raw = project()
    asked = [raw["build-system"], raw["project"]]
    _install("solocard", ["--editable", f".[{','.join(EXTRAS)}]"], asked, f"solocard with {', '.join(EXTRAS)}")


def ensure_group(name: str) -> None:
    """One dependency group of pyproject.toml in ``.venv``; read here, since older pips know no groups."""
    wanted = project()["dependency-groups"][name]
    _install(name, wanted, wanted, f"the group {name}: {', '.join(wanted)}")


def has_pin(pin: str) -> bool:
    """Whether ``.venv`` holds exactly what ``name==version`` says; a local build such as 2.13.0+cpu counts."""
    name, _, version = pin.partition("==")
    look = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    done = subprocess.run(
        [PYTHON, "-P", "-c", look, name], env=clean_environment(), capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and done.stdout.strip().partition("+")[0] == version


def _make_venv() -> None:
    if subprocess_ok(PYTHON, "-c", "import sys; sys.exit(sys.prefix == sys.base_prefix)"):
        if not subprocess_ok(PYTHON, "-m", "pip", "--version"):
            _quiet([PYTHON, "-m", "ensurepip", "--default-pip"], "pip, which is missing in .venv")
        return
    _quiet([sys.executable, "-m", "venv", "--clear", VENV], f".venv with Python {platform.python_version()}")


def subprocess_ok(*command: str | Path) -> bool:
    """Whether the command exists and exits with 0; what it prints is dropped."""
    try:
        done = subprocess.run(command, env=clean_environment(), capture_output=True, check=False, cwd=ROOT)
    except OSError:
        return False
    return done.returncode == 0


def _quiet(command: list[str | Path], what: str) -> None:
    say(f"  making {what}")
    started_s = time.monotonic()
    with heartbeat(lambda: f".venv has {megabytes(tree_bytes(VENV))}"):
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-TAIL_LINES:])
        raise SetupError(f"{what} could not be made:\n{tail}")
    say(f"    {time.monotonic() - started_s:.1f} s")


def _install(label: str, arguments: list[str], asked: Any, what: str) -> None:
    """pip install unless the same was installed here before."""
    version = subprocess.run([PYTHON, "-VV"], capture_output=True, text=True, check=True).stdout.strip()
    text = json.dumps([asked, arguments, version, platform.machine(), str(ROOT)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    stamps = read_json(STAMPS)
    if stamps.get(label) == digest:
        return
    say(f"  installing {what}")
    _pip(arguments)
    write_json(STAMPS, read_json(STAMPS) | {label: digest})


def _pip(arguments: list[str]) -> None:
    """pip in ``.venv``, wheels only; says each download with its bytes, and how .venv grows."""
    command: list[str | Path] = [
        PYTHON, "-m", "pip", "install", "--no-user", "--no-input", "--progress-bar=off", "--disable-pip-version-check",
        "--only-binary=:all:", *arguments,
    ]  # fmt: skip
    tail: list[str] = []
    started_s, fetched_bytes = time.monotonic(), 0.0
    with (
        heartbeat(lambda: f".venv has {megabytes(tree_bytes(VENV))}") as line,
        talking(command, ROOT, clean_environment()) as pip,
    ):
        assert pip.stdout is not None
        for text in pip.stdout:
            tail = [*tail[-TAIL_LINES:], text.rstrip()]
            if (found := _FETCHED.match(text)) and not found[1].endswith(".metadata"):
                fetched_bytes += float(found[2]) * _UNITS[found[3]]
                line(f"{found[1]}, {found[2]} {found[3]} ({megabytes(fetched_bytes)} so far)")
            elif text.startswith("Installing collected"):
                line(f"unpacking {text.count(',') + 1} packages")
    if pip.returncode:
        raise SetupError("pip could not install:\n    " + "\n    ".join(tail) + "\n" + PIP_HINT)
    sizes = f"fetched {megabytes(fetched_bytes)}, .venv has {megabytes(tree_bytes(VENV))}"
    say(f"    {time.monotonic() - started_s:.1f} s, {sizes}")


PIP_HINT = """\
pip's own settings decide where it looks (`pip config list`; PIP_INDEX_URL, PIP_FIND_LINKS and PIP_NO_INDEX for a
wheelhouse, HTTPS_PROXY for a proxy). What was fetched is kept; run the same command again to go on."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none that can be read."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", "utf-8")
    fresh.replace(path)
