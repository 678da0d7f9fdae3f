"""A trace of agents through the real store: near the ideal, few bytes, never above the quota, every block right."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from kv_trace_support import (
    BLOCK_BYTES,
    SEGMENT_BYTES,
    Replay,
    Request,
    Tokens,
    end_points,
    ideal_hit,
    quota_bytes,
    read_trace,
)

from runtime.kv.policy import Policy

ROOT = Path(__file__).resolve().parents[2]


def _load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def agents():
    """Agents with short prompts: what a share of CI has time for."""
    trace = _load("agent_trace")

    def make(seed, sessions=16, **changes):
        load = trace.Load(
            seed=seed, sessions=sessions, hours=4, products=(12_000, 6_000), repository_tokens=4_000, tenants=2,
            start_mean=6_000, start_median=3_000, longest_prompt=40_000, **changes,
        )  # fmt: skip
        return [Request(r.timestamp / 1000, r.input_length, r.output_length, r.hash_ids, r.tenant, r.anchors)
                for r in trace.generate(load)]  # fmt: skip

    return make


@pytest.mark.parametrize("seed", [11, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 16))])
def test_agents_in_a_quarter_of_the_room_they_fill(tmp_path, agents, seed):
    """Restarted every 40 requests; the quota holds a quarter of the distinct blocks."""
    requests = agents(seed)
    distinct = len({(r.tenant, name) for r in requests for name in r.units})
    quota = max(distinct * BLOCK_BYTES // 4, 5 * SEGMENT_BYTES)
    score = Replay(tmp_path / "kv", Policy(max_bytes=quota), restart_every=40).run(requests)
    ideal = ideal_hit(requests, quota / BLOCK_BYTES)
    assert score.requests == len(requests) > 60
    assert score.refused == 0
    assert -1 < score.over_segments <= 0.25  # a fifth of one victim, written again before it goes, and footers
    assert score.hit >= 0.9 * ideal
    assert score.hit <= ideal_hit(requests, float("inf"))


def test_agents_with_room(tmp_path, agents):
    """Nothing has to go: what separates it from the ideal are the places without a checkpoint, in hits and bytes."""
    requests = agents(21, sessions=8)
    score = Replay(tmp_path / "kv", Policy(max_bytes=quota_bytes(1e12))).run(requests)
    assert score.hit >= 0.97 * ideal_hit(requests, float("inf"))
    assert score.copied < 0.01
    assert score.reasons.get("evicted", 0) == 0
    ends = Replay(tmp_path / "ends", Policy(max_bytes=quota_bytes(1e12)), end_points, 0).run(requests)
    assert ends.hit < score.hit  # a checkpoint only at prompts' ends finds no common prefix


def test_the_same_seed_gives_the_same_trace(agents):
    first, again, other = agents(1, sessions=4), agents(1, sessions=4), agents(2, sessions=4)
    assert first == again != other
    assert [r.at_s for r in first] == sorted(r.at_s for r in first)
    for request in first:
        assert len(request.units) == -(-request.tokens // 256)
    shared = [r.units[0] for r in first if r.tenant == "tenant-0"]
    assert len(set(shared)) <= 2  # one for each product
    assert not {u for r in first if r.tenant == "tenant-0" for u in r.units} & {
        u for r in first if r.tenant == "tenant-1" for u in r.units
    }


def test_mooncake_lines_are_read(tmp_path):
    lines = [{"timestamp": 1500, "input_length": 1300, "output_length": 7, "hash_ids": [5, 6, 9]},
             {"timestamp": 2500.5, "input_length": 512, "output_length": 1, "hash_ids": [5]}]  # fmt: skip
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_trace(path)
    assert (first.at_s, first.tokens, first.output_tokens, first.units) == (1.5, 1025, 7, (10, 11, 12, 13))
    assert (second.at_s, second.tokens, second.units) == (2.5005, 513, (10, 11))
    fine = read_trace(path, unit_tokens=256)
    assert (fine[0].tokens, fine[0].units) == (1300, (5, 6, 9))


def test_ideal_by_hand():
    """Three blocks of room: a, b, c of the first prompt; of the second only d is new; then b's end is gone."""

    def request(*units):
        return Request(0.0, 256 * len(units) + 1, 0, units)

    requests = [request(1, 2, 3), request(1, 2, 4), request(1, 2, 3)]
    assert ideal_hit(requests, float("inf")) == (2 + 3) * 256 / (3 * 769)
    assert ideal_hit(requests, 3) == (2 + 2) * 256 / (3 * 769)
    assert ideal_hit(requests, 0) == 0


def test_tokens_are_what_their_units_say():
    tokens = Tokens((7, 9), 300)
    assert len(tokens) == 300
    assert list(tokens[0:256]) == [7] * 256
    assert tokens[250:260] == [7] * 6 + [9] * 4
    assert (tokens[255], tokens[256], tokens[256:512]) == (7, 9, [9] * 44)
