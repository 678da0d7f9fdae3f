"""The KV cache on disk: prefixes of prompts that need not be computed again, also after a restart or a crash.

``put_all`` stores what is missing of its jobs and returns once all of it is durable; ``lookup`` gives the longest
usable start of a prompt, every byte authenticated, or nothing and the reason. A full disk, a full quota or a failing
disk stop the writing; lookups and serving go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from appliance.errors import EngineError, SolocardError, StoreError
from appliance.model import BLOCK_TOKENS
from appliance.wire import KvStatus
from runtime.kv.files import Io, lock_directory
from runtime.kv.fingerprint import Fingerprint
from runtime.kv.ground import Ground
from runtime.kv.halt import Halt
from runtime.kv.index import Index
from runtime.kv.job import KvHit, Note, PutJob, PutResult, Sink, TailUnit, Unit
from runtime.kv.keys import derive_master
from runtime.kv.layout import KvLayout
from runtime.kv.lookup import Lookup, Prompt, name_prompt
from runtime.kv.policy import DAY_S, Policy
from runtime.kv.rebuild import open_index, remake
from runtime.kv.reclaim import reserve, sweep
from runtime.kv.record import Kind
from runtime.kv.segment import SEGMENT_BYTES, Segments
from runtime.kv.tenants import Tenants
from runtime.kv.writing import Plan, Writing, open_replay
from runtime.schedule import prompt_boundary

__all__ = ["KvHit", "KvStore", "Note", "Policy", "PutJob", "PutResult", "Sink", "TailUnit", "Unit"]
_SWEEP_S = 60.0
_log = logging.getLogger("solocard.kv")
_OFF = KvHit(0, 0, None, None, False, "policy", 0)


class KvStore:
    """One directory, one writing process. Methods may be called from any thread.

    ``lookup`` and ``status`` never wait for a write.
    """

    def __init__(self, lock_fd: int, ground: Ground, reader: Index, master_key: bytes) -> None:
        self._lock_fd, self._ground, self._reader, self._master_key = lock_fd, ground, reader, master_key
        self._write, self._reading, self._counting = threading.Lock(), threading.Lock(), threading.Lock()
        self._pins: Counter[bytes] = Counter()
        self._halt, self._refused, self._swept_s = Halt(ground.clock), "", 0.0
        self._counts: Counter[str] = Counter()
        self._miss_reasons: dict[str, int] = {}
        self._kinds: dict[Kind, int] | None = None
        self._closed = False

    @staticmethod
    def open(
        directory: Path, *, layout: KvLayout, fingerprint: Fingerprint, master_key: bytes, policy: Policy,
        io: Io | None = None, segment_bytes: int = SEGMENT_BYTES, clock: Callable[[], float] = time.time,
    ) -> KvStore:  # fmt: skip
        """Open and recover. ``policy.max_bytes`` bounds the segment files; 0 switches the cache off.

        Raises BusyError when another process has the store, StoreError when the directory cannot be used.
        """
        if fingerprint.fields.get("layout") != layout.layout_id:
            raise EngineError("the KV fingerprint names another layout than the store's; build both from one model")
        io, master = io or Io(), derive_master(master_key)
        lock_fd = lock_directory(directory, io)
        try:
            tenants = Tenants(directory, master_key, io, clock)
            tenants.tidy()
            segments = Segments(directory, io, segment_bytes, master.store)
            index = open_index(directory, io, master_key, tenants, segments, int(clock()))
            try:
                reader = Index.open(directory, io, read_only=True)
            except BaseException:
                index.close()
                raise
        except (OSError, sqlite3.Error) as error:
            os.close(lock_fd)
            raise StoreError(f"{directory}: the KV cache cannot be opened ({error})") from None
        except SolocardError:
            os.close(lock_fd)
            raise
        ground = Ground(directory, io, index, segments, tenants, policy, layout, fingerprint, segment_bytes, clock)
        store = KvStore(lock_fd, ground, reader, master_key)
        store._begin()
        return store

    # -- reading

    def lookup(
        self, tenant: str, ids: Sequence[int], sink: Sink, *, replay_tokens: int = 0, tails: bool = False,
        shared_tokens: int = 0,
    ) -> KvHit:  # fmt: skip
        """The longest start of ``ids``: a checkpoint at B ≤ c(n), a tail (``tails``), or a replay (``replay_tokens``).

        Every block below it was given to ``sink`` in order from 0, read and verified; what ``sink`` raises goes
        through. Blocks and checkpoints up to ``shared_tokens`` may be SHARED's. EngineError for ids that are no u32.
        """
        hit = self._lookup(tenant, ids, sink, replay_tokens, tails, shared_tokens)
        with self._counting:
            self._counts.update(lookups=1, hits=int(hit.tokens > 0), replays=int(hit.replay), hit_tokens=hit.tokens,
                                miss_tokens=len(ids) - hit.tokens)  # fmt: skip
            if hit.reason == "corrupt" or (hit.reason and not hit.tokens):
                name = hit.reason.partition(":")[0]
                self._miss_reasons[name] = self._miss_reasons.get(name, 0) + 1
        return hit

    def _lookup(
        self, tenant: str, ids: Sequence[int], sink: Sink, replay_tokens: int, tails: bool, shared_tokens: int
    ) -> KvHit:  # fmt: skip
        if self._ground.policy.max_bytes <= 0:
            return _OFF
        for attempt in range(2):
            reader = self._reader
            try:
                prompt = self._prompt(tenant, ids, shared_tokens)
                now_s = int(self._ground.clock())
                return Lookup(self._ground, reader, self._reading, prompt, now_s, tails=tails).run(sink, replay_tokens)
            except StoreError as error:  # a tenant's key file
                _log.warning("KV lookup: %s", error)
                break
            except sqlite3.Error as error:
                _log.warning("KV index cannot be read: %s", error)
                if attempt or not self._mended(reader, error):
                    break
        return dataclasses.replace(_OFF, reason="corrupt")

    def _prompt(self, tenant: str, ids: Sequence[int], shared_tokens: int) -> Prompt:
        count = prompt_boundary(len(ids)) // BLOCK_TOKENS
        return name_prompt(self._ground, tenant, ids, count, shared_tokens)

    def replay_ids(self, tenant: str, names: Sequence[str]) -> dict[str, list[int]]:
        """The exact token ids kept under ``names``; those that are not there, or do not open, are left out."""
        found: dict[str, list[int]] = {}
        try:
            keys = self._ground.tenants.find(tenant)
            if keys is None:
                return found
            hashed = {keys.replay_name(name): name for name in names}
            with self._reading:
                sealed = self._reader.replays(list(hashed))
        except (StoreError, sqlite3.Error) as error:
            _log.warning("KV replays: %s", error)
            return found
        for key, content in sealed.items():
            try:
                found[hashed[key]] = open_replay(keys, key, content)
                self._ground.uses.replays[key] = int(self._ground.clock())
            except StoreError as error:
                _log.warning("KV replays: %s", error)
        return found

    @contextlib.contextmanager
    def pin(self, tenant: str, ids: Sequence[int], shared_tokens: int = 0) -> Iterator[None]:
        """While the block runs, no row of this chain is reclaimed."""
        try:
            chains = self._prompt(tenant, ids, shared_tokens).chains
        except StoreError as error:
            _log.warning("KV pin: %s", error)
            chains = []
        with self._counting:
            self._pins.update(chains)
        try:
            yield
        finally:
            with self._counting:
                self._pins.subtract(chains)
                self._pins = +self._pins

    # -- writing

    def put(self, job: PutJob) -> PutResult:
        """Make one job durable."""
        return self.put_all([job])[0]

    def put_all(self, jobs: Sequence[PutJob]) -> list[PutResult]:
        """Make jobs durable with one sync and one commit; each is stored whole or not at all, and says why."""
        with self._write:
            if self._closed:
                return [PutResult(False, "closed")] * len(jobs)
            for attempt in range(2):
                try:
                    self._sweep()
                    return self._put(jobs)
                except (OSError, sqlite3.Error) as error:
                    self._undo()
                    if attempt or not self._mend(error):
                        return [PutResult(False, self._halt.stop(error))] * len(jobs)
                except BaseException:
                    self._undo()
                    raise
        raise AssertionError  # the second attempt returns

    def _put(self, jobs: Sequence[PutJob]) -> list[PutResult]:
        """A group there is no room for as a whole is tried job by job."""
        ground, now_s = self._ground, int(self._ground.clock())
        stopped = self._halt.reason if self._halt.holds() else ""
        writing = Writing(ground, now_s, frozenset(self._pins), stopped)
        plans = [writing.plan(job) for job in jobs]
        if stopped:
            return [_result(plan, stopped) for plan in plans]
        kept = [plan for plan in plans if isinstance(plan, Plan) and not plan.reason]
        off = ground.policy.max_bytes <= 0 and any(plan.drafts for plan in kept)
        refusal = "policy: the KV cache is switched off" if off else ""
        if not refusal and kept:
            refusal = writing.store(kept)
            if refusal and len(jobs) > 1:
                return [result for job in jobs for result in self._put([job])]
            if refusal or any(plan.drafts for plan in kept):  # a request's note alone tells nothing of the room
                self._refused = refusal
            self._kinds = None
        results = [_result(plan, refusal) for plan in plans]
        told = zip(plans, results, strict=True)
        writing.note([plan for plan, result in told if isinstance(plan, Plan) and not result.stored])
        return results

    def _sweep(self) -> None:
        now_s = self._ground.clock()
        if not self._halt.reason and abs(now_s - self._swept_s) >= _SWEEP_S:
            self._swept_s = now_s
            self._ground.write_uses()
            sweep(self._ground, frozenset(self._pins), int(now_s))

    def _begin(self) -> None:
        """Note this fingerprint for later misses, meet the bounds; a disk that refuses stops the writing, no more."""
        now_s = int(self._ground.clock())
        try:
            self._ground.index.remember(self._ground.fingerprint, now_s)
            if self._ground.policy.max_bytes > 0:
                self._refused = reserve(self._ground, 0, frozenset(), now_s)  # the first put sweeps: that takes longer
        except (OSError, sqlite3.Error) as error:
            self._undo()
            if not self._mend(error):
                self._halt.stop(error)

    def _undo(self) -> None:
        self._ground.segments.abandon()
        self._ground.rollback()

    # -- a damaged index

    def _mended(self, reader: Index, error: sqlite3.Error) -> bool:
        """For a lookup: is there another index by now, or could it be made again?"""
        with self._write:
            return not self._closed and (self._reader is not reader or self._mend(error))

    def _mend(self, error: OSError | sqlite3.Error) -> bool:
        """Make the index again where SQLite found it damaged; under the write lock. False where that is no help.

        Where the disk refuses, it is tried again a minute later (runtime/kv/halt.py), and nothing is read until then.
        """
        if not self._halt.may_mend(error):
            return False
        ground = self._ground
        try:
            with self._reading:
                self._reader.close()
                remake(ground, self._master_key)
                self._reader = Index.open(ground.directory, ground.io, read_only=True)
        except (OSError, sqlite3.Error, StoreError) as again:
            ground.index.close()  # what cannot be read is not written either
            self._halt.not_mended(again)
            return False
        self._halt.mended()
        self._kinds = None
        return True

    # -- both

    def status(self) -> KvStatus:
        """A snapshot for ``/health`` and the console."""
        ground, policy = self._ground, self._ground.policy
        kinds, segments, written_bytes = self._count()
        with self._counting:
            counts, reasons = self._counts.copy(), dict(self._miss_reasons)
        why = self._halt.reason or self._refused
        return KvStatus(
            enabled=policy.max_bytes > 0, used_bytes=ground.segments.used_bytes, max_bytes=policy.max_bytes,
            hit_tokens=counts["hit_tokens"], miss_tokens=counts["miss_tokens"], writing=not why, reason=why,
            miss_reasons=reasons, blocks=kinds.get(Kind.BLOCK, 0),
            checkpoints=kinds.get(Kind.CHECKPOINT, 0) + kinds.get(Kind.TAIL, 0), segments=segments,
            written_today_bytes=written_bytes, daily_write_bytes=policy.daily_write_bytes,
            reclaimed_bytes=ground.reclaimed_bytes, lookups=counts["lookups"], hits=counts["hits"],
            replays=counts["replays"], min_free_bytes=policy.min_free_bytes,
        )  # fmt: skip

    def _count(self) -> tuple[dict[Kind, int], int, int]:
        try:
            with self._reading:
                if self._kinds is None:
                    self._kinds = self._reader.count()
                day = int(self._ground.clock()) // DAY_S
                return self._kinds, len(self._reader.segments()), self._reader.written_today(day)
        except sqlite3.Error as error:
            _log.warning("KV index cannot be counted: %s", error)
            return {}, 0, 0

    def close(self) -> None:
        """Write what lookups noticed, release files and lock; a second call does nothing."""
        with self._write:
            if self._closed:
                return
            self._closed = True
            try:
                self._ground.write_uses()
            except (OSError, sqlite3.Error) as error:
                _log.warning("KV index: what lookups noticed is lost (%s)", error)
                self._ground.rollback()
            with self._reading:
                self._reader.close()
            self._ground.segments.close()
            self._ground.index.close()
            os.close(self._lock_fd)


def _result(plan: Plan | PutResult, refusal: str) -> PutResult:
    if isinstance(plan, PutResult):
        return plan
    why = plan.reason or (refusal if plan.drafts or plan.job.replays else "")
    return PutResult(False, why) if why else PutResult(True, "", len(plan.drafts), plan.need_bytes)
