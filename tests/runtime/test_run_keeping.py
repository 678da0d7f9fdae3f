"""What a request leaves behind in the KV store, where it starts from next time, and when its last event comes."""

import itertools
import threading
import time

import pytest
from scheduler_support import Client, answer, schedulers
from serve_support import FakeEngine, FakeKv, spell

from appliance.errors import EngineError, RequestError
from runtime.kv.record import Role
from runtime.request import Delta, Event, Failed, Finished
from runtime.schedule import ANCHOR_TOKENS, prompt_calls, write_points


@pytest.fixture
def make():
    with schedulers() as build:
        yield build


def roles(kv: FakeKv) -> list[tuple[int, str]]:
    return [(unit.tokens, unit.role.name) for job in kv.jobs for unit in job.units]


def numbers(*parts: tuple[int, int]) -> list[int]:
    """A prompt of runs: (seed, count) each."""
    return [2 + (seed * 131 + i * 7 + i // 256) % 256 for seed, count in parts for i in range(count)]


# -- write points


def test_write_points_by_hand() -> None:
    cold = {"common_tokens": 0, "anchor_tokens": 0, "shared_tokens": 0}
    assert write_points(0, 0, 0, **cold) == set()
    assert write_points(768, 0, 0, **cold) == {768}
    assert write_points(768, 768, 3, **cold) == set()
    assert write_points(768, 256, 1, **cold | {"common_tokens": 512}) == {512, 768}
    assert write_points(768, 0, 0, **cold | {"anchor_tokens": 256, "shared_tokens": 512}) == {256, 512, 768}
    assert write_points(768, 512, 2, **cold | {"anchor_tokens": 256, "common_tokens": 512}) == {768}
    assert write_points(256, 0, 0, **cold | {"anchor_tokens": 512, "common_tokens": 512}) == {256}
    assert write_points(163_840, 0, 0, **cold) == {65_536, 131_072, 163_840}
    assert write_points(163_840, 65_536, 256, **cold) == {131_072, 163_840}
    assert write_points(163_840, 100_096, 391, **cold) == {163_840}
    assert write_points(2048, 1024, 6, **cold | {"common_tokens": 1536, "anchor_tokens": 1280}) == {1536, 2048}


def test_points_near_each_other_are_one() -> None:
    cold = {"common_tokens": 0, "anchor_tokens": 0, "shared_tokens": 0}
    assert write_points(10_240, 9984, 39, **cold) == {10_240}  # 256 tokens are 1/40
    assert write_points(10_496, 10_240, 40, **cold) == set()
    assert write_points(30_720, 30_720 - 512, 118, **cold) == set()
    assert write_points(30_720, 30_720 - 768, 117, **cold) == {30_720}
    assert write_points(65_536, 65_536 - 1536, 250, **cold) == set()
    assert write_points(65_536, 65_536 - 1792, 249, **cold) == {65_536}
    assert write_points(262_144, 262_144 - 3840, 1009, **cold) == set()
    assert write_points(262_144, 262_144 - 4096, 1008, **cold) == {262_144}  # never more than 4,096 tokens again
    near = cold | {"common_tokens": 30_720, "anchor_tokens": 16_384}
    assert write_points(31_488, 0, 0, **near) == {16_384, 31_488}  # the common prefix is taken with the prompt's end
    assert write_points(66_048, 0, 0, **cold) == {66_048}
    for tokens in (256, 512, 3840, 8192):
        assert write_points(tokens, tokens - 256, 0, **cold) == {tokens}


def test_an_answer_near_its_prompt_gets_no_checkpoint_but_its_blocks(make) -> None:
    kv = FakeKv()
    engine = FakeEngine(context_tokens=12_000)
    answer(make(engine, kv, reuse_mixed=True), numbers((0, 10_760)), max_tokens=260)
    assert roles(kv) == [(10_752, "PROMPT")]
    assert max(index for job in kv.jobs for index in job.blocks) == 42


def test_calls_after_a_tail_meet_the_next_multiple_of_256() -> None:
    ids = list(range(900))
    assert [len(c) for c in prompt_calls(ids, 300)] == [212, 256, 132]
    assert list(itertools.chain(*prompt_calls(ids, 300))) == ids[300:]
    assert list(prompt_calls(ids, 900)) == []


def test_a_common_prefix_gets_a_checkpoint_where_it_ends(make) -> None:
    engine, kv = FakeEngine(), FakeKv()
    scheduler = make(engine, kv)
    first, second, third = (numbers((0, 600), (i, 300)) for i in (1, 2, 3))
    assert answer(scheduler, first)[1].usage.hit_tokens == 0
    last = answer(scheduler, second)[1]
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (0, "no-unit")
    assert roles(kv) == [(768, "PROMPT"), (512, "ANCHOR"), (768, "PROMPT")]
    last = answer(scheduler, third)[1]
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (512, "no-unit")
    assert roles(kv)[3:] == [(768, "PROMPT")]
    copied = [index for job in kv.jobs for index in job.blocks]
    assert copied == [0, 1, 2, 2, 2]  # blocks that are stored are not copied again


def test_the_declared_end_of_system_and_tools_gets_a_checkpoint(make) -> None:
    kv, client = FakeKv(), Client()
    request = client.request(numbers((0, 1500)))
    request.anchor_tokens = 512
    scheduler = make(FakeEngine(), kv)
    scheduler.submit(request)
    client.wait()
    assert scheduler.stop(10)
    assert roles(kv) == [(512, "ANCHOR"), (1280, "PROMPT")]
    assert [sorted(job.blocks) for job in kv.jobs] == [[0, 1], [2, 3, 4], []]


def test_a_long_prefill_leaves_checkpoints_on_its_way(make, monkeypatch) -> None:
    monkeypatch.setattr("runtime.schedule.ANCHOR_TOKENS", ANCHOR_TOKENS // 16)
    kv = FakeKv()
    tokens = 2 * ANCHOR_TOKENS // 16 + 700
    answer(make(FakeEngine(context_tokens=40_000), kv), numbers((0, tokens)), max_tokens=1)
    assert roles(kv) == [(4096, "ANCHOR"), (8192, "ANCHOR"), (8704, "PROMPT")]


def test_blocks_are_handed_over_before_too_many_wait(make, monkeypatch) -> None:
    monkeypatch.setattr("runtime.keep.FLUSH_BYTES", 2000)
    kv = FakeKv()
    scheduler = make(FakeEngine(), kv)
    answer(scheduler, numbers((0, 1500)))
    assert scheduler.stop(10)
    assert [sorted(job.blocks) for job in kv.jobs] == [[0, 1], [2, 3], [4], []]
    assert answer(make(FakeEngine(), kv), numbers((0, 1500)))[1].usage.hit_tokens == 1280


def test_an_answer_is_kept_at_its_last_full_block(make) -> None:
    kv = FakeKv()
    answer(make(FakeEngine(), kv, reuse_mixed=True), numbers((0, 500)), max_tokens=600)
    assert roles(kv) == [(256, "PROMPT"), (1024, "ANSWER")]
    assert sorted(index for job in kv.jobs for index in job.blocks) == [0, 1, 2, 3]


def test_the_request_log_has_one_note_for_every_request(make) -> None:
    kv = FakeKv()
    scheduler = make(FakeEngine(), kv)
    for tokens in (10, 600, 600):
        answer(scheduler, tokens, max_tokens=3)
    scheduler.stop(10)
    assert [(n.prompt_tokens, n.hit_tokens, n.output_tokens, n.reason) for n in kv.notes] == [
        (10, 0, 3, "too-short"), (600, 0, 3, "no-unit"), (600, 512, 3, ""),
    ]  # fmt: skip
    assert all(abs(note.at_s - time.time()) < 60 for note in kv.notes)
    assert [len(job.ids) for job in kv.jobs if job.note] == [13, 603, 603]


# -- exact replay


def test_blocks_without_a_checkpoint_are_replayed_exactly(make) -> None:
    kv = FakeKv()
    prompt = numbers((0, 3000))
    cold, _ = answer(make(FakeEngine(), kv), prompt, max_tokens=8)
    kv.checkpoints.clear()
    engine = FakeEngine(replay_tokens=512)
    scheduler = make(engine, kv)
    text, last = answer(scheduler, prompt, max_tokens=8)
    assert text == cold
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (2816 - 512, "no-unit")
    assert [call for call in engine.calls if call[0] == "prefill"] == [
        ("prefill", 2304, 256), ("prefill", 2560, 256), ("prefill", 2816, 184),
    ]  # fmt: skip
    assert kv.puts[1:] == [2816]  # the replay made it anew
    assert answer(scheduler, prompt, max_tokens=8)[1].usage.hit_tokens == 2816


# -- exact tails


def next_turn(kv: FakeKv, before: list[int], sampled: int) -> list[int]:
    """The prompt of a turn that follows: what the stored tail covers, then more."""
    (ids,) = [ids for _, ids in kv.tails]
    assert ids[: len(before)] == tuple(before)
    assert len(ids) == len(before) + sampled - 1  # the last sampled token is not in the sequence
    return [*ids, *numbers((9, 20))]


def test_with_exact_tails_the_next_turn_starts_where_the_last_one_ended(make) -> None:
    engine, kv = FakeEngine(), FakeKv()
    scheduler = make(engine, kv, reuse_mixed=True, exact_tails=True)
    prompt = numbers((0, 300))
    answer(scheduler, prompt, max_tokens=30)
    again = next_turn(kv, prompt, 30)
    cold, _ = answer(make(FakeEngine()), again, max_tokens=8)
    engine.calls.clear()
    text, last = answer(scheduler, again, max_tokens=8)
    assert text == cold
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (329, "")
    assert engine.calls[0] == ("prefill", 329, 20)


def test_tails_are_neither_kept_nor_used_where_cuts_differ_in_bits(make) -> None:
    kv = FakeKv()
    answer(make(FakeEngine(), kv, reuse_mixed=False, exact_tails=True), numbers((0, 300)), max_tokens=30)
    answer(make(FakeEngine(), kv, reuse_mixed=True), numbers((1, 300)), max_tokens=30)
    assert kv.tails == {}
    mixed = make(FakeEngine(), kv, reuse_mixed=True, exact_tails=True)
    answer(mixed, numbers((2, 300)), max_tokens=30)
    again = next_turn(kv, numbers((2, 300)), 30)
    assert answer(make(FakeEngine(), kv), again)[1].usage.hit_tokens == 256


def test_a_draining_server_suspends_what_ends_and_what_it_cuts_off(make) -> None:
    for cut_off in (False, True):
        engine, kv = FakeEngine(step_s=0.002), FakeKv()
        scheduler = make(engine, kv, reuse_mixed=True)
        client = Client()
        request = client.request(300, max_tokens=40)
        scheduler.submit(request)
        client.events.get(timeout=10)
        scheduler.refuse("going down")
        if cut_off:
            scheduler.abort(RequestError("cut off", status=503))
        last = client.wait()[1]
        assert isinstance(last, Failed if cut_off else Finished)
        assert scheduler.stop(10)
        assert request.usage.prompt_tokens == 300
        (ids,) = [ids for _, ids in kv.tails]
        assert list(ids[:300]) == list(request.prompt_ids)
        assert 300 < len(ids) <= 339
        assert cut_off or len(ids) == 339


def test_an_answer_cut_off_comes_back_as_it_was_sampled(make) -> None:
    kv = FakeKv()
    engine = FakeEngine(spell("the king is in the thing " * 40), step_s=0.002)
    scheduler = make(engine, kv, reuse_mixed=True)
    client = Client()
    scheduler.submit(client.request(300, max_tokens=2000))
    for _ in range(20):
        client.events.get(timeout=10)
    scheduler.refuse("going down")
    scheduler.abort(RequestError("cut off", status=503))
    assert scheduler.stop(10)
    (ids,) = [ids for _, ids in kv.tails]
    assert list(kv.replays.values()) == [list(ids[300:])]


# -- cancelled and failed requests


def test_what_a_cancelled_prefill_completed_is_kept(make) -> None:
    engine, kv = FakeEngine(step_s=0.01), FakeKv()
    scheduler = make(engine, kv)
    client = Client()
    request = client.request(numbers((0, 3000)))
    scheduler.submit(request)
    while len(engine.calls) < 4:
        time.sleep(0.001)
    scheduler.cancel(request)
    assert scheduler.wait_idle(5)
    done = sum(length for _, _, length in engine.calls)
    assert 768 <= done < 2816
    engine.step_s = 0
    last = answer(scheduler, numbers((0, 3000)))[1]
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (done, "no-unit")
    assert roles(kv) == [(done, "PROMPT"), (2816, "PROMPT")]


@pytest.mark.parametrize("error", [EngineError("the card is gone"), ZeroDivisionError("x")])
def test_what_a_failed_request_completed_is_kept(make, error: Exception) -> None:
    engine, kv = FakeEngine(), FakeKv()
    scheduler = make(engine, kv)
    client = Client()
    request = client.request(numbers((0, 600)), max_tokens=50)
    put = request.emit

    def emit(event: Event) -> None:
        if isinstance(event, Delta):
            engine.broken = error
        put(event)

    request.emit = emit
    scheduler.submit(request)
    assert isinstance(client.wait()[1], Failed)
    assert scheduler.wait_idle(5)
    assert answer(scheduler, numbers((0, 600)))[1].usage.hit_tokens == 512
    assert kv.pinned == 0
    assert engine.open_sequences == 0


# -- a store that fails


class BrokenLookup(FakeKv):
    def lookup(self, tenant, ids, sink, **options):
        super().lookup(tenant, ids, sink, **options)  # the sink has seen blocks by then
        raise OSError("input/output error")


def test_a_lookup_that_fails_is_a_cold_start(make, caplog) -> None:
    kv = FakeKv()
    cold, _ = answer(make(FakeEngine(), kv), 600, max_tokens=8)
    broken = BrokenLookup()
    broken.blocks, broken.checkpoints = kv.blocks, kv.checkpoints
    engine = FakeEngine()
    text, last = answer(make(engine, broken), 600, max_tokens=8)
    assert text == cold
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (0, "corrupt")
    assert "input/output error" in caplog.text
    assert engine.open_sequences == 0


@pytest.mark.parametrize("tokens", [512, 100, 599, 600])
def test_a_store_that_answers_too_much_is_not_believed(make, tokens: int) -> None:
    class Boasting(FakeKv):
        def lookup(self, tenant, ids, sink, **options):
            hit = super().lookup(tenant, ids, sink, **options)
            return type(hit)(tokens, tokens // 256, b"x", None, False, "", hit.common_tokens)

    last = answer(make(FakeEngine(), Boasting()), 512 if tokens == 512 else 600)[1]
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (0, "corrupt")


def test_a_server_without_a_store_says_policy(make) -> None:
    assert answer(make(FakeEngine()), 600)[1].usage.miss_reason == "policy"


# -- when the last event comes


def test_the_text_streams_while_the_disk_works_and_the_end_waits_for_it(make) -> None:
    kv, client = FakeKv(), Client()
    kv.hold.clear()
    scheduler = make(FakeEngine(spell("hello")), kv)
    scheduler.submit(client.request(300, max_tokens=50))
    assert "".join(client.events.get(timeout=10).text for _ in "hello") == "hello"
    time.sleep(0.05)
    assert client.events.empty()
    kv.hold.set()
    assert isinstance(client.events.get(timeout=10), Finished)
    assert kv.puts == [256]


def test_a_request_log_line_alone_is_not_waited_for(make) -> None:
    kv = FakeKv()
    kv.hold.clear()
    assert answer(make(FakeEngine(), kv), 20)[1].usage.miss_reason == "too-short"
    kv.hold.set()


def test_a_disk_that_hangs_does_not_keep_the_answer(make, monkeypatch, caplog) -> None:
    monkeypatch.setattr("runtime.keep.TICKET_WAIT_S", 0.05)
    kv = FakeKv()
    kv.hold.clear()
    assert answer(make(FakeEngine(), kv), 300)[1].reason == "length"
    assert "the disk takes too long" in caplog.text
    kv.hold.set()


def test_writing_happens_on_another_thread_than_computing(make) -> None:
    engine, threads = FakeEngine(), set()

    class Watched(FakeKv):
        def put_all(self, jobs):
            threads.add(threading.get_ident())
            return super().put_all(jobs)

    answer(make(engine, Watched()), 600)
    assert len(threads) == 1
    assert not threads & engine.threads


# -- tenants


def test_an_approved_part_is_shared_and_the_rest_is_not(make) -> None:
    kv = FakeKv()
    scheduler = make(FakeEngine(), kv)

    def ask(tenant: str, shared_tokens: int, own: int) -> int:
        client = Client()
        request = client.request(numbers((0, 600), (own, 300)), tenant=tenant)
        request.shared_tokens = shared_tokens
        scheduler.submit(request)
        return client.wait()[1].usage.hit_tokens

    assert ask("a", 512, 1) == 0
    assert {tenant for tenant, _ in kv.checkpoints} == {"a", "shared"}
    assert ask("b", 512, 2) == 512  # what a approved prompt begins with
    assert ask("b", 512, 1) == 512  # not what a said after it
    assert ask("c", 0, 1) == 0  # its system prompt was not approved
    assert ask("a", 512, 1) == 768
    assert Role.ANCHOR in {unit.role for job in kv.jobs for unit in job.units if unit.tokens == 512}
