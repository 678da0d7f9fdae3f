"""A JSON object from a file that is not trusted: bounded, and every way to be wrong in one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError


def read_object(path: Path, max_bytes: int, *, absent: str, damaged: str) -> dict[str, Any]:
    """The object in ``path``, at most ``max_bytes``. CheckpointError ends with ``absent`` or ``damaged``."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > max_bytes:
            raise CheckpointError(f"{path}: {size_bytes} bytes, expected at most {max_bytes}; {damaged}")
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {absent}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); {damaged}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found a {type(value).__name__}, expected a JSON object; {damaged}")
    return value
