"""Order, queue, cancellation, and the calls that reach engine and KV store."""

import threading
import time

import pytest
from scheduler_support import Client, answer, schedulers
from serve_support import FakeEngine, FakeKv, spell

from appliance.errors import EngineError, RequestError, SpaceError
from runtime.request import Event, Failed, Finished
from runtime.schedule import prompt_boundary


@pytest.fixture
def make():
    with schedulers() as build:
        yield build


@pytest.mark.parametrize(("tokens", "boundary"), [
    (1, 0), (256, 0), (257, 256), (383, 256), (512, 256), (513, 512), (1025, 1024), (4096, 3840), (4097, 4096),
])  # fmt: skip
def test_the_boundary_leaves_the_last_token_to_compute(tokens: int, boundary: int) -> None:
    assert prompt_boundary(tokens) == boundary


@pytest.mark.parametrize(("tokens", "chunks"), [
    (1, [1]), (256, [256]), (257, [256, 1]), (512, [256, 256]), (600, [256, 256, 88]),
])  # fmt: skip
def test_prefill_is_whole_chunks_and_one_tail(make, tokens: int, chunks: list[int]) -> None:
    engine = FakeEngine()
    answer(make(engine), tokens, max_tokens=3)
    assert [length for name, _, length in engine.calls if name == "prefill"] == chunks
    assert [start for name, start, _ in engine.calls if name == "decode"] == [tokens, tokens + 1]
    assert engine.open_sequences == 0


@pytest.mark.parametrize("tokens", [1, 256, 257, 511, 512, 513, 1025])
def test_a_hit_starts_at_c_of_n_and_answers_the_same(make, tokens: int) -> None:
    engine, kv = FakeEngine(), FakeKv()
    scheduler = make(engine, kv)
    cold_text, cold = answer(scheduler, tokens, max_tokens=8)
    first_calls, engine.calls = engine.calls, []
    text, last = answer(scheduler, tokens, max_tokens=8)
    assert text == cold_text
    boundary = prompt_boundary(tokens)
    assert (cold.usage.hit_tokens, last.usage.hit_tokens) == (0, boundary)
    assert engine.calls == [call for call in first_calls if call[1] >= boundary]
    assert kv.puts == ([boundary] if boundary else [])
    assert scheduler.metrics.tokens("prefilled") == tokens + tokens - boundary


def test_a_longer_prompt_hits_what_it_shares_and_stores_the_rest(make) -> None:
    engine, kv = FakeEngine(), FakeKv()
    scheduler = make(engine, kv)
    answer(scheduler, 300)
    _, last = answer(scheduler, 900)
    assert last.usage.hit_tokens == 256
    assert kv.puts == [256, 768]
    assert len(kv.blocks) == 3


def test_tenants_do_not_share(make) -> None:
    kv = FakeKv()
    scheduler = make(FakeEngine(), kv)
    answer(scheduler, 300, tenant="a")
    assert answer(scheduler, 300, tenant="b")[1].usage.hit_tokens == 0
    assert answer(scheduler, 300, tenant="b")[1].usage.hit_tokens == 256


def test_the_answer_is_stored_only_where_mixed_blocks_may_be_reused(make) -> None:
    pure, mixed = FakeKv(), FakeKv()
    answer(make(FakeEngine(), pure), 500, max_tokens=30)
    answer(make(FakeEngine(), mixed, reuse_mixed=True), 500, max_tokens=30)
    assert pure.puts == [256]
    assert mixed.puts == [256, 512]


def test_a_full_disk_does_not_fail_the_request(make) -> None:
    kv = FakeKv()
    kv.failing = SpaceError("no space left")
    assert answer(make(FakeEngine(), kv), 300)[1].reason == "length"


def test_the_last_event_comes_after_the_prompt_is_stored(make) -> None:
    kv = FakeKv()
    seen: list[int] = []
    client = Client()
    request = client.request(300)

    def emit(event: Event) -> None:
        if isinstance(event, Finished):
            seen.append(len(kv.puts))
        client.events.put(event)

    request.emit = emit
    make(FakeEngine(), kv).submit(request)
    client.wait()
    assert seen == [1]


def test_answers_end_for_each_reason(make) -> None:
    scheduler = make(FakeEngine(spell("one. two. three"), context_tokens=64))
    assert answer(scheduler, 5, max_tokens=100)[1].reason == "stop"
    text, last = answer(scheduler, 5, max_tokens=100, stop=(" two",))
    assert (text, last.reason) == ("one.", "stop")
    text, last = answer(scheduler, 5, max_tokens=4)
    assert (text, last.reason, last.usage.completion_tokens) == ("one.", "length", 4)


def test_a_full_context_ends_the_answer(make) -> None:
    _, last = answer(make(FakeEngine(context_tokens=20)), 15, max_tokens=1000)
    assert (last.reason, last.usage.completion_tokens) == ("length", 6)  # the sixth needs no place


def test_the_end_token_counts_and_is_not_shown(make) -> None:
    text, last = answer(make(FakeEngine(spell("hi"))), 5, max_tokens=100)
    assert (text, last.usage.completion_tokens) == ("hi", 3)


