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

PAGE = (Path(__file__).parents[2] / "docs" / "kv-format.md").read_text(encoding="utf-8")


def _fields():
    """(name, offset, bytes) of the page's header table."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\w+) \|", PAGE, re.MULTILINE)
    return [(name, int(offset), int(size)) for offset, size, name in rows]


def _header(raw):
    values = {}
    for name, offset, size in _fields():
        cut = raw[offset : offset + size]
        integer = size in (1, 2, 4, 8) and name not in ("magic", "epoch")
        values[name] = int.from_bytes(cut, "little") if integer else cut
    return values


def _hkdf(key, info, size):
    """RFC 5869 with no salt, one round."""
    return hmac.digest(hmac.digest(bytes(32), key, "sha256"), info + b"\x01", "sha256")[:size]


def _keys(tenant):
    table = dict(re.findall(r"^\| ([\w ]+) \| \d+ \| tenant key \| `([^`]+)` \|", PAGE, re.MULTILINE))
    prefix = re.search(r"^\| tenant key \| 32 \| master key \| `([^`]+)` \+ tenant", PAGE, re.MULTILINE)[1]
    tenant_key = _hkdf(MASTER_KEY, prefix.encode() + tenant.encode(), 32)
    return {name: _hkdf(tenant_key, info.encode(), 16 if name == "tenant_id" else 32) for name, info in table.items()}


def _records(segment):
    """(header bytes, ciphertext and tag, padding) of each record of a segment, front to back."""
    raw, at = segment.read_bytes(), 0
    while at < len(raw):
        size = _header(raw[at : at + 128])["payload_bytes"]
        end = at + 128 + size + 16
        after = -(-end // 4096) * 4096
        yield raw[at : at + 128], raw[at + 128 : end], raw[end:after]
        at = after
    assert at == len(raw)


def _stored(directory, tenant="alice", tokens=512):
    """A prefix of random states; returns pools whose page i + 1 is block i and whose slot 1 is the checkpoint."""
    spec, layout = make_spec(TINY), tiny_layout()
    pools = make_pools(spec, seed=11)
    store = open_store(directory)
    result = store.put(tenant, prompt(0, tokens), lambda i: gather_block(pools, layout, i + 1),
                       gather_checkpoint(pools, layout, 1))  # fmt: skip
    assert result.stored
    store.close()
    return spec, pools


def test_the_header_table_covers_128_bytes():
    end = 0
    for _, offset, size in _fields():
        assert offset == end
        end += size
    assert end == 128
    assert len(_fields()) == 15


def test_every_record_opens_and_says_what_the_page_says(tmp_path):
    spec, pools = _stored(tmp_path / "kv")
    keys = _keys("alice")
    assert set(keys) == {"tenant_id", "chain key", "data key"}
    fingerprint = make_fingerprint(tiny_layout())
    link = hmac.digest(keys["chain key"], fingerprint.digest, "sha256")
    chain = []
    for i in range(2):
        link = hmac.digest(keys["chain key"], link + struct.pack("<256I", *prompt(0, 512)[256 * i :][:256]), "sha256")
        chain.append(link)
    records = list(_records(tmp_path / "kv" / "0000.kvs"))
    assert len(records) == 3
    at = 0
    for i, (packed, sealed, padding) in enumerate(records):
        header = _header(packed)
        block = i < 2
        assert {k: v for k, v in header.items() if k not in ("epoch", "created_s", "payload_bytes")} == {
            "magic": b"SKVR", "format": 1, "kind": 1 if block else 2, "cipher": 1,
            "fingerprint_id": fingerprint.digest[:16], "tenant_id": keys["tenant_id"],
            "chain": chain[i] if block else chain[1], "first_token": 256 * i if block else 0,
            "end_token": 256 * (i + 1) if block else 512, "place": at // 4096, "key_generation": 1, "zeros": 0,
        }  # fmt: skip
        assert 1_700_000_000 < header["created_s"] < 1 << 34
        assert not any(padding)
        payload = AESGCM(keys["data key"]).decrypt(packed[96:108], sealed, packed)
        assert payload == (_block(spec, pools, i + 1) if block else _checkpoint(spec, pools, 1))
        at += 128 + len(sealed) + len(padding)


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
    listed = {name: re.sub(r" \([^)]*\)", "", columns).split(", ") for name, columns in
              re.findall(r"^\| `(record|segment|fingerprint)` \| (.+) \|$", PAGE, re.MULTILINE)}  # fmt: skip
    assert len(listed) == 3
    for table, columns in listed.items():
        assert [row[1] for row in db.execute(f"PRAGMA table_info({table})")] == columns
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_the_page_knows_every_reason():
    table = PAGE.split("did not find everything")[1]
    reasons = re.findall(r"^\| `?([\w-]+|\(empty\))[^|]*\| .*\|$", table, re.MULTILINE)
    assert reasons == ["reason", "(empty)", "too-short", "no-unit", "fingerprint", "corrupt", "policy"]


def test_restored_pools_are_the_stored_ones(tmp_path):
    """Out of the pools, onto the disk, through a restart, into other pools."""
    spec, pools = _stored(tmp_path / "kv")
    layout = tiny_layout()
    store = open_store(tmp_path / "kv")
    hit = store.lookup("alice", prompt(0, 600))
    store.close()
    target = make_pools(spec, seed=12)
    for i, block in enumerate(hit.blocks):
        scatter_block(target, layout, 3 - i, block)
    scatter_checkpoint(target, layout, 2, hit.checkpoint)
    for state in spec.states:
        if state.paged:
            assert np.array_equal(target[state.name][[3, 2]], pools[state.name][[1, 2]])
    assert gather_checkpoint(target, layout, 2) == gather_checkpoint(pools, layout, 1)
