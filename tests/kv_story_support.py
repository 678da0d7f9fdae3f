"""A story that fills a store in every way it knows.

A story is a list of steps that follow from a seed: puts of chains that share prefixes, by several tenants, with tails,
in groups; reclaim under a small quota; a purge; restarts. ``tell`` prints what is acknowledged:

    begin K        step K is about to start
    done K NAMES   it is acknowledged; NAMES (JSON) are the records that the store has now

``seeded`` makes two tellings of a story alike, to the byte. What must be left after a fault: ``kv_fault_support``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kv_support import MASTER_KEY, TINY, make_fingerprint, make_spec

from runtime.kv.files import Io
from runtime.kv.layout import KvLayout
from runtime.kv.policy import Policy
from runtime.kv.record import Kind, Role
from runtime.kv.store import KvHit, KvStore, PutJob, PutResult, TailUnit, Unit
from runtime.kv.tail import tail_bytes
from runtime.kv.tenants import Tenants
from runtime.kv.writer import Writer

NOW_S = 1_800_000_000
SEGMENT_BYTES = 160 * 1024
SMALL_QUOTA = 7 * SEGMENT_BYTES
QUOTA = 1 << 30
TENANTS = ("default", "bob", "eve")
_FORK_TOKENS = 512  # chats of one family are alike up to here


@dataclass(frozen=True, slots=True)
class Piece:
    """One put: a tenant's chat up to ``tokens`` (a multiple of 256), checkpoints at ``units``, a tail or none."""

    tenant: str
    chat: int
    tokens: int
    units: tuple[int, ...]
    tail: int = 0  # tokens of the exact tail, 0 = none


@dataclass(frozen=True, slots=True)
class Step:
    """``what``: put (of ``pieces``, in one group), look, purge (of ``tenant``) or restart."""

    what: str
    pieces: tuple[Piece, ...] = ()
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Story:
    seed: int
    max_bytes: int
    steps: tuple[Step, ...]

    @property
    def pieces(self) -> list[Piece]:
        return [piece for step in self.steps for piece in step.pieces]

    @property
    def chats(self) -> dict[tuple[str, int], int]:
        """(tenant, chat) → the longest prefix that is ever stored, tails not counted."""
        found: dict[tuple[str, int], int] = {}
        for piece in self.pieces:
            found[piece.tenant, piece.chat] = max(piece.tokens, found.get((piece.tenant, piece.chat), 0))
        return found


def make_story(seed: int, *, small: bool) -> Story:
    """About 16 steps. ``small``: under a quota that forces reclaims."""
    rng = random.Random(f"story {seed}")
    steps: list[Step] = []
    lengths: dict[tuple[str, int], int] = {}
    for k in range(16):
        if k == 11:
            steps.append(Step("purge", tenant="eve"))
        elif k in (5, 13):
            steps.append(Step("restart"))
        elif k % 4 == 3 and lengths:
            tenant, chat = rng.choice(list(lengths))
            steps.append(Step("look", (Piece(tenant, chat, lengths[tenant, chat], ()),)))
        else:
            count = rng.choice([1, 1, 1, 2, 3])
            steps.append(Step("put", tuple(_piece(rng, lengths) for _ in range(count))))
    return Story(seed, SMALL_QUOTA if small else QUOTA, tuple(steps))


def _piece(rng: random.Random, lengths: dict[tuple[str, int], int]) -> Piece:
    tenant, chat = rng.choice([*TENANTS, "default"]), rng.randrange(6)
    before = lengths.get((tenant, chat), 0)
    tokens = min(1280, before + 256 * rng.choice([1, 1, 2, 3]))
    lengths[tenant, chat] = tokens
    units = {tokens, rng.choice(range(256, tokens + 1, 256))}
    tail = rng.choice([0, 0, 0, tokens, tokens + rng.choice([1, 3, 4, 5, 20, 129])])
    return Piece(tenant, chat, tokens, tuple(sorted(units)), tail)


# -- contents: everything follows from names alone


@functools.cache
def layout() -> KvLayout:
    """Tiny, with few words, so that a tail's logits are small."""
    return KvLayout.from_spec(make_spec(dataclasses.replace(TINY, vocab_size=256)))


