"""What a build has written so far: one checked line per record and object, on disk before it counts.

A line is 16 hex digits of the SHA-256 of the rest, a blank, and canonical JSON. A torn or damaged line is as if it had
never been written. Nothing here is trusted for the bytes: a restart hashes them again and compares.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appliance.errors import BusyError
from exporter.stage import canonical

Entry = Mapping[str, Any]
CHECK_CHARS = 16


class Journal:
    """Lines of one recipe; any thread may append. Two processes cannot hold one journal: BusyError."""

    def __init__(self, path: Path, recipe_sha256: str) -> None:
        self.path, self._recipe = path, recipe_sha256
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise BusyError(f"{path.parent}: another build is writing here; wait for it or stop it") from None
        self._writing, self._syncing = threading.Lock(), threading.Lock()
        self._written = self._synced = 0
        self._records: dict[str, dict[int, Entry]] = {}
        self._facts: dict[tuple[str, str], Entry] = {}
        data = path.read_bytes()
        for line in data.splitlines():
            self._take(_parse(line))
        if data and not data.endswith(b"\n"):
            os.write(self._fd, b"\n")  # ends the torn line

    def close(self) -> None:
        os.close(self._fd)

    def record(self, key: str, index: int) -> Entry | None:
        """The last line of record ``index`` of object ``key``."""
        return self._records.get(key, {}).get(index)

    def fact(self, kind: str, key: str) -> Entry | None:
        """The last line of ``kind`` ("object", "goldens" …) for ``key``."""
        return self._facts.get((kind, key))

    def append(self, kind: str, key: str, **entry: Any) -> None:
        """One more line, fsynced when this returns; lines of several threads share an fsync."""
        line = {"kind": kind, "key": key, "recipe": self._recipe, **entry}
        text = canonical(line)
        with self._writing:
            data = _check(text) + b" " + text + b"\n"
            if os.write(self._fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._written += 1
            mine = self._written
            self._take(line)
        with self._syncing:
            if self._synced < mine:
                reached = self._written
                os.fdatasync(self._fd)
                self._synced = reached

    def _take(self, entry: Entry | None) -> None:
        if entry is None or entry.get("recipe") != self._recipe:
            return
        if entry["kind"] == "record":
            self._records.setdefault(entry["key"], {})[entry["index"]] = entry
        else:
            self._facts[entry["kind"], entry["key"]] = entry


def _check(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:CHECK_CHARS].encode()


def _parse(line: bytes) -> Entry | None:
    """The entry of one line, None when it is torn or damaged."""
    check, _, text = line.partition(b" ")
    if check != _check(text):
        return None
    entry: Entry = json.loads(text)
    return entry
