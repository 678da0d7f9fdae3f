"""Planned objects into a bundle's folder by several threads; what a kill leaves is checked and gone on with.

Each worker copies one object at a time: it reads a record and hashes it while a second thread adds the record before
it to the object's hash and writes it past the page cache. A record counts once its journal line is on disk. A restart
hashes what lies there, compares it with the journal and goes on at the first record that is missing or wrong.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from appliance.bundle_writer import BundleWriter
from appliance.errors import BundleError, SpaceError
from appliance.manifest import MAX_OBJECT_BYTES, Chunk, ObjectEntry, object_path
from exporter.graph import StoredTensor
from exporter.journal import Journal
from exporter.object_plan import ObjectPlan, Record
from exporter.record_io import OutputFile, SourceFiles, page_buffer

Report = Callable[[str, int], None]  # (what was written, its bytes)
BUFFERS = 3  # of one worker: being read, being written, and one between


class Stopped(Exception):  # noqa: N818 - no error: another worker's is shown
    """This worker gave up because another one failed or the build was interrupted."""


class ObjectWriter:
    """Writes objects below ``bundle`` (objects/ab/<sha256>), unfinished ones below ``unfinished``."""

    def __init__(
        self, bundle: Path, unfinished: Path, journal: Journal, *, workers: int = 1,
        report: Report = lambda what, size: None, resumed: Report = lambda what, size: None,
    ) -> None:  # fmt: skip
        """``report`` gets what was written now, ``resumed`` what an earlier run had written and was found whole."""
        self._bundle, self._unfinished, self._journal, self._workers = bundle, unfinished, journal, workers
        self._report, self._resumed = report, resumed
        self._stop, self._telling = threading.Event(), threading.Lock()
        (bundle / "objects").mkdir(parents=True, exist_ok=True)
        unfinished.mkdir(exist_ok=True)

    def write(self, plans: Sequence[ObjectPlan]) -> dict[str, ObjectEntry]:
        """Every object, by key. SpaceError, CheckpointError: what was written stays and is found by the next run."""
        largest_first = sorted(plans, key=lambda plan: (-plan.size_bytes, plan.key))
        entries: dict[str, ObjectEntry] = {}
        with ThreadPoolExecutor(self._workers, "object") as pool:
            futures: dict[Future[ObjectEntry], str] = {}
            try:
                futures = {pool.submit(self._object, plan): plan.key for plan in largest_first}
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                unfinished = [future for future in futures if not future.done()]
                self._stop.set()
                for future in unfinished:
                    future.cancel()
        errors = [future.exception() for future in futures if not future.cancelled()]
        for error in errors:
            if error is not None and not isinstance(error, Stopped):
                raise self._named(error, plans)
        for future, key in futures.items():
            entries[key] = future.result()
        return entries

    def _object(self, plan: ObjectPlan) -> ObjectEntry:
        if plan.size_bytes > MAX_OBJECT_BYTES:
            raise BundleError(f"{plan.tensor}: an object of {plan.size_bytes:,} bytes; {MAX_OBJECT_BYTES:,} at most")
        self._check_stop()
        finished = self._finished(plan)
        if finished is not None:
            self._tell(self._resumed, plan.key, plan.size_bytes)
            return finished
        copy = ObjectCopy(plan, self._unfinished / plan.key, self._journal)
        try:
            for size_bytes in copy.verify():
                self._tell(self._resumed, plan.key, size_bytes)
                self._check_stop()
            for size_bytes in copy.copy():
                self._tell(self._report, plan.key, size_bytes)
                self._check_stop()
            return self._place(copy)
        finally:
            copy.close()

    def _place(self, copy: ObjectCopy) -> ObjectEntry:
        entry = copy.finish()
        target = self._bundle / object_path(entry.sha256)
        target.parent.mkdir(exist_ok=True)
        copy.path.chmod(0o444)
        copy.path.replace(target)
        return entry

    def _finished(self, plan: ObjectPlan) -> ObjectEntry | None:
        """An object that an earlier run finished and that still has its SHA-256; a damaged one is removed."""
        line = self._journal.fact("object", plan.key)
        chunks = _journaled_chunks(plan, self._journal, line)
        if line is None or chunks is None:
            return None
        path = self._bundle / object_path(line["sha256"])
        if not path.is_file():
            return None
        hashed = hashlib.sha256()
        if path.stat().st_size == plan.size_bytes:
            for piece in _pieces(path, plan.record_bytes):
                hashed.update(piece)
                self._check_stop()
        if hashed.hexdigest() != line["sha256"]:
            path.unlink(missing_ok=True)
            return None
        return ObjectEntry(line["sha256"], plan.size_bytes, chunks)

    def _tell(self, report: Report, what: str, size_bytes: int) -> None:
        with self._telling:
            report(what, size_bytes)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _named(self, error: BaseException, plans: Sequence[ObjectPlan]) -> BaseException:
        if not isinstance(error, OSError):
            return error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return BundleError(f"{self._bundle}: writing failed ({error.strerror}); start the same build again to go on")
        written = sum(path.stat().st_size for path in self._bundle.parent.rglob("*") if path.is_file())
        needed, free = sum(plan.size_bytes for plan in plans) - written, shutil.disk_usage(self._bundle).free
        return SpaceError(
            f"{self._bundle}: the disk is full: {max(needed, 0):,} more bytes are needed, {free:,} are free; what is "
            "written is kept: free some and start the same build again"
        )


class ObjectCopy:
    """One object on its way: :meth:`verify` what is there, :meth:`copy` the rest, :meth:`finish`."""

    def __init__(self, plan: ObjectPlan, path: Path, journal: Journal) -> None:
        self.plan, self.path, self._journal = plan, path, journal
        self._file = OutputFile(path)
        self._whole = hashlib.sha256()
        self._chunks: list[Chunk] = []
        self._source = hashlib.sha256() if plan.record_bytes < plan.size_bytes else None

    def close(self) -> None:
        self._file.close()

    def verify(self) -> Iterator[int]:
        """Hash the records that the journal says are there, up to the first wrong one; the file is cut after them."""
        buffer = page_buffer(min(self.plan.record_bytes, self.plan.size_bytes))
        for index in range(self.plan.count):
            line = self._journal.record(self.plan.key, index)
            offset = index * self.plan.record_bytes
            view = buffer[: min(self.plan.record_bytes, self.plan.size_bytes - offset)]
            if line is None or not self._file.read(view, offset):
                break
            if hashlib.sha256(view).hexdigest() != line["sha256"]:
                break
            self._whole.update(view)
            self._chunks.append(Chunk(offset, len(view), line["sha256"]))
            yield len(view)
        self._file.truncate(len(self._chunks) * self.plan.record_bytes if self._chunks else 0)

    def copy(self) -> Iterator[int]:
        """The records not there yet, read and hashed here, added to the whole and written by a second thread."""
        sources = SourceFiles()
        size = min(self.plan.record_bytes, self.plan.size_bytes)
        buffers = [page_buffer(size) for _ in range(min(BUFFERS, self.plan.count - len(self._chunks)))]
        waiting: list[Future[int]] = []
        start = len(self._chunks)
        try:
            with ThreadPoolExecutor(1, "write") as tail:
                for record in self.plan.records(start):
                    view = buffers[(record.index - start) % BUFFERS][: record.size_bytes]
                    while len(waiting) >= BUFFERS - 1:
                        yield waiting.pop(0).result()
                    sources.fill(record, view)
                    waiting.append(tail.submit(self._write, record, view, *_hashes(record, view)))
                while waiting:
                    yield waiting.pop(0).result()
        finally:
            sources.close()
