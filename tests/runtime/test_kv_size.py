"""What a token and a checkpoint of the real model take on disk: header, tag, padding, footer and index included."""

from __future__ import annotations

import secrets

import pytest
from kv_support import MASTER_KEY, REAL, make_fingerprint, make_spec

from runtime.kv.files import Io
from runtime.kv.index import Index, Row
from runtime.kv.index_file import INDEX_NAME
from runtime.kv.layout import KvLayout
from runtime.kv.record import Kind, Role
from runtime.kv.segment import SEGMENT_BYTES
from runtime.kv.store import KvStore, Policy, PutJob, Unit

TOKEN_BYTES, CHECKPOINT_BYTES = 3530, 3_700_000
ROWS = 20_000


class NoDisk(Io):
    """Segments are as long as they say, and hold next to nothing."""

    def pwrite(self, fd, data, offset):
        if len(data) > 1 << 19:
            data, offset = data[-1:], offset + len(data) - 1
        super().pwrite(fd, data, offset)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A prompt of 400 blocks and one checkpoint, through the store: (its index, its segments' rows)."""
    directory = tmp_path_factory.mktemp("size") / "kv"
    layout = KvLayout.from_spec(make_spec(REAL))
    store = KvStore.open(directory, layout=layout, fingerprint=make_fingerprint(layout), master_key=MASTER_KEY,
                         policy=Policy(max_bytes=1 << 40), io=NoDisk())  # fmt: skip
    ids, block = list(range(400 * 256)), bytes(layout.block_bytes)
    for first in range(0, 400, 50):
        assert store.put(PutJob("default", ids, dict.fromkeys(range(first, first + 50), block))).records == 50
    before = store.status().used_bytes
    unit = Unit(len(ids), Role.PROMPT, bytes(layout.checkpoint_bytes))
    assert store.put(PutJob("default", ids, {}, [unit])).records == 1
    after, segments = store.status().used_bytes, store._ground.index.segments()
    store.close()
    assert sum(path.stat().st_size for path in directory.glob("*.kvs")) == after
    return segments, after - before


@pytest.fixture(scope="module")
def row_bytes(tmp_path_factory):
    """Bytes of the index's file a record, names and places being random as they are."""
    directory = tmp_path_factory.mktemp("rows")
    index = Index.open(directory, Io())
    index.begin()
    index.add([Row(secrets.token_bytes(32), Kind.BLOCK, Role.NONE, bytes(16), bytes(16), 256 * i, i // 297,
                   901_120 * (i % 297), 901_120, secrets.token_bytes(8), 1, 1_760_000_000, 1_760_000_000)
               for i in range(ROWS)], [])  # fmt: skip
    index.commit()
    index.close()
    return (directory / INDEX_NAME).stat().st_size / ROWS


def test_a_token_takes_3530_bytes_at_most(stored, row_bytes):
    segments, _ = stored
    full = segments[0]
    assert full.sealed
    assert full.records == 297
    assert SEGMENT_BYTES - 901_120 - 4096 < full.end_bytes <= SEGMENT_BYTES
    per_token = (full.end_bytes / full.records + row_bytes) / 256
    print(f"{per_token:.2f} B a token: segment {full.end_bytes / full.records / 256:.2f}, index {row_bytes / 256:.2f}")
    assert 3520 < per_token <= TOKEN_BYTES


def test_a_checkpoint_takes_3_7_megabytes_at_most(stored, row_bytes):
    _, grown = stored
    print(f"{grown + row_bytes:,.0f} B a checkpoint")
    assert grown >= 3_645_440
    assert grown + row_bytes + 128 <= CHECKPOINT_BYTES  # 128: its header in the footer
