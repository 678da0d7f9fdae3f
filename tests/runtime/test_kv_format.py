"""docs/kv-format.md is true: a reader made from the page alone opens what the store wrote.

Nothing of ``runtime.kv`` is used to read: the header comes from the page's table, keys from HMAC, the payload's
layout from the page's rules and the model's state tensors.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sqlite3
import struct
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from kv_support import MASTER_KEY, TINY, make_fingerprint, make_pools, make_spec, open_store, prompt, tiny_layout

from runtime.kv.layout import gather_block, gather_checkpoint, scatter_block, scatter_checkpoint
from runtime.kv.record import Role
from runtime.kv.store import PutJob, TailUnit, Unit
from runtime.kv.tail import gather_tail

PAGE = (Path(__file__).parents[2] / "docs" / "kv-format.md").read_text(encoding="utf-8")


def _fields(heading="A record"):
    """(name, offset, bytes) of the table below a heading of the page."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\w ]+) \|", section, re.MULTILINE)
    return [(name, int(offset), int(size)) for offset, size, name in rows]


def _cut(raw, heading):
    return {name: raw[offset : offset + size] for name, offset, size in _fields(heading)}


def _header(raw):
    values = {}
    for name, offset, size in _fields():
        cut = raw[offset : offset + size]
        integer = size in (1, 2, 4, 8) and name not in ("magic", "epoch")  # epoch: 8 random bytes
        values[name] = int.from_bytes(cut, "little") if integer else cut
    return values


def _hkdf(key, info, size):
    """RFC 5869 with no salt, one round."""
    return hmac.digest(hmac.digest(bytes(32), key, "sha256"), info + b"\x01", "sha256")[:size]


def _infos():
    rows = re.findall(r"^\| ([\w ]+) \| (\d+) \| (master key|secret) \| `([^`]+)` \|", PAGE, re.MULTILINE)
    return {name: (int(size), source, info.encode()) for name, size, source, info in rows}


def _expand(source, key):
    return {name: _hkdf(key, info, size) for name, (size, of, info) in _infos().items() if of == source}


def _keys(directory, tenant):
    """A tenant's keys, out of its file."""
    master = _expand("master key", MASTER_KEY)
    name = hmac.digest(master["name key"], tenant.encode(), "sha256")[:16].hex() + ".key"
    raw = (directory / "tenants" / name).read_bytes()
    head = _cut(raw, "Keys")
    assert (head["file magic"], head["file format"], head["file zeros"]) == (b"SKVT", b"\2\0", bytes(2))
    inside = AESGCM(master["wrapping key"]).decrypt(head["file nonce"], raw[20:], name.encode())
    assert 1_700_000_000 < int.from_bytes(inside[32:40], "little") < 1 << 34
    assert inside[40:].decode() == tenant
    return _expand("secret", inside[:32])


def _chain(keys, ids, count):
    """h_0 … h_count."""
    chain = [hmac.digest(keys["chain key"], make_fingerprint(tiny_layout()).digest, "sha256")]
    for i in range(count):
        packed = struct.pack("<256I", *ids[256 * i :][:256])
        chain.append(hmac.digest(keys["chain key"], chain[-1] + packed, "sha256"))
    return chain


