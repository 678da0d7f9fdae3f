"""One change at a time: an flock on ``run/install.lock``. The kernel lets go of it when its process ends, however."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.errors import BusyError
from appliance.layout import Layout


@contextmanager
def change_lock(home: Path) -> Iterator[None]:
    """Held while models, trust or state change. BusyError at once, naming the holder, when another process has it."""
    layout = Layout(home)
    make_home(home)
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise BusyError(
                f"another solocard command (process {holder}) is changing {home}; wait until it ends"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def make_home(home: Path) -> None:
    """Create the folders an appliance has; ``keys`` and ``run`` are its owner's alone."""
    layout = Layout(home)
    for folder in (layout.models, layout.trust, layout.log):
        folder.mkdir(parents=True, exist_ok=True)
    for private in (layout.keys, layout.run):
        private.mkdir(mode=0o700, exist_ok=True)
