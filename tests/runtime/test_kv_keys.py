"""Keys and fingerprint: what must stay equal does, and every change shows."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
from kv_support import ARITHMETIC, MASTER_KEY, make_fingerprint, open_store, prompt, tiny_layout

from appliance.errors import EngineError, StoreError
from runtime.kv.fingerprint import Fingerprint, difference, isa_class
from runtime.kv.keys import derive_master, derive_tenant, load_master_key


def test_master_key_is_made_once(tmp_path):
    path = tmp_path / "keys" / "kv-master"
    key = load_master_key(path)
    assert len(key) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert load_master_key(path) == key
    assert [f.name for f in path.parent.iterdir()] == ["kv-master"]


def test_racing_makers_get_one_key(tmp_path):
    path, keys, gate = tmp_path / "kv-master", [], threading.Barrier(8)

    def make():
        gate.wait()
        keys.append(load_master_key(path))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert [f.name for f in tmp_path.iterdir()] == ["kv-master"]


def test_a_bad_key_file_is_refused(tmp_path):
    path = tmp_path / "kv-master"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(StoreError, match="has 5 bytes, not 32"):
        load_master_key(path)
    path.write_bytes(bytes(32))
    path.chmod(0o640)
    with pytest.raises(StoreError, match="readable by others"):
        load_master_key(path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="the KV cache needs this key"):
        load_master_key(tmp_path / "file" / "kv-master")


def test_secrets_share_nothing():
    alice, bob = derive_tenant(bytes(32)), derive_tenant(bytes(31) + b"1")
    assert alice.tenant_id != bob.tenant_id
    assert len(alice.tenant_id) == 16
    assert len({alice.chain_key, bob.chain_key, bytes(32)}) == 3
    sealed = {keys.encrypt(bytes(12), b"x", None) for one in (alice, bob) for keys in (one.cipher, one.replay_cipher)}
    assert len(sealed) == 4
    assert derive_tenant(bytes(32)).tenant_id == alice.tenant_id
    with pytest.raises(StoreError, match="has 31 bytes"):
        derive_master(bytes(31))
    with pytest.raises(StoreError, match="has 31 bytes"):
        open_store(Path("unused"), master_key=bytes(31))


def test_a_chain_depends_on_every_token_before():
    keys, root = derive_tenant(MASTER_KEY), bytes(32)
    ids = prompt(0, 1024)
    chain = keys.chain(root, ids, 4)
    assert keys.chain(root, ids, 2) == chain[:2]
    for changed in (0, 255, 256, 1023):
        other = keys.chain(root, [*ids[:changed], ids[changed] + 1, *ids[changed + 1 :]], 4)
        assert [a == b for a, b in zip(chain, other, strict=True)] == [i < changed // 256 for i in range(4)]
    assert keys.chain(bytes([1]) * 32, ids, 1) != chain[:1]
    for bad in (-1, 1 << 32):
        with pytest.raises(EngineError, match="tokens 256 and on"):
            keys.chain(root, [*ids[:300], bad, *ids[301:]], 4)
    with pytest.raises(EngineError, match="tokens 1024 and on"):
        keys.chain(root, ids, 5)


def test_a_tail_is_named_by_its_blocks_and_its_ids():
    keys = derive_tenant(MASTER_KEY)
    names = [keys.tail_name(parent, rest) for parent in (bytes(32), keys.root(bytes(32)))
             for rest in ([], [1], [1, 2], [2, 1])]  # fmt: skip
    assert len(set(names)) == 8
    assert derive_tenant(bytes(32)).tail_name(bytes(32), [1]) != names[1]
    with pytest.raises(EngineError, match="ids below 2\\^32"):
        keys.tail_name(bytes(32), [1 << 32])


CHANGES = {
    "objects": {"objects": ["aa" * 32, "cc" * 32]}, "graphs": {"graphs": ["00" * 32]},
    "profile": {"profile": "small"}, "tokenizer": {"tokenizer_sha256": "00" * 32},
    "encoding": {"encoding": "dsv4-0424"}, "numerics": {"numerics": "kv-f32"}, "layout": {"layout_id": "00" * 32},
    "arithmetic.backend": {"backend": "torch"}, "arithmetic.ort_version": {"ort_version": "1.32.0"},
    "arithmetic.kernels": {"kernels": "k"}, "arithmetic.isa": {"isa": "x86_64 avx2"},
    "arithmetic.threads": {"threads": "intra=1"}, "arithmetic.chunk_tokens": {"chunk_tokens": 512},
}  # fmt: skip


def test_every_piece_is_in_the_fingerprint_and_named():
    layout = tiny_layout()
    base = make_fingerprint(layout)
    digests = {base.digest}
    for field, change in CHANGES.items():
        other = make_fingerprint(layout, **change)
        digests.add(other.digest)
        assert difference(base, other) == field
    assert len(digests) == 1 + len(CHANGES)
    names = {name for name in base.fields if name != "arithmetic"}
    assert names | {f"arithmetic.{f.name}" for f in dataclasses.fields(ARITHMETIC)} == set(CHANGES)
    both = make_fingerprint(layout, threads="intra=1", profile="small")
    assert difference(base, both) == "arithmetic.threads, profile"


def test_the_same_contents_give_the_same_fingerprint():
    layout = tiny_layout()
    base = make_fingerprint(layout)
    again = make_fingerprint(layout, objects=["bb" * 32, "aa" * 32])  # another order, as another manifest may list them
    assert (again.digest, difference(base, again)) == (base.digest, "")
    assert Fingerprint.from_canonical(base.canonical) == base
    assert len(base.digest) == 32


def test_isa_class():
    intel = "processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2 avx512f\n\nflags\t\t: amx_int8\n"
    assert isa_class("x86_64", intel) == "x86_64 avx512f"
    assert isa_class("aarch64", "Features\t: fp asimd asimddp\n") == "aarch64 asimddp"
    assert isa_class("riscv64", "isa : rv64\n") == "riscv64 baseline"
    assert " " in isa_class()
