"""From a prompt to where it can start: chains, rows, the best boundary, its records read and authenticated, or why not.

Lookups use a connection of their own and wait for no write. A record that does not open rules out the boundaries
that need it and the next shorter one is tried; one that was moved or removed meanwhile is looked up once more.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from appliance.model import BLOCK_TOKENS
from runtime.kv.files import is_short
from runtime.kv.fingerprint import difference
from runtime.kv.ground import Ground
from runtime.kv.index import Index, Row, Rows, State
from runtime.kv.job import KvHit, Sink
from runtime.kv.keys import TenantKeys
from runtime.kv.reading import ReadItem, read_records
from runtime.kv.record import PARENT_BYTES, Kind
from runtime.kv.tenants import SHARED

_OLD_FINGERPRINTS = 4  # how many earlier ones a miss is compared with
_AGAIN = 4  # how often a lookup starts over because records went to another place meanwhile
_log = logging.getLogger("solocard.kv")


@dataclass(frozen=True, slots=True)
class Link:
    """One block's end on a prompt's chain under one tenant's keys."""

    keys: TenantKeys
    chain: bytes


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's names: for each whole block up to ``count`` the tenant's link and, in its shared part, SHARED's."""

    ids: Sequence[int]
    own: TenantKeys | None
    links: tuple[tuple[Link, ...], ...]  # [count][1 or 2]

    @property
    def chains(self) -> list[bytes]:
        return [link.chain for position in self.links for link in position]


@dataclass(frozen=True, slots=True)
class Start:
    """One way to start: ``tokens`` done, the first ``blocks`` blocks needed, ``item`` the state (None for a replay)."""

    tokens: int
    blocks: int
    row: Row | None = None
    item: ReadItem | None = None


