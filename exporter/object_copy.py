"""One object from checkpoint to file: what lies there is hashed and compared, the rest is copied.

The caller's thread reads a record and hashes it; a second one adds the record before it to the object's hash, writes it
and journals it, so reading, hashing and writing go on at the same time. An object of one record is hashed once.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from appliance.manifest import Chunk, ObjectEntry
from exporter.journal import Journal
from exporter.object_plan import ObjectPlan, Record
from exporter.record_io import OutputFile, SourceFiles, page_buffer

BUFFERS = 3  # records in memory: one being read, one being written, one between them
Step = Callable[[int], None]  # told the bytes of each record done; may raise to stop


@dataclass(frozen=True, slots=True)
class _Hashes:
    chunk_sha256: str  # of the record, padding included
    source_sha256: str  # of what was read


class ObjectCopy:
    """:meth:`verify` what is there, :meth:`copy` the rest, :meth:`finish`; nothing is removed on the way."""

    def __init__(self, plan: ObjectPlan, path: Path, journal: Journal) -> None:
        self.plan, self.path, self._journal = plan, path, journal
        self._file = OutputFile(path)
        self._whole = hashlib.sha256()
        self._chunks: list[Chunk] = []

    def close(self) -> None:
        self._file.close()

    def verify(self, step: Step) -> None:
        """Hash the records that the journal lists, up to the first wrong one; the file is cut there."""
        plan, buffer = self.plan, memoryview(b"")
        for index in range(plan.count):
            line, offset = self._journal.record(plan.key, index), index * plan.record_bytes
            if line is None:
                break
            buffer = buffer or page_buffer(min(plan.record_bytes, plan.size_bytes))
            view = buffer[: min(plan.record_bytes, plan.size_bytes - offset)]
            if not self._file.read(view, offset) or hashlib.sha256(view).hexdigest() != line["sha256"]:
                break
            self._whole.update(view)
            self._chunks.append(Chunk(offset, len(view), line["sha256"]))
            step(len(view))
        self._file.truncate(sum(chunk.size_bytes for chunk in self._chunks))

    def copy(self, step: Step) -> None:
        """The records not there yet. CheckpointError names what cannot be read; OSError when the disk is full."""
        plan, first = self.plan, len(self._chunks)
        if first == plan.count:
            return
        buffers = [page_buffer(min(plan.record_bytes, plan.size_bytes)) for _ in range(min(BUFFERS, plan.count))]
        sources, writing = SourceFiles(), deque[Future[int]]()
        try:
            with ThreadPoolExecutor(1, "write") as second:
                for record in plan.records(first):
                    if len(writing) == BUFFERS:  # the oldest of them is about to be overwritten
                        step(writing.popleft().result())
                    view = buffers[record.index % len(buffers)][: record.size_bytes]
                    used = sources.fill(record, view)
                    writing.append(second.submit(self._write, record, view, self._hash(record, view, used)))
                while writing:
                    step(writing.popleft().result())
        finally:
            sources.close()

    def finish(self) -> ObjectEntry:
        """The object is on disk and in the journal; it still lies at ``path``."""
        self._file.sync()
        sha256 = self._whole.hexdigest()
        source = {} if self.plan.layer is not None else {"source_sha256": self.plan.made_from() or sha256}
        self._journal.append("object", self.plan.key, sha256=sha256, size_bytes=self.plan.size_bytes, **source)
        return ObjectEntry(sha256, self.plan.size_bytes, tuple(self._chunks))

    def _hash(self, record: Record, view: memoryview, used: int) -> _Hashes:
        hashed = hashlib.sha256(view[:used])
        source_sha256 = record.source_sha256 or hashed.hexdigest()
        if used < len(view):
            hashed.update(view[used:])
        if self.plan.count == 1:
            self._whole = hashed
        return _Hashes(hashed.hexdigest(), source_sha256)

    def _write(self, record: Record, view: memoryview, hashes: _Hashes) -> int:
        if self.plan.count > 1:
            self._whole.update(view)
        self._file.write(view, record.offset)
        self._chunks.append(Chunk(record.offset, record.size_bytes, hashes.chunk_sha256))
        if self.plan.count > 1 or self.plan.layer is not None:
            self._journal.append(
                "record", self.plan.key, index=record.index, offset=record.offset, size_bytes=record.size_bytes,
                sha256=hashes.chunk_sha256, source=record.source, source_sha256=hashes.source_sha256,
            )  # fmt: skip
        return record.size_bytes


def journaled_chunks(plan: ObjectPlan, journal: Journal) -> tuple[Chunk, ...] | None:
    """The chunks of an object that the journal calls finished; None when lines are missing."""
    line = journal.fact("object", plan.key)
    if line is None:
        return None
    if plan.count == 1:
        return (Chunk(0, plan.size_bytes, line["sha256"]),)
    chunks = []
    for index in range(plan.count):
        record, offset = journal.record(plan.key, index), index * plan.record_bytes
        if record is None:
            return None
        chunks.append(Chunk(offset, min(plan.record_bytes, plan.size_bytes - offset), record["sha256"]))
    return tuple(chunks)
