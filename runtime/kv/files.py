"""The calls that can fail or be cut off, the store's lock, and small files written whole."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sqlite3
from pathlib import Path

from appliance.errors import BusyError, StoreError

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})
_INDEX_PASSES = frozenset({  # CANTOPEN: mostly want of files
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED,
})  # fmt: skip


class Io:
    """Every call of the store that changes the disk or may meet a failing one; tests hand in others."""

    def pwrite(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def truncate(self, path: Path, size_bytes: int) -> None:
        os.truncate(path, size_bytes)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """Give ``source`` a second name; FileExistsError where ``target`` is there already."""
        os.link(source, target)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def commit(self, connection: sqlite3.Connection) -> None:
        connection.execute("COMMIT")

    def free_bytes(self, path: Path) -> int:
        """What an ordinary user may still write on the file system of ``path``."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


def make_directory(directory: Path, io: Io) -> None:
    """Make ``directory`` (0700), and its name durable, unless it is there; OSError as the system says."""
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        io.sync_directory(directory.parent)


def lock_directory(directory: Path, io: Io) -> int:
    """Make the store's directory where needed and lock it for one writer; returns the lock's descriptor.

    Raises BusyError when another process holds it, StoreError when the directory cannot be used.
    """
    try:
        make_directory(directory, io)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(f"{directory}: {error.strerror}; the KV cache needs a directory it can write") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise BusyError(f"{directory} is in use by another solocard-serve; stop it first") from None
    return fd


def write_new(path: Path, content: bytes, io: Io) -> bool:
    """Write ``path`` whole and durably, mode 0600, unless it is there (then False): a crash leaves all of it or none.

    The draft beside it has a random name ending in ``.new``; OSError as the system says.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            io.pwrite(fd, content, 0)
            io.fdatasync(fd)
        finally:
            os.close(fd)
        io.link(draft, path)
        return True
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
        io.sync_directory(path.parent)


def no_room(error: BaseException) -> bool:
    """Is the disk, or this user's share of it, full?"""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def is_short(error: BaseException) -> bool:
    """Did the system lack files or memory for a moment? Such an error says nothing about the disk."""
    return isinstance(error, OSError) and error.errno in _SHORT


def passes(error: OSError | sqlite3.Error) -> bool:
    """May the same be tried again in a minute, without a restart: no room, or the system was short of something?"""
    if isinstance(error, OSError):
        return no_room(error) or is_short(error)
    code = getattr(error, "sqlite_errorcode", 0)
    return code == sqlite3.SQLITE_IOERR_NOMEM or code & 0xFF in _INDEX_PASSES


def reason(error: OSError | sqlite3.Error) -> str:
    """``ENOSPC: No space left on device``, or what SQLite says."""
    if isinstance(error, OSError):
        return f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}"
    return f"index: {error}"