def name_prompt(
    ground: Ground, tenant: str, ids: Sequence[int], count: int, shared_tokens: int
) -> Prompt:  # fmt: skip
    """Chain hashes of the first ``count`` blocks. Raises EngineError for bad ids, StoreError for a damaged key file."""
    fingerprint = ground.fingerprint.digest
    own = ground.tenants.find(tenant)
    shared_count = min(shared_tokens // BLOCK_TOKENS, count)
    shared = ground.tenants.find(SHARED) if shared_count else None
    first = own.chain(fingerprint, ids, count) if own else []
    second = shared.chain(fingerprint, ids, shared_count) if shared else []
    links = []
    for i in range(count):
        named = [Link(own, first[i])] if own else []
        links.append((*named, Link(shared, second[i])) if shared and i < shared_count else tuple(named))
    return Prompt(ids, own, tuple(links))


class Lookup:
    """One lookup. ``ground`` is only read, but for what is noted in its ``uses``."""

    def __init__(
        self, ground: Ground, index: Index, lock: threading.Lock, prompt: Prompt, now_s: int, *, tails: bool = False
    ) -> None:  # fmt: skip
        self._ground, self._index, self._lock, self._prompt, self._now_s = ground, index, lock, prompt, now_s
        self._tails = tails
        self._rows: Rows = {}
        self._tail_names: dict[bytes, bytes] = {}  # → the parent's chain hash
        self._given = 0  # blocks the sink has
        self._changed = False  # rows moved or went since they were found

    def run(self, sink: Sink, replay_tokens: int) -> KvHit:
        """Raises sqlite3.Error; what ``sink`` raises goes through."""
        for _ in range(_AGAIN):
            self._find()
            hit = self._try(sink, replay_tokens)
            if hit:
                return hit
        _log.warning("KV lookup given up: its records moved %d times meanwhile", _AGAIN)
        return self._hit(Start(0, 0), None, 0)

    # -- rows

    def _find(self) -> None:
        with self._lock:
            found = self._index.find(self._prompt.chains)
            own = [links[0].chain for links in self._prompt.links] if self._prompt.own else []
            self._tail_names = self._name_tails(self._ground.fingerprint.digest, own)
            found |= self._index.find(list(self._tail_names))
        self._rows = {key: self._ground.uses.seen(row) for key, row in found.items()}
        self._changed = False

    def _name_tails(self, fingerprint: bytes, chain: Sequence[bytes]) -> dict[bytes, bytes]:
        """Name → parent of the tenant's tails that are prefixes of the prompt, each proved by its name."""
        keys, ids = self._prompt.own, self._prompt.ids
        if keys is None or not self._tails:
            return {}
        by_tag = {parent[:PARENT_BYTES]: (i, parent) for i, parent in enumerate((keys.root(fingerprint), *chain))}
        named: dict[bytes, bytes] = {}
        for tag, name, end in self._index.tails(list(by_tag)):
            i, parent = by_tag[tag]
            fits = i * BLOCK_TOKENS <= end < (i + 1) * BLOCK_TOKENS and 0 < end < len(ids)
            if fits and keys.tail_name(parent, ids[i * BLOCK_TOKENS : end]) == name:
                named[name] = parent
        return named

    def _tail_rows(self) -> Iterator[tuple[Row, bytes]]:
        """Rows of the prompt's tails, whatever their state, and their parents."""
        for name, parent in self._tail_names.items():
            row = self._rows.get((name, Kind.TAIL))
            if row:
                yield row, parent

    def _live(self, position: int, kind: Kind) -> tuple[Row, Link] | None:
        """The readable row that ends ``position`` + 1 blocks, the tenant's own first."""
        for link in self._prompt.links[position]:
            row = self._rows.get((link.chain, kind))
            if row and row.readable and not self._expired(row):
                return row, link
        return None

    def _expired(self, row: Row) -> bool:
        return row.kind is not Kind.BLOCK and self._ground.policy.expired(row.role, row.used_s, self._now_s)

    def _reach(self) -> int:
        count = 0
        while count < len(self._prompt.links) and self._live(count, Kind.BLOCK):
            count += 1
        return count

    # -- ways to start

    def _best(self, reach: int, replay_tokens: int) -> Start | None:
        """The longest start that ``reach`` blocks allow; of equal ones an exact state wins over a replay."""
        starts = [*self._checkpoints(reach), *self._tail_starts(reach)]
        begin = reach * BLOCK_TOKENS - replay_tokens
        if replay_tokens > 0 and reach and begin >= 0:
            starts.append(Start(begin, reach))
        return max(starts, key=lambda start: (start.tokens, start.item is not None), default=None)

    def _checkpoints(self, reach: int) -> Iterator[Start]:
        for count in range(1, reach + 1):
            found = self._live(count - 1, Kind.CHECKPOINT)
            if found:
                yield Start(count * BLOCK_TOKENS, count, found[0], self._item(*found))

    def _tail_starts(self, reach: int) -> Iterator[Start]:
        keys = self._prompt.own
        for row, parent in self._tail_rows():
            if keys and row.readable and not self._expired(row) and row.end_token // BLOCK_TOKENS <= reach:
                header = self._ground.header(keys, row, parent[:PARENT_BYTES])
                item = ReadItem(row.segment, header, keys.cipher)
                yield Start(row.end_token, row.end_token // BLOCK_TOKENS, row, item)

    def _try(self, sink: Sink, replay_tokens: int) -> KvHit | None:
        """Ways to start from the longest down; None when rows changed meanwhile and have to be found again.

        Each turn either ends or rules out one record, so there are no more turns than records.
        """
        while not self._changed:
            reach = self._reach()
            start = self._best(reach, replay_tokens)
            if start is None:
                return self._hit(Start(0, 0), None, reach)
            state = self._read(start, sink)
            if state is not None:
                return self._hit(start, state, reach)
        return None

    def _read(self, start: Start, sink: Sink) -> bytes | None:
        """Read the state (empty for a replay), then the blocks the sink lacks; None where a record does not open."""
        rows, items, states = [], [], []
        if start.row and start.item:
            rows.append(start.row)
            items.append(start.item)
        ahead = len(items)
        for position in range(self._given, start.blocks):
            found = self._live(position, Kind.BLOCK)
            if found is None:
                break
            rows.append(found[0])
            items.append(self._item(*found))

        def take(i: int, payload: memoryview) -> None:
            if i < ahead:
                states.append(bytes(payload))
            else:
                sink(self._given, payload)
                self._given += 1

        given, error = read_records(self._ground.segments, items, take)
        if error:
            self._doubt(rows[given], error)
            return None
        return states[0] if states else b""

    def _item(self, row: Row, link: Link) -> ReadItem:
        return ReadItem(row.segment, self._ground.header(link.keys, row), link.keys.cipher)

    def _doubt(self, row: Row, error: Exception) -> None:
        """A record did not open: it moved or was removed meanwhile, or it is damaged and noted as that.

        What the system refused for want of files or memory is left out of this lookup only.
        """
        key = row.chain, row.kind
        with self._lock:
            now = self._index.find([row.chain]).get(key)
        if now is None or now.place != row.place or not now.readable:
            self._changed = True
            return
        _log.warning("KV record set aside in segment %04d: %s", row.segment, error)
        if not is_short(error):
            self._ground.uses.damaged[key] = row
        self._rows[key] = dataclasses.replace(row, state=State.DAMAGED)

    # -- the answer

    def _hit(self, start: Start, state: bytes | None, reach: int) -> KvHit:
        uses = self._ground.uses
        for position in range(start.blocks):
            found = self._live(position, Kind.BLOCK)
            if found:
                uses.touch((found[0].chain, Kind.BLOCK), self._now_s)
        if start.row:
            uses.touch((start.row.chain, start.row.kind), self._now_s)
        tail = start.row is not None and start.row.kind is Kind.TAIL
        replay = start.item is None and start.blocks > 0
        return KvHit(
            start.tokens, start.blocks, None if tail or replay or not start.row else state, state if tail else None,
            replay, self._why(start, replay), reach * BLOCK_TOKENS,
        )  # fmt: skip

    def _why(self, start: Start, replay: bool) -> str:
        """Why the longest usable boundary was not reached; empty when it was."""
        links = self._prompt.links
        boundary = len(links) * BLOCK_TOKENS
        if start.tokens and start.tokens >= boundary and not replay:
            return ""
        beyond = [self._rows.get((link.chain, kind)) for position in links[start.tokens // BLOCK_TOKENS :]
                  for link in position for kind in (Kind.BLOCK, Kind.CHECKPOINT)]  # fmt: skip
        rows = [row for row in beyond if row] + [row for row, _ in self._tail_rows() if row.end_token > start.tokens]
        if any(row.state is State.DAMAGED for row in rows):
            return "corrupt"
        units = [row for row in rows if row.kind is not Kind.BLOCK]
        if any(row.state is State.EXPIRED or (row.readable and self._expired(row)) for row in units):
            return "ttl"
        if any(row.state is State.EVICTED or row.readable for row in units):
            return "evicted"  # a readable one is here because blocks below it are gone
        if start.tokens or start.blocks:
            return "no-unit"
        return self._other_fingerprint() or ("no-unit" if links else "too-short")

    def _other_fingerprint(self) -> str:
        """``fingerprint: FIELDS`` when the prompt was stored by a server that computed otherwise."""
        keys, count = self._prompt.own, len(self._prompt.links)
        if keys is None:
            return ""
        mine = self._ground.fingerprint
        with self._lock:
            for old in self._index.other_fingerprints(mine.digest, _OLD_FINGERPRINTS):
                chain = keys.chain(old.digest, self._prompt.ids, count)
                rows = self._index.find([*chain, *self._name_tails(old.digest, chain)])
                if any(row.kind is not Kind.BLOCK and row.readable for row in rows.values()):
                    return f"fingerprint: {difference(old, mine)}"
        return ""
