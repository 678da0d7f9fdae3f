"""The writer thread: groups, order, bounds in bytes, and failures that stay its own."""

import threading
import time

import pytest

from runtime.kv.job import Note, PutJob, PutResult, TailUnit, Unit
from runtime.kv.record import Role
from runtime.kv.writer import BEHIND, GROUP_BYTES, Writer, payload_bytes


class SlowStore:
    """Notes the groups it was given; ``hold`` makes it wait, ``error`` is raised."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.threads: set[int] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.error: Exception | None = None
        self.results: list[PutResult] | None = None

    def put_all(self, jobs: list[PutJob]) -> list[PutResult]:
        self.threads.add(threading.get_ident())
        self.groups.append([job.tenant for job in jobs])
        assert self.hold.wait(10)
        if self.error:
            raise self.error
        return [PutResult(True, records=int(job.tenant)) for job in jobs] if self.results is None else self.results


def job(name: int, size_bytes: int = 1) -> PutJob:
    return PutJob(str(name), [1, 2, 3], {0: bytes(size_bytes)})


@pytest.fixture
def store():
    return SlowStore()


def busy(store: SlowStore, writer: Writer) -> None:
    """Hold the store's thread in a put of a job named 0."""
    store.hold.clear()
    writer.submit(job(0))
    end = time.monotonic() + 10
    while not store.groups:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_everything_queued_becomes_one_group_in_order(store) -> None:
    writer = Writer(store)
    busy(store, writer)
    tickets = [writer.submit(job(i)) for i in range(1, 6)]
    assert tickets[0].wait(0.05) is None
    store.hold.set()
    assert [ticket.wait(10).records for ticket in tickets] == [1, 2, 3, 4, 5]
    assert store.groups == [["0"], ["1", "2", "3", "4", "5"]]
    assert threading.get_ident() not in store.threads
    assert len(store.threads) == 1
    assert writer.close(10)
    assert writer.pending_bytes == 0


def test_a_group_ends_before_64_mib(store) -> None:
    writer = Writer(store, max_pending_bytes=4 * GROUP_BYTES)
    busy(store, writer)
    shared = bytes(GROUP_BYTES // 2)
    for i in (1, 2, 3):
        writer.submit(PutJob(str(i), [], {0: shared}))
    last = writer.submit(PutJob("4", [], {0: shared, 1: shared, 2: shared}))
    store.hold.set()
    assert last.wait(10).stored
    assert store.groups == [["0"], ["1", "2"], ["3"], ["4"]]
    assert writer.close(10)


def test_submit_waits_while_too_much_is_pending(store) -> None:
    writer = Writer(store, max_pending_bytes=100, submit_wait_s=10)
    busy(store, writer)
    writer.submit(job(1, 99))
    assert writer.pending_bytes == 100
    threading.Timer(0.2, store.hold.set).start()
    before_s = time.monotonic()
    ticket = writer.submit(job(2, 50))
    assert time.monotonic() - before_s > 0.1
    assert ticket.wait(10).stored
    assert writer.close(10)


def test_a_request_that_outruns_the_disk_goes_on_without(store) -> None:
    writer = Writer(store, max_pending_bytes=100, submit_wait_s=0.05)
    busy(store, writer)
    refused = writer.submit(job(1, 100))
    assert refused.wait(0) == PutResult(False, BEHIND)
    store.hold.set()
    assert writer.close(10)
    assert store.groups == [["0"]]


def test_a_job_larger_than_the_bound_goes_alone(store) -> None:
    writer = Writer(store, max_pending_bytes=10)
    assert writer.submit(job(1, 1000)).wait(10).stored
    assert writer.close(10)


@pytest.mark.parametrize("results", [None, [], [PutResult(True)] * 3])
def test_a_store_that_breaks_costs_the_jobs_of_one_group(store, caplog, results) -> None:
    writer = Writer(store)
    store.results, store.error = results, ZeroDivisionError("oops") if results is None else None
    result = writer.submit(job(1)).wait(10)
    assert not result.stored
    assert ("oops" in result.reason) == (results is None)
    store.results = store.error = None
    assert writer.submit(job(2)).wait(10).stored
    assert writer.close(10)
    assert "KV cache" in caplog.text


def test_what_was_not_stored_is_in_the_log(store, caplog) -> None:
    writer = Writer(store)
    store.results = [PutResult(False, "quota: full")]
    assert not writer.submit(job(1)).wait(10).stored
    assert writer.close(10)
    assert "not stored: quota: full" in caplog.text


def test_close_writes_what_is_queued_and_refuses_what_comes_later(store) -> None:
    writer = Writer(store)
    busy(store, writer)
    ticket = writer.submit(job(1))
    assert not writer.close(0.05)
    store.hold.set()
    assert writer.close(10)
    assert ticket.wait(0).stored
    late = writer.submit(job(2)).wait(0)
    assert not late.stored
    assert "stopping" in late.reason


def test_memory_of_a_job() -> None:
    full = PutJob("a", [1], {0: b"12", 5: b"345"}, [Unit(256, Role.PROMPT, b"6789")], TailUnit([1], b"x" * 10),
                  note=Note(0.0, 1, 0, 0, ""))  # fmt: skip
    assert payload_bytes(full) == 2 + 3 + 4 + 10
    assert payload_bytes(PutJob("a", [1])) == 0
