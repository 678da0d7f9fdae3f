"""``journal.jsonl``: every change of models and trust, one line each, fsynced. What cannot be logged is not done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from appliance.bundle_writer import sync_directory
from appliance.errors import StoreError
from appliance.layout import Layout
from appliance.manifest import canonical_json
from appliance.trust import utc_now

MAX_LINE_BYTES = 64 << 10


class Journal:
    """Append-only. A line torn by a power cut is closed before the next one and skipped when read."""

    def __init__(self, home: Path) -> None:
        self.path = Layout(home).journal

    def append(self, event: str, **details: Any) -> None:
        """One line {"event", "time", "pid", details}; StoreError when it cannot be made durable."""
        record = {"event": event, "pid": os.getpid(), "time": f"{utc_now():%Y-%m-%dT%H:%M:%SZ}", **readable(details)}
        line = canonical_json(record) + b"\n"
        created = not self.path.exists()
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self.path, flags, 0o640)
            try:
                size = os.fstat(fd).st_size
                if size and os.pread(fd, 1, size - 1) != b"\n":
                    line = b"\n" + line
                if os.write(fd, line) != len(line):
                    raise OSError(28, "no space left on device")
                os.fsync(fd)
            finally:
                os.close(fd)
            if created:
                sync_directory(self.path.parent)
        except OSError as error:
            message = f"{self.path} cannot be written ({error.strerror}); what cannot be logged is not done"
            raise StoreError(message) from None

    def read(self) -> list[dict[str, Any]]:
        """Every whole line, oldest first; torn or foreign lines are left out."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read ({error.strerror})") from None
        return [record for record in map(_record, lines) if record is not None]


def readable(value: Any) -> Any:
    """``value`` with every text in it as UTF-8 can hold it: a file name that is no UTF-8 shows as \\udcff."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: readable(inner) for key, inner in value.items()}
    return [readable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _record(line: bytes) -> dict[str, Any] | None:
    if not line or len(line) > MAX_LINE_BYTES:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "event" in record else None
