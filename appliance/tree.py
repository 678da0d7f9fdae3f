"""A directory read name by name without following links: a stick, a built bundle, or the model pool.

Only fixed relative names are opened, every path component with O_NOFOLLOW, and only regular files are read. O_NONBLOCK
keeps a FIFO from hanging the reader; it changes nothing for regular files.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from appliance.errors import BundleError

READ_BYTES = 1 << 20
MAX_LISTED_ENTRIES = 200_000
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_FILE_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Tree:
    """Reads regular files below ``root`` (which itself may be a link: a person named it).

    ``remedy`` ends each message: what a person does about a damaged file here.
    """

    def __init__(self, root: Path, remedy: str = "copy the bundle again") -> None:
        self.root = root
        self.remedy = remedy

    def open(self, name: str) -> BinaryIO:
        """The file ``name`` (``a/b/c``), unbuffered. BundleError naming it: missing, a link, not a regular file."""
        *folders, last = name.split("/")
        try:
            parent = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for folder in folders:
                    inner = os.open(folder, _DIR_FLAGS, dir_fd=parent)
                    os.close(parent)
                    parent = inner
                fd = os.open(last, _FILE_FLAGS, dir_fd=parent)
            finally:
                os.close(parent)
        except OSError as error:
            raise BundleError(f"{name} in {self.root} {_why(error)}; {self.remedy}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BundleError(f"{name} in {self.root} is not a regular file; {self.remedy}")
        return os.fdopen(fd, "rb", buffering=0)

    def holds(self, name: str) -> bool:
        """Whether anything at all has this name, a dangling link too."""
        return os.path.lexists(self.root / name)

    def size_bytes(self, name: str) -> int:
        """Size of a regular file, opened as :meth:`open` does."""
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, name: str, max_bytes: int) -> bytes:
        """The whole of a small file; BundleError when it is longer than ``max_bytes`` (no more than that is read)."""
        with self.open(name) as file:
            data = b"".join(bytes(piece) for piece in read_pieces(file, max_bytes + 1, name))  # the buffer is reused
        if len(data) > max_bytes:
            raise BundleError(f"{name} in {self.root} is longer than the {max_bytes:,} bytes allowed; {self.remedy}")
        return data

    def sha256(self, name: str) -> tuple[str, int]:
        """Hex digest and size in bytes of the whole file, streamed."""
        digest, size = hashlib.sha256(), 0
        with self.open(name) as file:
            for piece in read_pieces(file, None, name):
                digest.update(piece)
                size += len(piece)
        return digest.hexdigest(), size

    def names(self) -> Iterator[str]:
        """Relative names of everything below the root that is not a directory; links are listed, not followed."""
        count = 0
        for folder, _, files in os.walk(self.root):
            for file in files:
                count += 1
                if count > MAX_LISTED_ENTRIES:
                    raise BundleError(f"{self.root} holds more than {MAX_LISTED_ENTRIES:,} files; not a bundle")
                yield (Path(folder) / file).relative_to(self.root).as_posix()


def read_pieces(file: BinaryIO, limit_bytes: int | None, name: str) -> Iterator[memoryview]:
    """Pieces of at most 1 MiB, ``limit_bytes`` in all; each is valid until the next. A read error names the file."""
    buffer = memoryview(bytearray(READ_BYTES))
    left = limit_bytes
    while left is None or left > 0:
        try:
            count = file.readinto(buffer if left is None else buffer[:left])  # type: ignore[attr-defined]
        except OSError as error:
            raise BundleError(f"{name}: reading failed ({error.strerror}); check the medium and copy again") from None
        if not count:
            return
        left = None if left is None else left - count
        yield buffer[:count]


def _why(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "is missing"
    if error.errno in (errno.ELOOP, errno.EMLINK):
        return "is a symbolic link, not a regular file"
    if error.errno == errno.ENOTDIR:
        return "lies behind a link or a file instead of a folder"
    if error.errno == errno.ENXIO:
        return "is a socket or device, not a regular file"
    return f"cannot be opened ({error.strerror})"
