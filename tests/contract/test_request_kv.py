"""Whole requests on the real engine and the real store: whatever they start from, they answer as a cold one does.

The bits themselves are compared in test_restore.py and test_replay.py; here the scheduler decides what is stored and
what is restored, and every answer is 12 greedy tokens.
"""

from __future__ import annotations

import queue
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from kv_restore_support import dirty, open_store

from runtime import bits
from runtime.engine import Engine
from runtime.kv.store import KvStore
from runtime.request import Delta, Failed, Finished, Request
from runtime.sampler import SamplingParams
from runtime.scheduler import Scheduler

ANSWER_TOKENS = 12


class Recorder:
    """A transcript that keeps tokens."""

    stopped, reasoning_tokens = False, 0

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def push(self, token: int) -> list[Delta]:
        self.tokens.append(token)
        return []

    def flush(self) -> list[Delta]:
        return []

    def replays(self, tokens: Sequence[int]) -> Mapping[str, Sequence[int]]:
        return {}


class Server:
    """One life of a scheduler on ``engine``, with or without a store."""

    def __init__(self, engine: Engine, store: KvStore | None, **options: bool) -> None:
        self.engine, self.store = engine, store
        self.scheduler = Scheduler(engine, store, **options)
        self.scheduler.start()

    def ask(self, ids: list[int], tokens: int = ANSWER_TOKENS, **fields: object) -> tuple[list[int], Finished]:
        events: queue.Queue[object] = queue.Queue()
        transcript = Recorder()
        request = Request("r", ids, SamplingParams(0.0, 1.0, None, tokens, ()), transcript, events.put)
        for name, value in fields.items():
            setattr(request, name, value)
        dirty(self.engine)
        self.scheduler.submit(request)
        last = events.get(timeout=120)
        assert not isinstance(last, Failed), last
        assert isinstance(last, Finished)
        return transcript.tokens, last

    def end(self) -> None:
        assert self.scheduler.stop(60)
        if self.store is not None:
            self.store.close()


@pytest.fixture(scope="module")
def mixed(mini_engine: Engine) -> bool:
    """Whether single tokens and chunks agree in bits here."""
    return bits.rows_agree(mini_engine)


@pytest.fixture
def serve(mini_engine: Engine, mixed: bool, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``serve(stored=True)``: the server of before ends, its successor opens the same files."""
    lives: list[Server] = []

    def start(stored: bool = True, **options: bool) -> Server:
        while lives:
            lives.pop().end()
        store = open_store(tmp_path / "kv", mini_engine) if stored else None
        lives.append(Server(mini_engine, store, reuse_mixed=mixed, **options))
        return lives[-1]

    yield start
    for life in lives:
        life.end()


def numbers(engine: Engine, *parts: tuple[int, int]) -> list[int]:
    """A prompt of runs of random ids: (seed, count) each."""
    size = engine.spec.config.vocab_size
    return [int(i) for seed, count in parts for i in np.random.default_rng(seed).integers(2, size, count)]


@pytest.mark.parametrize("n", [256, 257, 512, pytest.param(700, marks=pytest.mark.slow)])
def test_a_restarted_server_hits_c_of_n_and_answers_the_same(mini_engine: Engine, serve, n: int) -> None:
    ids = numbers(mini_engine, (n, n))
    cold, _ = serve(stored=False).ask(ids)
    first, one = serve().ask(ids)
    again, two = serve().ask(ids)
    assert cold == first == again
    assert (one.usage.hit_tokens, two.usage.hit_tokens) == (0, (n - 1) // 256 * 256)
    assert two.usage.miss_reason == ("" if n > 256 else "too-short")


def test_turns_of_a_chat_start_where_the_last_one_ended(mini_engine: Engine, mixed: bool, serve) -> None:
    if not mixed:
        pytest.skip("single tokens and chunks differ in bits here")
    ids, history = numbers(mini_engine, (1, 450)), []
    for turn in range(2):
        ids = [*ids, *history, *numbers(mini_engine, (50 + turn, 30))]
        history, last = serve(exact_tails=turn == 1).ask(ids, 40)
        assert last.usage.hit_tokens == (0, 512)[turn]  # 480 + 39 were in the sequence: the answer's end
    ids = [*ids, *history, *numbers(mini_engine, (60, 5))]
    cold, _ = serve(stored=False).ask(ids)
    warm, last = serve().ask(ids)
    assert warm == cold
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (len(ids) - 6, "")  # the last answered token was no input


def test_a_common_prefix_is_hit_from_the_third_prompt_on(mini_engine: Engine, serve) -> None:
    server = serve()
    for seed, hit in ((1, 0), (2, 0), (3, 512)):
        ids = numbers(mini_engine, (0, 600), (seed, 300))
        warm, last = server.ask(ids)
        assert last.usage.hit_tokens == hit
        if hit:
            assert warm == serve(stored=False).ask(ids)[0]


def test_tenants_and_what_they_share(mini_engine: Engine, serve) -> None:
    server = serve()

    def hit(tenant: str, shared_tokens: int, own: int) -> int:
        ids = numbers(mini_engine, (7, 600), (own, 300))
        return server.ask(ids, 2, tenant=tenant, shared_tokens=shared_tokens)[1].usage.hit_tokens

    assert hit("a", 512, 1) == 0
    assert hit("b", 512, 2) == 512
    assert hit("b", 512, 1) == 512
    assert hit("c", 0, 1) == 0
    assert hit("a", 512, 1) == 768


@pytest.mark.slow
def test_blocks_whose_checkpoints_are_gone_are_replayed_exactly(shallow_engine: Engine, tmp_path: Path) -> None:
    engine = shallow_engine
    replay_tokens = engine.replay_tokens
    assert 0 < replay_tokens < 1536
    ids = numbers(engine, (1, 1850))
    server = Server(engine, open_store(tmp_path / "kv", engine))
    cold, _ = server.ask(ids)
    server.end()
    index = sqlite3.connect(tmp_path / "kv" / "index.sqlite3")
    index.execute("UPDATE record SET state = 2 WHERE kind = 2")  # evicted
    index.commit()
    index.close()
    server = Server(engine, open_store(tmp_path / "kv", engine))
    warm, last = server.ask(ids)
    assert warm == cold
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (1792 - replay_tokens, "evicted")
    again, last = server.ask(ids)
    assert again == cold
    assert (last.usage.hit_tokens, last.usage.miss_reason) == (1792, "")
    server.end()
