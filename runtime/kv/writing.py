"""Jobs onto the disk: what is missing of each, room for it, one write, one sync, one commit for the whole group."""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag

from appliance.errors import EngineError, SolocardError, StoreError
from appliance.model import BLOCK_TOKENS
from runtime.kv import requests
from runtime.kv.ground import NO_PARENT, Ground
from runtime.kv.index import Row, RowKey, Rows, State
from runtime.kv.job import PutJob, PutResult
from runtime.kv.keys import TenantKeys
from runtime.kv.policy import DAY_S
from runtime.kv.reclaim import reserve
from runtime.kv.record import PARENT_BYTES, Kind, RecordHeader, Role
from runtime.kv.tenants import SHARED

Link = tuple[TenantKeys, bytes]  # one block's end: under whose keys, its chain hash
Links = Sequence[Link]
_NONCE_BYTES = 12
_ENDS = frozenset({Role.PROMPT, Role.ANSWER})  # of these the newest of a conversation supersedes the earlier ones
_log = logging.getLogger("solocard.kv")


@dataclass(frozen=True, slots=True)
class Draft:
    """A record to be written; epoch and place of the header come later."""

    keys: TenantKeys
    header: RecordHeader
    payload: bytes


@dataclass(slots=True)
class Plan:
    """What one job needs. ``reason``: why it is refused, empty while it is not."""

    job: PutJob
    keys: TenantKeys
    chain: list[bytes]  # the tenant's own, h_1 …
    pinned: set[bytes]
    drafts: list[Draft] = field(default_factory=list)
    used: list[RowKey] = field(default_factory=list)  # stored already
    superseded: list[Row] = field(default_factory=list)
    tails: list[tuple[bytes, bytes, int]] = field(default_factory=list)
    reason: str = ""

    @property
    def need_bytes(self) -> int:
        return sum(draft.header.size_bytes for draft in self.drafts)


