"""The output folder of one pipeline stage: resumable, never half-written, bound to its recipe.

``recipe.json`` is written first and says what the stage was asked to do, inputs by digest. Pieces follow, each
appearing whole (temporary file, fsync, rename). A closing JSON file is written last: a folder without it is
unfinished. The same recipe started again keeps the pieces that are there; another recipe is refused.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from appliance.bundle_writer import sync_directory, write_synced
from appliance.errors import SpaceError, UsageError
from exporter.json_file import read_object
from exporter.safetensors_file import write_file

RECIPE = "recipe.json"
MAX_JSON_BYTES = 64 << 20


class StageFolder:
    """One stage's folder, claimed for one recipe. Piece names are plain file names."""

    def __init__(self, path: Path, recipe: Mapping[str, Any]) -> None:
        """Claim ``path``: a new or empty folder, or one of the same recipe. UsageError for anything else."""
        self.path, self.recipe = path, dict(recipe)
        wanted = canonical(self.recipe)
        if (path / RECIPE).is_file():
            if canonical(read_json(path / RECIPE)) != wanted:
                raise UsageError(
                    f"{path} was made by another recipe ({changed(read_json(path / RECIPE), self.recipe)}); "
                    "name a new folder or remove this one"
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path} is not empty and holds no {RECIPE}; name a new folder")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / RECIPE, self.recipe)

    def has(self, piece: str) -> bool:
        """True if an earlier run finished ``piece``."""
        return (self.path / piece).is_file()

    def write_tensors(self, piece: str, tensors: Iterable[tuple[str, str, NDArray[Any]]]) -> None:
        """``piece`` becomes a safetensors file of (name, dtype, raw bits), or does not appear at all."""
        write_atomic(self.path / piece, lambda partial: write_file(partial, tensors))

    def finish(self, name: str, value: Mapping[str, Any]) -> str:
        """Write the closing JSON file ``name``; returns its digest."""
        write_json(self.path / name, value)
        return digest(value)


def partial_folder(out: Path) -> Path:
    """``OUT.partial``, where a folder is made that appears by one rename. UsageError for "." and "/"."""
    if not out.name:
        raise UsageError(f"{out} is no name for a new folder; name one")
    return out.with_name(out.name + ".partial")


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """``write(temporary)`` then fsync, rename to ``path``, fsync of the folder.

    Raises SpaceError when the disk is full, UsageError when the file cannot be written for another reason.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(f"{path}: no space left; free some and start again") from None
        raise UsageError(f"{path}: cannot be written ({error.strerror}); name another folder") from None
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON, keys sorted, whole or not at all."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_synced(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of ours; CheckpointError names the file and what to do."""
    again = "run the stage again into a new folder"
    return read_object(path, MAX_JSON_BYTES, absent="run the stage that makes it", damaged=again)


def canonical(value: Any) -> bytes:
    """Sorted keys, compact: equal values give equal bytes (floats as Python's shortest repr)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first field in which two recipes differ, for an error message."""
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            return f"{key}: {str(old.get(key))[:60]} there, {str(new.get(key))[:60]} asked"
    return "equal"


@functools.cache
def code_version() -> dict[str, str]:
    """Solocard's version and a digest of the exporter's sources: what made this file."""
    hashed, root = hashlib.sha256(), Path(__file__).parent
    for source in sorted(root.rglob("*.py")):
        hashed.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes())
    try:
        version = importlib.metadata.version("solocard")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"  # run from a checkout: the digest says what ran
    return {"version": version, "exporter_sha256": hashed.hexdigest()}
