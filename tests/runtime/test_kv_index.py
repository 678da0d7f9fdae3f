"""The index by itself: durable, typed, bounded, and what counts as damage."""

from __future__ import annotations

import sqlite3

import pytest
from kv_support import FaultIo, make_fingerprint, open_store, put, tiny_layout

from appliance.errors import StoreError
from runtime.kv import index as index_module
from runtime.kv.files import Io
from runtime.kv.index import Index, Row, State
from runtime.kv.index_file import INDEX_NAME, is_damage
from runtime.kv.record import Kind, Role
from runtime.kv.segment import SegmentRow


def _row(number, segment=0, kind=Kind.CHECKPOINT, **more):
    return Row(number.to_bytes(32, "big"), kind, Role.PROMPT, b"t" * 16, b"f" * 16, 256, segment, 4096 * number, 4096,
               b"e" * 8, 1, 1000, 1000 + number, **more)  # fmt: skip


@pytest.fixture
def index(tmp_path):
    opened = Index.open(tmp_path, Io())
    yield opened
    opened.close()


def _add(index, rows, segments=()):
    index.begin()
    index.add(rows, segments)
    index.commit()


def test_rows_come_back_as_they_were_written(index):
    rows = [_row(i, segment=i % 2, kind=kind) for i in range(700) for kind in (Kind.BLOCK, Kind.CHECKPOINT)]
    _add(index, rows, [SegmentRow(0, 8192, True, 5, 2), SegmentRow(1, 4096, False, 6, 1)])
    found = index.find([row.chain for row in rows[::2]])
    assert len(found) == len(rows)
    assert set(found.values()) == set(rows)
    assert index.segments() == [SegmentRow(0, 8192, True, 5, 2), SegmentRow(1, 4096, False, 6, 1)]
    assert index.rows_of(1) == sorted((r for r in rows if r.segment == 1), key=lambda r: r.offset)
    assert index.count() == {Kind.BLOCK: 700, Kind.CHECKPOINT: 700}
    assert index.find([]) == {}


def test_a_reader_beside_the_writer_sees_each_commit(tmp_path, index):
    reader = Index.open(tmp_path, Io(), read_only=True)
    _add(index, [_row(1)])
    assert len(reader.find([_row(1).chain])) == 1
    index.begin()
    index.add([_row(2)], [])
    assert reader.find([_row(2).chain]) == {}  # and does not wait
    index.commit()
    assert len(reader.find([_row(2).chain])) == 1
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.add_written(1, 1)
    reader.close()


def test_a_reader_of_a_closed_store(tmp_path):
    store = open_store(tmp_path / "kv")
    put(store, 0, 512)
    store.close()
    reader = Index.open(tmp_path / "kv", Io(), read_only=True)
    assert reader.count() == {Kind.BLOCK: 2, Kind.CHECKPOINT: 1}
    reader.close()
    with pytest.raises(sqlite3.OperationalError):
        Index.open(tmp_path, Io(), read_only=True)  # nothing there, and nothing is made
    assert not (tmp_path / INDEX_NAME).exists()


def test_touch_and_states(index):
    rows = [_row(1), _row(2)]
    _add(index, rows)
    index.begin()
    index.touch({(rows[0].chain, Kind.CHECKPOINT): (5000, 3), (rows[1].chain, Kind.CHECKPOINT): (7, 1)})
    moved = [_row(2, segment=9)]
    index.set_state(moved, State.DAMAGED)  # it is elsewhere by now: left alone
    index.set_state(rows[:1], State.SUPERSEDED)
    index.commit()
    found = index.find([row.chain for row in rows])
    first, second = (found[row.chain, Kind.CHECKPOINT] for row in rows)
    assert (first.used_s, first.hits, first.state) == (5000, 3, State.SUPERSEDED)
    assert (second.used_s, second.hits, second.state) == (1002, 1, State.LIVE)  # a use never makes it older


def test_forgetting_a_segment_leaves_tombstones_and_what_moved(index):
    rows = [_row(1), _row(2), _row(3), _row(4, kind=Kind.TAIL), _row(5, kind=Kind.BLOCK)]
    _add(index, rows, [SegmentRow(0, 50_000, True, 1, 5), SegmentRow(1, 4096, False, 1, 1)])
    index.begin()
    index.add_tails([(b"p" * 7, rows[3].chain, 256)])
    index.move([_row(1, segment=1)])
    index.forget(0, {rows[1]: State.EVICTED, rows[3]: State.EXPIRED})
    index.commit()
    found = index.find([row.chain for row in rows])
    assert {(row.chain[-1], row.state, row.segment) for row in found.values()} == {
        (1, State.LIVE, 1), (2, State.EVICTED, -1), (4, State.EXPIRED, -1)}  # fmt: skip
    assert index.tails([b"p" * 7]) == [(b"p" * 7, rows[3].chain, 256)]
    assert [segment.number for segment in index.segments()] == [1]