class Writing:
    """One group of jobs under the store's write lock. ``stopped``: why nothing may be written, empty where it may."""

    def __init__(self, ground: Ground, now_s: int, pinned: Set[bytes], stopped: str = "") -> None:
        self._ground, self._now_s, self._pinned, self._stopped = ground, now_s, pinned, stopped
        self._planned: set[RowKey] = set()

    def plan(self, job: PutJob) -> Plan | PutResult:
        """Raises sqlite3.Error and OSError (a tenant's new file); a wrong call is a refusal."""
        try:
            if self._stopped and not self._has_keys(job):
                return PutResult(False, self._stopped)
            return self._plan(job)
        except SolocardError as error:
            _log.warning("KV job refused: %s", error)
            return PutResult(False, f"invalid: {error}")

    def store(self, plans: Sequence[Plan]) -> str:
        """Make room, write, sync, commit; empty, or why there is no room. OSError or sqlite3.Error: undo."""
        ground = self._ground
        sizes = [draft.header.size_bytes for plan in plans for draft in plan.drafts]
        if sizes:
            reason = self._make_room(plans, ground.segments.need_bytes(sizes))
            if reason:
                return reason
        for plan in plans:
            for key in plan.used:
                ground.uses.touch(key, self._now_s, hits=0)
        if not sizes and not any(plan.superseded or plan.job.replays or plan.job.note for plan in plans):
            return ""
        before = ground.segments.total_bytes
        rows = [self._append(draft) for plan in plans for draft in plan.drafts]
        if rows:
            ground.segments.sync()
        ground.index.begin()
        ground.index.add(rows, ground.segments.pending())
        for plan in plans:
            ground.index.set_state(plan.superseded, State.SUPERSEDED)
            ground.index.add_tails(plan.tails)
            self._add_replays(plan)
        self._add_notes(plans)
        ground.index.add_written(self._now_s // DAY_S, ground.segments.total_bytes - before)
        uses = ground.flush()
        ground.index.commit()
        ground.segments.accept()
        ground.uses.forget(uses)
        return ""

    def note(self, plans: Iterable[Plan]) -> None:
        """Commit the request log of jobs that are not stored."""
        plans = [plan for plan in plans if plan.job.note]
        if not plans:
            return
        self._ground.index.begin()
        self._add_notes(plans)
        self._ground.index.commit()

    # -- planning

    def _has_keys(self, job: PutJob) -> bool:
        """Are the job's tenants there, so that planning makes no file?"""
        names = [job.tenant, SHARED] if job.shared_tokens else [job.tenant]
        return all(self._ground.tenants.find(name) for name in names)

    def _plan(self, job: PutJob) -> Plan:
        ground = self._ground
        ids, count = _extent(job)
        keys = ground.tenants.create(job.tenant)
        chain = keys.chain(ground.fingerprint.digest, ids, count)
        shared_count = min(job.shared_tokens // BLOCK_TOKENS, count)
        shared = ground.tenants.create(SHARED) if shared_count else keys
        links = [(shared, h) for h in shared.chain(ground.fingerprint.digest, ids, shared_count)]
        links += [(keys, h) for h in chain[shared_count:]]
        plan = Plan(job, keys, chain, {*chain, *(h for _, h in links)})
        names = [h for _, h in links] + chain[:shared_count]
        tail = _tail_name(ground, keys, chain, job)
        rows = {key: ground.uses.seen(row) for key, row in ground.index.find([*names, *tail[:1]]).items()}
        self._plan_blocks(plan, links, rows)
        self._plan_units(plan, links, rows, shared_count)
        if tail and not plan.reason:
            self._plan_tail(plan, links, rows, *tail)
        for draft in plan.drafts:
            self._planned.add((draft.header.chain, draft.header.kind))
        return plan

    def _plan_blocks(self, plan: Plan, links: Links, rows: Rows) -> None:
        for i in sorted(plan.job.blocks):
            self._want(plan, rows, links[i], Kind.BLOCK, Role.NONE, (i + 1) * BLOCK_TOKENS, plan.job.blocks[i])

    def _plan_units(
        self, plan: Plan, links: Links, rows: Rows, shared_count: int
    ) -> None:  # fmt: skip
        for unit in plan.job.units:
            count = unit.tokens // BLOCK_TOKENS
            if not self._complete(plan, links[:count], rows):
                return
            self._want(plan, rows, links[count - 1], Kind.CHECKPOINT, unit.role, unit.tokens, unit.payload)
            if unit.role in _ENDS:
                earlier = [rows.get((h, Kind.CHECKPOINT)) for h in plan.chain[: count - 1]]
                plan.superseded += [r for r in earlier if r and r.state is State.LIVE and r.role in _ENDS]

    def _plan_tail(self, plan: Plan, links: Links, rows: Rows, name: bytes, parent: bytes) -> None:
        tail = plan.job.tail
        if tail is None or not self._complete(plan, links[: len(tail.ids) // BLOCK_TOKENS], rows):
            return
        tag = parent[:PARENT_BYTES]
        link = (plan.keys, name)
        if self._want(plan, rows, link, Kind.TAIL, Role.SUSPENDED, len(tail.ids), tail.payload, tag):
            plan.tails.append((tag, name, len(tail.ids)))

    def _complete(self, plan: Plan, links: Links, rows: Rows) -> bool:
        """Every block is stored or in this group, under the tenant or SHARED; else the job is refused."""
        mine = {d.header.chain for d in plan.drafts if d.header.kind is Kind.BLOCK}
        for i, (_, chain) in enumerate(links):
            names = {chain, plan.chain[i]}
            stored = any(_readable(rows, name, Kind.BLOCK) or (name, Kind.BLOCK) in self._planned for name in names)
            if not stored and not names & mine:
                plan.reason = "evicted"
                plan.drafts.clear()
                plan.tails.clear()
                return False
        return True

    def _want(
        self, plan: Plan, rows: Rows, link: Link, kind: Kind, role: Role, end_token: int,
        payload: bytes, parent: bytes = NO_PARENT,
    ) -> bool:  # fmt: skip
        """Plan one record unless it is there; False when it is."""
        keys, chain = link
        expected = self._ground.payload_bytes(kind, end_token)
        if len(payload) != expected:
            raise EngineError(f"KV {kind.name.lower()} has {len(payload)} bytes, the layout says {expected}")
        if (chain, kind) in self._planned or _readable(rows, chain, kind):
            plan.used.append((chain, kind))
            return False
        first = end_token - BLOCK_TOKENS if kind is Kind.BLOCK else 0
        header = RecordHeader(kind, self._ground.fingerprint_id, keys.tenant_id, chain, first, end_token, expected,
                              bytes(8), 0, self._now_s, role, parent)  # fmt: skip
        plan.drafts.append(Draft(keys, header, payload))
        return True

    # -- writing

    def _make_room(self, plans: Sequence[Plan], need_bytes: int) -> str:
        ground, policy = self._ground, self._ground.policy
        scarce = policy.min_free_bytes > 0 and ground.free_disk_bytes() < policy.min_free_bytes + need_bytes
        if scarce or ground.used_bytes() + need_bytes > policy.max_bytes:
            ground.write_uses()
        pinned = set(self._pinned).union(*(plan.pinned for plan in plans))
        return reserve(ground, need_bytes, pinned, self._now_s)

    def _append(self, draft: Draft) -> Row:
        ground = self._ground
        number, header = ground.segments.append(draft.header, draft.payload, draft.keys.cipher, self._now_s)
        return Row(
            header.chain, header.kind, header.role, header.tenant_id, header.fingerprint_id, header.end_token, number,
            header.offset, header.size_bytes, header.epoch, header.key_generation, header.created_s, self._now_s,
        )  # fmt: skip

    def _add_replays(self, plan: Plan) -> None:
        sealed = []
        for name, ids in plan.job.replays.items():
            key, nonce = plan.keys.replay_name(name), secrets.token_bytes(_NONCE_BYTES)
            packed = struct.pack(f"<{len(ids)}I", *ids)
            sealed.append((key, plan.keys.tenant_id, nonce + plan.keys.replay_cipher.encrypt(nonce, packed, key),
                           self._now_s))  # fmt: skip
        self._ground.index.add_replays(sealed)

    def _add_notes(self, plans: Iterable[Plan]) -> None:
        for plan in plans:
            if plan.job.note:
                requests.insert(self._ground.index.connection, plan.job.note, plan.keys.tenant_id, plan.chain)


def open_replay(keys: TenantKeys, name: bytes, sealed: bytes) -> list[int]:
    """The ids of a stored replay; StoreError where it is not authentic."""
    try:
        packed = keys.replay_cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], name)
    except (InvalidTag, ValueError):
        raise StoreError("a replay of the KV index is not authentic") from None
    return [i for (i,) in struct.iter_unpack("<I", packed)]


def _extent(job: PutJob) -> tuple[Sequence[int], int]:
    """The ids that name the job and how many whole blocks of them count; EngineError for a job that cannot be."""
    ids, count = job.ids, 0
    if job.tail is not None:
        if not job.tail.ids:
            raise EngineError("a tail has at least one token")
        shorter = min(len(ids), len(job.tail.ids))
        if list(ids[:shorter]) != list(job.tail.ids[:shorter]):
            raise EngineError("the tail's ids are not those of the job")
        ids, count = max(ids, job.tail.ids, key=len), len(job.tail.ids) // BLOCK_TOKENS
    if job.shared_tokens % BLOCK_TOKENS or job.shared_tokens < 0:
        raise EngineError(f"shared_tokens is a multiple of {BLOCK_TOKENS}, not {job.shared_tokens}")
    for unit in job.units:
        if unit.tokens % BLOCK_TOKENS or unit.tokens <= 0:
            raise EngineError(f"a checkpoint is at a multiple of {BLOCK_TOKENS} tokens, not {unit.tokens}")
        count = max(count, unit.tokens // BLOCK_TOKENS)
    if min(job.blocks, default=0) < 0:
        raise EngineError("a block has an index of 0 or more")
    count = max(count, max(job.blocks, default=-1) + 1)
    if count * BLOCK_TOKENS > len(ids):
        raise EngineError(f"{len(ids)} token ids cannot name {count} blocks")
    for name, replay in job.replays.items():
        if any(not 0 <= i < 1 << 32 for i in replay):
            raise EngineError(f"replay {name}: ids below 2^32 only")
    if job.note:
        count = max(count, min(job.note.prompt_tokens, len(ids)) // BLOCK_TOKENS)
    return ids, count


def _tail_name(ground: Ground, keys: TenantKeys, chain: list[bytes], job: PutJob) -> tuple[bytes, bytes] | tuple[()]:
    """Name and parent of the job's tail."""
    if job.tail is None:
        return ()
    count = len(job.tail.ids) // BLOCK_TOKENS
    parent = chain[count - 1] if count else keys.root(ground.fingerprint.digest)
    return keys.tail_name(parent, job.tail.ids[count * BLOCK_TOKENS :]), parent


def _readable(rows: Rows, chain: bytes, kind: Kind) -> bool:
    row = rows.get((chain, kind))
    return row is not None and row.readable