def test_seeded_answers_do_not_depend_on_their_neighbours(make) -> None:
    scheduler = make(FakeEngine())
    alone = answer(scheduler, 40, seed=5, temperature=1.5, max_tokens=20)[0]
    clients = [Client() for _ in range(4)]
    for number, client in enumerate(clients):
        seed = 5 if number in (1, 3) else number
        scheduler.submit(client.request(40 if number in (1, 3) else 90, seed=seed, temperature=1.5, max_tokens=20))
    texts = [client.wait()[0] for client in clients]
    assert texts[1] == texts[3] == alone
    assert texts[0] != alone


def test_first_come_first_served_on_one_thread(make) -> None:
    engine = FakeEngine()
    engine.hold.clear()
    scheduler = make(engine)
    order: list[str] = []
    clients = [Client() for _ in range(3)]
    for number, client in enumerate(clients):
        request = client.request(10, name=str(number))
        put = request.emit

        def emit(event: Event, name: str = request.id, put=put) -> None:
            order.append(name)
            put(event)

        request.emit = emit
        scheduler.submit(request)
    engine.hold.set()
    for client in clients:
        client.wait()
    assert order == sorted(order)
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_a_full_queue_refuses_with_retry_after(make) -> None:
    engine = FakeEngine()
    engine.hold.clear()
    scheduler = make(engine, queue_depth=2)
    clients = [Client() for _ in range(3)]
    for client in clients:
        scheduler.submit(client.request(10))
    with pytest.raises(RequestError, match="2 waiting") as caught:
        scheduler.submit(Client().request(10))
    assert caught.value.status == 429
    assert caught.value.retry_after_s
    engine.hold.set()
    assert all(isinstance(client.wait()[1], Finished) for client in clients)
    answer(scheduler, 10)


def test_cancelling_a_running_request_stops_before_the_next_call(make) -> None:
    engine = FakeEngine(step_s=0.01)
    scheduler = make(engine)
    client = Client()
    request = client.request(2000, max_tokens=1000)
    scheduler.submit(request)
    while not engine.calls:
        time.sleep(0.001)
    scheduler.cancel(request)
    assert scheduler.wait_idle(5)
    assert len(engine.calls) <= 3
    assert engine.open_sequences == 0
    assert client.events.empty()


def test_cancelling_while_decoding_keeps_the_prompt(make) -> None:
    engine, kv = FakeEngine(step_s=0.005), FakeKv()
    scheduler = make(engine, kv)
    client = Client()
    request = client.request(300, max_tokens=1000)
    scheduler.submit(request)
    client.events.get(timeout=10)
    scheduler.cancel(request)
    assert scheduler.wait_idle(5)
    assert kv.puts == [256]


def test_a_cancelled_waiting_request_gives_its_place_back(make) -> None:
    engine = FakeEngine()
    engine.hold.clear()
    scheduler = make(engine, queue_depth=1)
    first, second = Client(), Client()
    scheduler.submit(first.request(10))
    while not engine.calls:
        time.sleep(0.001)
    waiting = second.request(10)
    scheduler.submit(waiting)
    scheduler.cancel(waiting)
    third = Client()
    scheduler.submit(third.request(10))
    engine.hold.set()
    assert isinstance(third.wait()[1], Finished)
    assert second.events.empty()


@pytest.mark.parametrize(("error", "said"), [
    (EngineError("the card is gone"), "the card is gone"), (ZeroDivisionError("x"), "log/serve.log"),
])  # fmt: skip
def test_a_failing_engine_fails_one_request_only(make, error: Exception, said: str) -> None:
    engine = FakeEngine()
    engine.broken = error
    scheduler = make(engine)
    client = Client()
    scheduler.submit(client.request(10))
    last = client.wait()[1]
    assert isinstance(last, Failed)
    assert said in str(last.error)
    assert engine.open_sequences == 0
    answer(scheduler, 10)


def test_refused_and_aborted(make) -> None:
    engine = FakeEngine(step_s=0.01)
    scheduler = make(engine)
    running, waiting = Client(), Client()
    scheduler.submit(running.request(10, max_tokens=1000))
    scheduler.submit(waiting.request(10))
    scheduler.refuse("going down")
    with pytest.raises(RequestError, match="going down") as caught:
        scheduler.submit(Client().request(10))
    assert caught.value.status == 503
    scheduler.abort(RequestError("cut off", status=503))
    for client in (running, waiting):
        last = client.wait()[1]
        assert isinstance(last, Failed)
    assert scheduler.wait_idle(5)


def test_rates_and_counts(make) -> None:
    scheduler = make(FakeEngine())
    answer(scheduler, 300, max_tokens=11)
    prefill, decode = scheduler.metrics.rates()
    assert prefill > decode > 0
    text = scheduler.metrics.exposition({"requests_running": 0, "kv_max_bytes": 8_589_934_592})
    assert "solocard_prompt_tokens_total 300" in text
    assert "solocard_generation_tokens_total 11" in text
    assert "solocard_inter_token_latency_seconds_count 10" in text
    assert 'solocard_time_to_first_token_seconds_bucket{le="+Inf"} 1' in text
    assert "solocard_requests_running 0" in text
    assert "solocard_kv_max_bytes 8589934592\n" in text  # every byte of it
