"""Regions of a store's files, found from the format's description alone, and copies of a store to change one in."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kv_fault_support import next_put, reach, reach_tail, wrong_bits
from kv_story_support import Found, Story, job_of, look, make_story, named, names, names_of, open_faulty, seeded, tell

from runtime.kv.files import Io

PAGE_BYTES = 4096
HEADER_BYTES, TAG_BYTES = 128, 16
FIELDS = {
    "magic": (0, 4), "format": (4, 6), "kind": (6, 7), "cipher": (7, 8), "fingerprint_id": (8, 24),
    "tenant_id": (24, 40), "chain": (40, 72), "first_token": (72, 80), "end_token": (80, 88),
    "payload_bytes": (88, 96), "epoch": (96, 104), "place": (104, 108), "key_generation": (108, 112),
    "created_s": (112, 120), "role": (120, 121), "parent": (121, 128),
}  # fmt: skip
KINDS = {1: "block", 2: "checkpoint", 3: "tail", 4: "footer"}


@dataclass(frozen=True, slots=True)
class Record:
    """Where a record lies and what it is, by its own header."""

    path: Path
    offset: int
    kind: str
    chain: bytes
    payload_bytes: int

    @property
    def size_bytes(self) -> int:
        return -(-(HEADER_BYTES + self.payload_bytes + TAG_BYTES) // PAGE_BYTES) * PAGE_BYTES

    @property
    def key(self) -> tuple[bytes, int]:
        return self.chain, next(number for number, kind in KINDS.items() if kind == self.kind)

    @property
    def regions(self) -> dict[str, tuple[int, int]]:
        """Name → bytes [begin, end) of the file. ``padding`` is the only one that nothing vouches for."""
        body = HEADER_BYTES + self.payload_bytes
        within = dict(FIELDS)
        within["ciphertext start"] = (HEADER_BYTES, HEADER_BYTES + 16)
        within["ciphertext middle"] = (HEADER_BYTES + self.payload_bytes // 2, body - self.payload_bytes // 2 + 16)
        within["ciphertext end"] = (body - 16, body)
        within["tag"] = (body, body + TAG_BYTES)
        within["padding"] = (body + TAG_BYTES, self.size_bytes)
        return {name: (self.offset + begin, self.offset + end) for name, (begin, end) in within.items() if begin < end}


def records(directory: Path) -> Iterator[Record]:
    """Every record of every segment, footers too."""
    for path in sorted(directory.glob("*.kvs")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            if data[at : at + 4] != b"SKVR":
                at += PAGE_BYTES  # the block that ends a sealed segment
                continue
            (payload_bytes,) = struct.unpack_from("<Q", data, at + 88)
            record = Record(path, at, KINDS[data[at + 6]], data[at + 40 : at + 72], payload_bytes)
            yield record
            at += record.size_bytes


class Vault:
    """A finished story in ``origin``; ``copy`` gives a fresh copy to damage."""

    def __init__(self, folder: Path, seed: int, *, small: bool = False, secrets_seed: str = "one") -> None:
        self.folder, self.origin, self.here = folder, folder / f"origin {seed}", folder / "damaged"
        self.story: Story = make_story(seed, small=small)
        with seeded(secrets_seed):
            tell(self.origin, self.story, Io(), lambda line: None)
        self.names = named(self.origin, self.story)
        self.stored = frozenset(names(self.origin, self.story))
        self.records = list(records(self.origin))

    def copy(self) -> Path:
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self.origin, self.here)
        return self.here

    def what(self, record: Record) -> frozenset[str]:
        """What the record is to the story; empty for footers and for records no row names any more."""
        return frozenset(self.names.get(record.key, ())) & self.stored

    def lookups(self) -> list[tuple[str, int, int]]:
        """(tenant, chat, boundary) of every stored checkpoint that can be reached."""
        found = []
        for (tenant, chat), tokens in self.story.chats.items():
            for boundary in range(256, tokens + 1, 256):
                if reach(self.stored, tenant, chat, boundary) == boundary:
                    found.append((tenant, chat, boundary))
        return found

    def check(self, lost: frozenset[str], reasons: tuple[str, ...] = ("corrupt",)) -> list[str]:
        """Look everything up in ``here``: what does not need ``lost`` is served, the rest is a miss with a reason."""
        left, found = self.stored - lost, list[str]()
        store = open_faulty(self.here, self.story)
        try:
            for tenant, chat, boundary in self.lookups():
                what, need = f"{tenant}/{chat} at {boundary}", reach(left, tenant, chat, boundary)
                hit = look(store, tenant, chat, boundary + 1)
                found += wrong_bits(hit, chat, what)
                if hit.hit.tokens != need:
                    found.append(f"{what}: {hit.hit.tokens} tokens, not {need}")
                wanted = ("",) if need == boundary else reasons
                if hit.hit.reason not in wanted:
                    found.append(f"{what}: {hit.hit.tokens} tokens, reason {hit.hit.reason!r}, not {wanted}")
            found += self._tails(store, left)
            if store.status().used_bytes != sum(path.stat().st_size for path in self.here.glob("*.kvs")):
                found.append("accounting")
        finally:
            store.close()
        return found

    def flip_region(self, record: Record, region: str, rng: random.Random) -> str:
        """Flip one bit of the region in a fresh copy; which, in words."""
        begin, end = record.regions[region]
        at, bit = rng.randrange(begin, end), rng.randrange(8)
        flip(self.copy() / record.path.name, at, bit)
        where = f"{record.kind} at {record.offset} of {record.path.name}"
        return f"{where}: {region}, byte {at - record.offset}, bit {bit}"

    def check_flip(self, record: Record, region: str, rng: random.Random) -> list[str]:
        """Unseen in the padding; what the record was is lost everywhere else."""
        what = self.flip_region(record, region, rng)
        lost = frozenset[str]() if region == "padding" else self.what(record)
        return [f"{what}: {problem}" for problem in self.check(lost)]

    def put_again(self, lost: frozenset[str]) -> list[str]:
        """Every put of the story that has a part in ``lost``, once more; the refusals."""
        store = open_faulty(self.here, self.story)
        jobs = [job_of(piece) for piece in self.story.pieces if names_of(piece) & lost]
        refused = [result.reason for result in store.put_all(jobs) if not result.stored]
        store.close()
        return refused

    def served_right(self) -> tuple[list[str], int]:
        """Whatever is served is right, and something new can be stored: (problems, boundaries reached in full)."""
        found, reached = list[str](), 0
        try:
            store = open_faulty(self.here, self.story)
        except Exception as error:  # whatever it is, it must not come out of open
            return [f"open: {type(error).__name__}: {error}"], 0
        try:
            for tenant, chat, boundary in self.lookups():
                what, hit = f"{tenant}/{chat} at {boundary}", look(store, tenant, chat, boundary + 1)
                found += wrong_bits(hit, chat, what)
                reached += hit.hit.tokens == boundary
                if (hit.hit.tokens == boundary) != (hit.hit.reason == ""):
                    found.append(f"{what}: {hit.hit.tokens} tokens, reason {hit.hit.reason!r}")
            found += next_put(store)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        finally:
            store.close()
        return found, reached

    def _tails(self, store, left: frozenset[str]) -> Iterator[str]:
        for name in sorted(self.stored):
            tenant, chat, kind, tokens = name.split("/")
            if kind != "tail":
                continue
            hit: Found = look(store, tenant, int(chat), int(tokens) + 1, tails=True)
            yield from wrong_bits(hit, int(chat), name)
            need = reach_tail(left, tenant, int(chat), int(tokens))
            if hit.hit.tokens != need:
                yield f"{name}: {hit.hit.tokens} tokens, not {need} ({hit.hit.reason})"


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 1 << bit]))


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