def test_tombstones_and_replays_are_bounded(index, monkeypatch):
    monkeypatch.setattr(index_module, "TOMBSTONES", 10)
    monkeypatch.setattr(index_module, "REPLAYS", 10)
    for segment in range(4):
        rows = [_row(segment * 8 + i, segment) for i in range(8)]
        _add(index, rows, [SegmentRow(segment, 40_000, True, 1, 8)])
        index.begin()
        index.forget(segment, dict.fromkeys(rows, State.EVICTED))
        index.add_replays((bytes([segment, i]), b"t", b"s", segment) for i in range(8))
        index.commit()
    found = index.find([_row(i).chain for i in range(40)])
    assert sorted(row.chain[-1] for row in found.values()) == list(range(22, 32))  # the newest
    assert len(index.replays([bytes([s, i]) for s in range(4) for i in range(8)])) == 10
    assert len(index.replays([bytes([3, i]) for i in range(8)])) == 8


def test_replays_are_bounded_in_bytes(index, monkeypatch):
    monkeypatch.setattr(index_module, "REPLAY_BYTES", 1000)
    for used_s in range(12):
        index.begin()
        index.add_replays([(bytes([used_s]), b"t", bytes(300), used_s)])
        index.commit()
    assert sorted(index.replays([bytes([i]) for i in range(12)])) == [bytes([i]) for i in (9, 10, 11)]
    index.begin()
    index.add_replays([(b"long", b"t", bytes(1001), 20), (b"new", b"t", bytes(300), 21)])
    index.commit()
    assert list(index.replays([b"long", b"new", bytes([11])])) == [b"new"]


def test_the_ledger_counts_days_and_forgets_months(index):
    for day, written in ((100, 5), (100, 7), (101, 1), (140, 2)):
        index.add_written(day, written)
    assert [index.written_today(day) for day in (100, 101, 140, 141)] == [0, 0, 2, 0]
    index.add_written(140, 3)
    assert index.written_today(140) == 5


def test_what_counts_as_damage(tmp_path):
    path = tmp_path / "x.db"
    path.write_bytes(b"no database" * 1000)
    db = sqlite3.connect(path)
    with pytest.raises(sqlite3.DatabaseError) as caught:
        db.execute("SELECT * FROM sqlite_master").fetchall()
    assert is_damage(caught.value)
    db.close()
    with pytest.raises(sqlite3.ProgrammingError) as closed:
        db.execute("SELECT 1")
    full = sqlite3.connect(":memory:")
    full.execute("CREATE TABLE t (x)")
    full.execute("PRAGMA max_page_count = 2")
    with pytest.raises(sqlite3.OperationalError, match="full") as filled:
        full.executemany("INSERT INTO t VALUES (?)", [(b"x" * 4000,)] * 10)
    full.close()
    assert not any(is_damage(error) for error in (closed.value, filled.value, OSError(5, "x"), ValueError("x")))
    assert is_damage(sqlite3.DatabaseError("a row of table record has values of the wrong type"))
    assert is_damage(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"))


def test_another_description_of_the_tables_is_damage(tmp_path):
    Index.open(tmp_path, Io()).close()
    db = sqlite3.connect(tmp_path / INDEX_NAME)
    db.execute("CREATE TABLE more (x)")
    db.close()
    with pytest.raises(sqlite3.DatabaseError, match="not described as they were made"):
        Index.open(tmp_path, Io())
    db = sqlite3.connect(tmp_path / INDEX_NAME)
    db.execute("DROP TABLE more")
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(StoreError, match="has format 7"):
        Index.open(tmp_path, Io(), read_only=True)


def test_opening_reads_nothing_of_the_segments(tmp_path):
    store = open_store(tmp_path / "kv")
    for chat in range(6):
        put(store, chat, 512)
    store.close()
    io = FaultIo(only="preadv")
    store = open_store(tmp_path / "kv", io=io)
    assert io.calls == []
    assert store.status().blocks == 12
    store.close()


def test_fingerprints_are_remembered_newest_first(index):
    prints = [make_fingerprint(tiny_layout(), profile=name) for name in "abc"]
    for now_s, one in enumerate(prints):
        index.remember(one, now_s)
    index.remember(prints[0], 10)
    assert index.other_fingerprints(prints[1].digest, 4) == [prints[0], prints[2]]
    assert index.other_fingerprints(prints[0].digest, 1) == [prints[2]]