@functools.cache
def ids_of(chat: int, tokens: int) -> Sequence[int]:
    """Chats of a family (chat mod 3) are alike in their first 512 tokens; a longer prompt begins with the shorter."""
    family = [(chat % 3 * 7919 + i * 31 + i // 256) % 129280 for i in range(min(tokens, _FORK_TOKENS))]
    return family + [(1_000 + chat * 104_729 + i * 17 + i // 256) % 129280 for i in range(_FORK_TOKENS, tokens)]


def _origin(chat: int, tokens: int) -> str:
    return f"family {chat % 3}" if tokens <= _FORK_TOKENS else f"chat {chat}"


def block_payload(chat: int, i: int) -> bytes:
    return _noise(f"block {_origin(chat, 256 * i + 256)} {i}", layout().block_bytes)


def checkpoint_payload(chat: int, tokens: int) -> bytes:
    return _noise(f"checkpoint {_origin(chat, tokens)} {tokens}", layout().checkpoint_bytes)


def tail_payload(chat: int, tokens: int) -> bytes:
    return _noise(f"tail {_origin(chat, tokens)} {tokens}", tail_bytes(layout(), tokens))


@functools.cache
def _noise(name: str, size_bytes: int) -> bytes:
    return hashlib.shake_128(name.encode()).digest(size_bytes)


def job_of(piece: Piece) -> PutJob:
    ids = ids_of(piece.chat, max(piece.tokens, piece.tail))
    return PutJob(
        piece.tenant, ids, {i: block_payload(piece.chat, i) for i in range(piece.tokens // 256)},
        tuple(Unit(tokens, Role.ANSWER if tokens == piece.tokens else Role.ANCHOR,
                   checkpoint_payload(piece.chat, tokens)) for tokens in piece.units),
        TailUnit(ids[: piece.tail], tail_payload(piece.chat, piece.tail)) if piece.tail else None,
        replays={call_of(piece.chat, piece.tokens): ids[: piece.tokens // 8]},
    )  # fmt: skip


def call_of(chat: int, tokens: int) -> str:
    """The name under which a put keeps the first eighth of its token ids, as if they were a tool call's."""
    return f"call:{chat} {tokens}"


# -- telling it


def open_faulty(
    directory: Path, story: Story, io: Io | None = None, now_s: int = NOW_S, master_key: bytes = MASTER_KEY
) -> KvStore:  # fmt: skip
    """The store of a story, as every telling and every check opens it."""
    return KvStore.open(
        directory, layout=layout(), fingerprint=make_fingerprint(layout()), master_key=master_key,
        policy=Policy(max_bytes=story.max_bytes), io=io, segment_bytes=SEGMENT_BYTES, clock=lambda: float(now_s),
    )  # fmt: skip


@contextlib.contextmanager
def seeded(seed: object) -> Iterator[None]:
    """Inside, ``secrets`` follows from ``seed``: two tellings write the same bytes to the same places."""
    rng, real = random.Random(f"secrets {seed}"), (secrets.token_bytes, secrets.token_hex)
    secrets.token_bytes = lambda size=32: rng.randbytes(size)
    secrets.token_hex = lambda size=32: rng.randbytes(size).hex()
    try:
        yield
    finally:
        secrets.token_bytes, secrets.token_hex = real


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one call: nobody reads half a line


def put_directly(store: KvStore, jobs: list[PutJob]) -> list[PutResult | None]:
    return [*store.put_all(jobs)]


def put_by_writer(store: KvStore, jobs: list[PutJob]) -> list[PutResult | None]:
    """The way of a request: the writer's thread takes them, the tickets say when they are on disk."""
    writer = Writer(store)
    tickets = [writer.submit(job) for job in jobs]
    results = [ticket.wait(60.0) for ticket in tickets]
    assert writer.close(60.0)
    return results


def tell(
    directory: Path, story: Story, io: Io, say: Callable[[str], None] = say,
    put: Callable[[KvStore, list[PutJob]], list[PutResult | None]] = put_directly,
) -> None:  # fmt: skip
    """Do the story's steps and say what is acknowledged; a put that is not stored ends it with an error."""
    store = open_faulty(directory, story, io)
    before: Places = {}
    for number, step in enumerate(story.steps):
        say(f"begin {number}")
        now_s = NOW_S + 60 * number
        if step.what == "put":
            results = put(store, [job_of(piece) for piece in step.pieces])
            assert all(result and result.stored for result in results), results
        elif step.what == "look":
            look(store, step.pieces[0].tenant, step.pieces[0].chat, step.pieces[0].tokens + 1)
        elif step.what == "purge":
            Tenants(directory, MASTER_KEY, io).purge(step.tenant)
        else:
            store.close()
            store = open_faulty(directory, story, io, now_s)
        after = places(directory)
        _explain(directory, story, step, before, after)
        say(f"done {number} {json.dumps(sorted(names(directory, story, after)))}")
        before = after
    store.close()


Places = dict[tuple[bytes, int], int]
REPLAY, NO_SEGMENT = 0, -1  # beside the records' kinds and segments: ids kept under a name, in the index itself


def places(directory: Path) -> Places:
    """(chain hash or name, kind) → segment of everything that the index has now and would read."""
    uri = f"file:{directory / 'index.sqlite3'}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        rows = db.execute("SELECT chain, kind, segment FROM record WHERE state IN (0, 4)")
        found = {(chain, kind): segment for chain, kind, segment in rows}
        return found | {(name, REPLAY): NO_SEGMENT for (name,) in db.execute("SELECT name FROM replay")}


def _explain(directory: Path, story: Story, step: Step, before: Places, after: Places) -> None:
    """What was just acknowledged is listed; what is listed no more was in a segment that is gone."""
    if step.what == "put":
        missing = {name for piece in step.pieces for name in names_of(piece)} - names(directory, story, after)
        assert not missing, f"acknowledged and not listed: {missing}"
    for key in before.keys() - after.keys():
        assert not (directory / f"{before[key]:04d}.kvs").exists(), "a record is gone, its segment is not"


def names_of(piece: Piece) -> set[str]:
    """The records of one put."""
    where = f"{piece.tenant}/{piece.chat}"
    found = {f"{where}/block/{i}" for i in range(piece.tokens // 256)}
    found |= {f"{where}/unit/{tokens}" for tokens in piece.units} | {f"{where}/replay/{piece.tokens}"}
    return found | ({f"{where}/tail/{piece.tail}"} if piece.tail else set())


@dataclass(frozen=True, slots=True)
class Found:
    """A hit and every block that the sink saw, those that do not count too."""

    hit: KvHit
    seen: dict[int, bytes]


def look(store: KvStore, tenant: str, chat: int, tokens: int, *, tails: bool = False) -> Found:
    seen: dict[int, bytes] = {}

    def sink(index: int, payload: memoryview) -> None:
        seen[index] = bytes(payload)

    hit = store.lookup(tenant, ids_of(chat, tokens), sink, tails=tails)
    return Found(hit, seen)


def names(directory: Path, story: Story, listed: Places | None = None) -> set[str]:
    """What the index has now: ``tenant/chat/block/i``, ``…/unit/tokens``, ``…/tail/tokens``, ``…/replay/tokens``."""
    rows = places(directory) if listed is None else listed
    return {name for key, found in named(directory, story).items() if key in rows for name in found}


def named(directory: Path, story: Story) -> dict[tuple[bytes, int], set[str]]:
    """(chain hash, kind) → what a record with it is to the story; chats that begin alike share records."""
    fingerprint, tenants = make_fingerprint(layout()).digest, Tenants(directory, MASTER_KEY)
    found: dict[tuple[bytes, int], set[str]] = {}
    for (tenant, chat), tokens in story.chats.items():
        keys = tenants.find(tenant)
        if keys is None:
            continue
        chain = keys.chain(fingerprint, ids_of(chat, tokens), tokens // 256)
        for i, link in enumerate(chain):
            found.setdefault((link, Kind.BLOCK), set()).add(f"{tenant}/{chat}/block/{i}")
            found.setdefault((link, Kind.CHECKPOINT), set()).add(f"{tenant}/{chat}/unit/{256 * i + 256}")
        for piece in story.pieces:
            if (piece.tenant, piece.chat) == (tenant, chat):
                key = keys.replay_name(call_of(chat, piece.tokens)), REPLAY
                found.setdefault(key, set()).add(f"{tenant}/{chat}/replay/{piece.tokens}")
            if (piece.tenant, piece.chat) == (tenant, chat) and piece.tail:
                whole = piece.tail // 256
                parent = chain[whole - 1] if whole else keys.root(fingerprint)
                link = keys.tail_name(parent, ids_of(chat, piece.tail)[256 * whole :])
                found.setdefault((link, Kind.TAIL), set()).add(f"{tenant}/{chat}/tail/{piece.tail}")
    return found
