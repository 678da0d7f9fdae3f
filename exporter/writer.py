"""Planned objects into a bundle's folder by several threads; what a kill leaves is checked and gone on with.

A record counts once its journal line is on disk. A restart hashes what lies there, compares it with the journal and
goes on at the first record that is missing or wrong. Objects are named by their SHA-256, so neither the number of
workers nor their order shows in the result.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from appliance.errors import BundleError, SpaceError
from appliance.manifest import MAX_OBJECT_BYTES, ObjectEntry, object_path
from exporter.graph import StoredTensor
from exporter.journal import Journal
from exporter.object_copy import ObjectCopy, journaled_chunks
from exporter.object_plan import ObjectPlan
from exporter.record_io import read_back

Report = Callable[[str, int], None]  # (what was written, its bytes)


class Stopped(Exception):  # noqa: N818 - not shown: another worker's error is, or the interrupt
    """This worker gave up because another one failed or the build was interrupted."""


class ObjectWriter:
    """Writes finished objects below ``bundle`` (objects/ab/<sha256>), those under way below ``unfinished``."""

    def __init__(
        self, bundle: Path, unfinished: Path, journal: Journal, *, workers: int = 1,
        report: Report = lambda what, size_bytes: None, resumed: Report = lambda what, size_bytes: None,
    ) -> None:  # fmt: skip
        """``report`` gets what is written now, ``resumed`` what an earlier run wrote and was found whole."""
        self._bundle, self._unfinished, self._journal, self._workers = bundle, unfinished, journal, workers
        self._report, self._resumed = report, resumed
        self._stop, self._telling = threading.Event(), threading.Lock()
        (bundle / "objects").mkdir(parents=True, exist_ok=True)
        unfinished.mkdir(exist_ok=True)

    def write(self, plans: Sequence[ObjectPlan]) -> dict[str, ObjectEntry]:
        """Every object, by key. CheckpointError or OSError: what was written stays and is found by the next run."""
        largest_first = sorted(plans, key=lambda plan: (-plan.size_bytes, plan.key))
        futures: dict[str, Future[ObjectEntry]] = {}
        with ThreadPoolExecutor(self._workers, "object") as pool:
            try:
                futures = {plan.key: pool.submit(self._object, plan) for plan in largest_first}
                wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:
                if not all(future.done() for future in futures.values()):
                    self._stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
        errors = [future.exception() for future in futures.values() if not future.cancelled()]
        shown = next((error for error in errors if error is not None and not isinstance(error, Stopped)), None)
        if shown is not None:
            raise shown
        return {key: future.result() for key, future in futures.items()}

    def _object(self, plan: ObjectPlan) -> ObjectEntry:
        if plan.size_bytes > MAX_OBJECT_BYTES:
            raise BundleError(f"{plan.tensor}: an object of {plan.size_bytes:,} bytes; {MAX_OBJECT_BYTES:,} at most")
        self._check_stop()
        finished = self._finished(plan)
        if finished is not None:
            self._tell(self._resumed, plan)(plan.size_bytes)
            return finished
        copy = ObjectCopy(plan, self._unfinished / plan.key, self._journal)
        try:
            copy.verify(self._tell(self._resumed, plan))
            copy.copy(self._tell(self._report, plan))
            entry = copy.finish()
        finally:
            copy.close()
        target = self._bundle / object_path(entry.sha256)
        target.parent.mkdir(exist_ok=True)
        copy.path.chmod(0o444)
        copy.path.replace(target)
        return entry

    def _finished(self, plan: ObjectPlan) -> ObjectEntry | None:
        """An object that an earlier run finished and that still has its SHA-256; a damaged one is removed."""
        line, chunks = self._journal.fact("object", plan.key), journaled_chunks(plan, self._journal)
        if line is None or chunks is None:
            return None
        path, hashed = self._bundle / object_path(line["sha256"]), hashlib.sha256()
        if not path.is_file():
            return None
        for piece in read_back(path):
            hashed.update(piece)
            self._check_stop()
        if hashed.hexdigest() != line["sha256"]:
            path.unlink(missing_ok=True)
            return None
        return ObjectEntry(line["sha256"], plan.size_bytes, chunks)

    def _tell(self, report: Report, plan: ObjectPlan) -> Callable[[int], None]:
        """Reports a record of ``plan``, one thread at a time, and stops there if another worker failed."""

        def step(size_bytes: int) -> None:
            with self._telling:
                report(plan.key, size_bytes)
            self._check_stop()

        return step

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


def disk_error(error: OSError, folder: Path, total_bytes: int) -> BundleError | SpaceError:
    """What stopped a build that writes ``total_bytes`` of objects below ``folder``: nothing of it is lost."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return BundleError(f"{folder}: writing failed ({error.strerror}); start the same build again to go on")
    needed, free = total_bytes - kept_bytes(folder), shutil.disk_usage(folder.parent).free
    return SpaceError(
        f"{folder}: the disk is full: {max(needed, 0):,} more bytes are needed, {free:,} are free; what is written is "
        "kept: free some and start the same build again"
    )


def kept_bytes(partial: Path) -> int:
    """Bytes of objects, whole and unfinished, that an earlier run left below ``partial``."""
    folders = (partial / "bundle" / "objects", partial / "unfinished")
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def stored(plan: ObjectPlan, entry: ObjectEntry) -> StoredTensor:
    """The graph's reference to a whole object."""
    return StoredTensor(plan.tensor, plan.dtype, plan.shape, entry.path, 0, plan.size_bytes)
