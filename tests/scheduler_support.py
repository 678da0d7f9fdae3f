"""Clients of a scheduler without HTTP, for tests of what happens between a request and the engine."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from serve_support import FakeEngine, FakeKv, tokenizer

from runtime.chat.transcript import Transcript
from runtime.request import Delta, Event, Failed, Finished, Request
from runtime.sampler import SamplingParams
from runtime.scheduler import Scheduler


@dataclass
class Client:
    """Collects the events of one request."""

    events: queue.Queue[Event] = field(default_factory=queue.Queue)

    def request(self, tokens: int | list[int], *, name: str = "r", tenant: str = "default", **params) -> Request:
        ids = list(range(2, 258)) * 20
        params = {"temperature": 0.0, "max_tokens": 4} | params
        sampling = SamplingParams(**params)
        transcript = Transcript(tokenizer(), thinking=False, stop=sampling.stop, replayed=True)
        prompt = ids[:tokens] if isinstance(tokens, int) else tokens
        return Request(name, prompt, sampling, transcript, self.events.put, tenant)

    def wait(self) -> tuple[str, Finished | Failed]:
        text = ""
        while True:
            event = self.events.get(timeout=60)
            if not isinstance(event, Delta):
                return text, event
            text += event.text


@contextlib.contextmanager
def schedulers() -> Iterator[Callable[..., Scheduler]]:
    """A maker of running schedulers that all have to end."""
    made: list[Scheduler] = []

    def build(engine: FakeEngine, kv: FakeKv | None = None, **options) -> Scheduler:
        scheduler = Scheduler(engine, kv, **options)
        made.append(scheduler)
        scheduler.start()
        return scheduler

    yield build
    ended = [scheduler.stop(10) for scheduler in made]
    assert all(ended)


def answer(scheduler: Scheduler, tokens: int | list[int], **options) -> tuple[str, Finished]:
    client = Client()
    scheduler.submit(client.request(tokens, **options))
    text, last = client.wait()
    assert isinstance(last, Finished), last
    return text, last