def _records(segment):
    """(header bytes, ciphertext and tag, padding) of each record of a segment, front to back."""
    raw, at = segment.read_bytes(), 0
    while at < len(raw) and raw[at : at + 4] == b"SKVR":
        size = _header(raw[at : at + 128])["payload_bytes"]
        end = at + 128 + size + 16
        after = -(-end // 4096) * 4096
        yield raw[at : at + 128], raw[at + 128 : end], raw[end:after]
        at = after
    assert len(raw) - at in (0, 4096)


def _stored(directory, tenant="alice", tokens=512, **options):
    """A prefix of random states, and the tail 88 tokens on; page i + 1 is block i, slot 1 the state after them."""
    spec, layout = make_spec(TINY), tiny_layout()
    pools, ids = make_pools(spec, seed=11), prompt(0, tokens + 88)
    logits = np.random.default_rng(1).standard_normal(layout.vocab_size).astype(np.float32)
    store = open_store(directory, **options)
    blocks = {i: gather_block(pools, layout, i + 1) for i in range(tokens // 256)}
    unit = Unit(tokens, Role.ANCHOR, gather_checkpoint(pools, layout, 1))
    tail = TailUnit(ids, gather_tail(pools, layout, 1, 3, len(ids), logits))
    result = store.put(PutJob(tenant, ids, blocks, [unit], tail, replays={"call:7": [1, 258]}))
    assert (result.stored, result.records) == (True, 4)
    store.close()
    return spec, pools, logits


def test_the_tables_cover_every_byte():
    for heading, size, count in (("A record", 128, 16), ("The end of a sealed segment", 4096, 7), ("Keys", 20, 4)):
        end = 0
        for _, offset, length in _fields(heading):
            assert offset == end
            end += length
        assert end == size
        assert len(_fields(heading)) == count


def test_every_record_opens_and_says_what_the_page_says(tmp_path):
    spec, pools, logits = _stored(tmp_path / "kv")
    keys = _keys(tmp_path / "kv", "alice")
    assert set(keys) == {"tenant_id", "chain key", "data key", "replay key"}
    fingerprint, ids = make_fingerprint(tiny_layout()), prompt(0, 600)
    chain = _chain(keys, ids, 2)
    name = hmac.digest(keys["chain key"], chain[2] + b"tail" + struct.pack("<88I", *ids[512:]), "sha256")
    records = list(_records(tmp_path / "kv" / "0000.kvs"))
    records += list(_records(tmp_path / "kv" / "0001.kvs"))
    expected = [(1, chain[1], 0, 256, 0), (1, chain[2], 256, 512, 0), (2, chain[2], 0, 512, 3),
                (4, bytes(32), 0, 3, 0), (3, name, 0, 600, 4)]  # fmt: skip
    assert len(records) == len(expected)  # the tail is too long for the tests' small segments: it begins another one
    at = 0
    for (packed, sealed, padding), (kind, link, first, end, role) in zip(records, expected, strict=True):
        header = _header(packed)
        footer = kind == 4
        assert {k: v for k, v in header.items() if k not in ("epoch", "created_s", "payload_bytes")} == {
            "magic": b"SKVR", "format": 2, "kind": kind, "cipher": 1, "role": role,
            "fingerprint_id": bytes(16) if footer else fingerprint.digest[:16],
            "tenant_id": bytes(16) if footer else keys["tenant_id"], "chain": link, "first_token": first,
            "end_token": end, "place": (0 if kind == 3 else at) // 4096, "key_generation": 1,
            "parent": chain[2][:7] if kind == 3 else bytes(7),
        }  # fmt: skip
        assert 1_700_000_000 < header["created_s"] < 1 << 34
        assert not any(padding)
        key = _expand("master key", MASTER_KEY)["store key"] if footer else keys["data key"]
        payload = AESGCM(key).decrypt(packed[96:108], sealed, packed)
        assert payload == {
            1: lambda end=end: _block(spec, pools, end // 256), 2: lambda: _checkpoint(spec, pools, 1),
            3: lambda: _tail(spec, pools, 1, 3, 600) + logits.astype("<f4").tobytes(),
            4: lambda: b"".join(head for head, _, _ in records[:3])}[kind]()  # fmt: skip
        at += 128 + len(sealed) + len(padding)


def test_a_sealed_segment_ends_as_the_page_says(tmp_path):
    _stored(tmp_path / "kv")
    raw = (tmp_path / "kv" / "0000.kvs").read_bytes()
    trailer = _cut(raw[-4096:], "The end of a sealed segment")
    numbers = {name: int.from_bytes(value, "little") for name, value in trailer.items() if len(value) in (2, 4)}
    footer_at = sum(128 + len(sealed) + len(padding) for _, sealed, padding in list(_records(
        tmp_path / "kv" / "0000.kvs"))[:3])  # fmt: skip
    assert trailer["trailer magic"] == b"SKVT"
    assert (numbers["trailer format"], numbers["footer place"], numbers["footer count"]) == (2, footer_at // 4096, 3)
    assert numbers["segment number"] == numbers["trailer zeros"] == 0
    assert not any(trailer["trailer rest"])
    last = (tmp_path / "kv" / "0001.kvs").read_bytes()
    assert last[-4096:-4092] != b"SKVT"  # the one that is still appended to is not sealed


def test_a_replay_opens_as_the_page_says(tmp_path):
    _stored(tmp_path / "kv")
    keys = _keys(tmp_path / "kv", "alice")
    db = sqlite3.connect(tmp_path / "kv" / "index.sqlite3")
    name, tenant_id, sealed = db.execute("SELECT name, tenant_id, sealed FROM replay").fetchone()
    db.close()
    assert name == hmac.digest(keys["chain key"], b"replaycall:7", "sha256")
    assert tenant_id == keys["tenant_id"]
    assert AESGCM(keys["replay key"]).decrypt(sealed[:12], sealed[12:], name) == struct.pack("<2I", 1, 258)


def _block(spec, pools, page):
    parts = []
    for layer in range(spec.config.num_hidden_layers):
        for kind in ("ent", "ient"):
            if f"layers.{layer}.{kind}" in pools:
                parts.append(pools[f"layers.{layer}.{kind}"][page].tobytes())
    return b"".join(parts)


def _checkpoint(spec, pools, slot):
    parts = []
    for layer, ratio in enumerate(spec.config.compress_ratios):
        parts.append(pools[f"layers.{layer}.win"][slot].tobytes())
        for kind in ("ring", "iring"):
            if f"layers.{layer}.ient" in pools:
                ring = pools[f"layers.{layer}.{kind}"][slot]
                d = ring.shape[1] // 4
                for row in ring[ratio : 2 * ratio]:
                    parts.append(row[:d].astype("<f4").tobytes() + row[2 * d : 3 * d].astype("<f4").tobytes())
    return b"".join(parts)


def _tail(spec, pools, slot, page, n):
    """By the page's rules, row by row."""
    parts = []
    for state in spec.states:
        rows, ratio = state.rows, spec.config.compress_ratios[state.layer]
        if state.kind == "win":
            wanted = [(slot, t % rows, True) for t in range(max(0, n - rows), n)]
        elif state.kind in ("ent", "ient"):
            wanted = [(page, e % rows, True) for e in range(n // 256 * 256 // ratio, n // ratio)]
        else:
            g = n // ratio * ratio
            carry = range(max(0, g - ratio), g) if rows == 2 * ratio else ()
            wanted = [(slot, t % rows, False) for t in carry] + [(slot, t % rows, True) for t in range(g, n)]
        for at, row, whole in wanted:
            cells = pools[state.name][at, row]
            d = len(cells) // 4
            parts.append((cells if whole else np.concatenate([cells[:d], cells[2 * d : 3 * d]])).tobytes())
    return b"".join(parts)


def test_the_fingerprint_is_the_json_of_the_page(tmp_path):
    shape = json.loads(re.search(r"```\n(\{.*?\})\n```", PAGE, re.DOTALL)[1].replace("…", "0"))
    fingerprint = make_fingerprint(tiny_layout())
    fields = json.loads(fingerprint.canonical)
    assert list(shape) == list(fields) == sorted(fields)
    assert list(shape["arithmetic"]) == list(fields["arithmetic"])
    assert hashlib.sha256(fingerprint.canonical.encode()).digest() == fingerprint.digest
    assert fingerprint.canonical == json.dumps(fields, sort_keys=True, separators=(",", ":"))


def test_the_index_has_the_tables_of_the_page(tmp_path):
    _stored(tmp_path / "kv")
    db = sqlite3.connect(tmp_path / "kv" / "index.sqlite3")
    table = r"^\| `(\w+)` \| (number, .+|chain, .+|parent .+|digest, .+|day .+|name, .+) \|$"
    listed = {name: re.sub(r" \([^)]*\)", "", columns).split(", ")
              for name, columns in re.findall(table, PAGE, re.MULTILINE)}  # fmt: skip
    assert len(listed) == 7
    for table, columns in listed.items():
        assert [row[1] for row in db.execute(f"PRAGMA table_info({table})")] == columns
    assert db.execute("PRAGMA user_version").fetchone() == (2,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_the_page_knows_every_reason():
    table = PAGE.split("did not find everything")[1]
    reasons = re.findall(r"^\| `?([\w-]+|\(empty\))[^|]*\| .*\|$", table, re.MULTILINE)
    wanted = ["reason", "(empty)", "too-short", "no-unit", "fingerprint", "ttl", "evicted", "corrupt", "policy"]
    assert reasons == wanted


def test_restored_pools_are_the_stored_ones(tmp_path):
    """Out of the pools, onto the disk, through a restart, into other pools."""
    spec, pools, _ = _stored(tmp_path / "kv")
    layout = tiny_layout()
    target = make_pools(spec, seed=12)
    store = open_store(tmp_path / "kv")
    hit = store.lookup("alice", prompt(0, 600), lambda i, payload: scatter_block(target, layout, 3 - i, payload))
    store.close()
    scatter_checkpoint(target, layout, 2, hit.checkpoint)
    for state in spec.states:
        if state.paged:
            assert np.array_equal(target[state.name][[3, 2]], pools[state.name][[1, 2]])
    assert gather_checkpoint(target, layout, 2) == gather_checkpoint(pools, layout, 1)
