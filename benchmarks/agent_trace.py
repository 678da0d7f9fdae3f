"""Make a trace of coding agents' requests, in Mooncake's JSON lines.

    python benchmarks/agent_trace.py [--seed 0] [--sessions 600] [--hours 30] > trace.jsonl

Each session's prompt is laid in layers, as the agentic-code generator of NVIDIA AIPerf describes them: the product's
system prompt and tools (the same for all its users), the repository's instructions, the session's opening context,
then a history that grows by the model's output and the next tool result or question. Sessions retry an answer, go
back and take another branch, are reset, and are left alone for hours. Lengths are log-normal with that generator's
published means and medians. Tenants share nothing.

A line: {"timestamp": ms, "input_length", "output_length", "hash_ids", "tenant", "session", "anchors"}. ``hash_ids``
name the units of 256 tokens of the whole prompt, the last one cut short; equal ids = equal prompt up to there.
``anchors``: where the system prompt and the repository's instructions end, in tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

UNIT_TOKENS = 256
_Piece = tuple[int, int]  # name of a run of tokens, its length


@dataclass(frozen=True, slots=True)
class Load:
    """What the agents do; lengths in tokens, times in seconds."""

    seed: int = 0
    sessions: int = 600
    hours: float = 30.0
    tenants: int = 4
    products: tuple[int, ...] = (32_000, 20_000, 9_000)  # length of each product's system prompt and tools
    repositories: int = 8  # of each tenant
    repository_tokens: int = 10_000
    start_mean: float = 15_000.0
    start_median: float = 5_000.0
    new_mean: float = 6_000.0
    new_median: float = 4_000.0
    output_mean: float = 1_000.0
    output_median: float = 800.0
    longest_prompt: int = 200_000
    reset: float = 0.05  # a turn is the last one, with a chance growing to 1.5 times this at the longest prompt
    retry: float = 0.03  # the same prompt again
    branch: float = 0.04  # back by one to four turns, and on from there
    human: float = 0.3  # share of turns that wait for a person
    tool_s: float = 5.0
    person_s: float = 90.0
    pause: float = 0.04  # a person's turn comes after 1 to 14 hours


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt. ``hash_ids`` name its units of ``unit_tokens``, the last one may be partial."""

    timestamp: float  # ms since the start
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]
    tenant: str = "default"
    session: int = -1
    anchors: tuple[int, ...] = ()


@dataclass(slots=True)
class Names:
    """Gives a prefix its number: the same for the same pieces, whoever sends them."""

    known: dict[tuple[object, ...], int] = field(default_factory=dict)
    pieces: int = 0

    def piece(self, length: int) -> _Piece:
        self.pieces += 1
        return self.pieces, length

    def units(self, tenant: str, context: list[_Piece]) -> tuple[int, ...]:
        """The ids of the units of ``context``, the last one partial."""
        ids: list[int] = []
        parent, unit, room = tenant, [], UNIT_TOKENS
        for piece, length in context:
            start = 0
            while start < length:
                take = min(room, length - start)
                unit.append((piece, start, take))
                start, room = start + take, room - take
                if not room:
                    ids.append(self._name(parent, unit))
                    parent, unit, room = ids[-1], [], UNIT_TOKENS
        if unit:
            ids.append(self._name(parent, unit))
        return tuple(ids)

    def _name(self, parent: object, unit: list[tuple[int, int, int]]) -> int:
        return self.known.setdefault((parent, *unit), len(self.known))


@dataclass(slots=True)
class _Session:
    number: int
    tenant: str
    context: list[_Piece]
    anchors: tuple[int, ...]
    turns: list[int]  # len(context) before each turn's prompt was extended


def generate(load: Load) -> list[Request]:
    """All requests by time; the same load gives the same trace."""
    names, rng = Names(), random.Random(load.seed)
    systems = {(t, p): names.piece(n) for t in range(load.tenants) for p, n in enumerate(load.products)}
    repositories = {(t, r): names.piece(load.repository_tokens)
                    for t in range(load.tenants) for r in range(load.repositories)}  # fmt: skip
    requests: list[Request] = []
    for number in range(load.sessions):
        tenant = _zipf(rng, load.tenants)
        product, repository = _zipf(rng, len(load.products)), _zipf(rng, load.repositories)
        context = [systems[tenant, product], repositories[tenant, repository]]
        anchors = (context[0][1], context[0][1] + context[1][1])
        context.append(names.piece(_length(rng, load.start_mean, load.start_median, 50_000)))
        session = _Session(number, f"tenant-{tenant}", context, anchors, [])
        requests += _turns(load, rng, names, session)
    return sorted(requests, key=lambda request: request.timestamp)


def _turns(load: Load, rng: random.Random, names: Names, session: _Session) -> Iterator[Request]:
    at_s = rng.random() * load.hours * 3600
    while (tokens := _tokens(session.context)) < load.longest_prompt:
        output = _length(rng, load.output_mean, load.output_median, 10_000)
        yield Request(round(at_s * 1000, 3), tokens, output, names.units(session.tenant, session.context),
                      session.tenant, session.number, session.anchors)  # fmt: skip
        at_s += _wait_s(load, rng, output)
        if rng.random() < load.retry:
            continue
        session.turns.append(len(session.context))
        session.context.append(names.piece(output))
        if len(session.turns) > 2 and rng.random() < load.branch:
            back = rng.randint(1, min(4, len(session.turns) - 1))
            session.context = session.context[: session.turns[-back]]
            session.turns = session.turns[:-back]
        session.context.append(names.piece(_length(rng, load.new_mean, load.new_median, 50_000)))
        if rng.random() < load.reset * (1 + 0.5 * tokens / load.longest_prompt):
            return


def _wait_s(load: Load, rng: random.Random, output: int) -> float:
    decode_s = output / 30
    if rng.random() >= load.human:
        return decode_s + rng.expovariate(1 / load.tool_s)
    if rng.random() < load.pause:
        return decode_s + rng.uniform(1, 14) * 3600
    return decode_s + rng.expovariate(1 / load.person_s)


def _length(rng: random.Random, mean: float, median: float, longest: int) -> int:
    sigma = math.sqrt(2 * math.log(mean / median))
    return max(1, min(longest, round(rng.lognormvariate(math.log(median), sigma))))


def _zipf(rng: random.Random, count: int) -> int:
    return rng.choices(range(count), [1 / (i + 1) ** 0.6 for i in range(count)])[0]


def _tokens(context: list[_Piece]) -> int:
    return sum(length for _, length in context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=Load().sessions)
    parser.add_argument("--hours", type=float, default=Load().hours, help="sessions start within this time")
    options = parser.parse_args()
    for request in generate(Load(seed=options.seed, sessions=options.sessions, hours=options.hours)):
        sys.stdout.write(json.dumps(asdict(request)) + "\n")


if __name__ == "__main__":
    main()
