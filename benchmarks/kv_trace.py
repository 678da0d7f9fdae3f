"""How much of a trace the KV cache hits, and what it writes for that, measured on the real store in small.

    python benchmarks/kv_trace.py [--seeds 0 1] [--sessions 600] [--quota 32 128 512] [--rule product end dense]
    python benchmarks/kv_trace.py --trace conversation_trace.jsonl [--unit 512] [--model]

Without --trace the agents of agent_trace.py are replayed, one trace a seed. Mooncake's public traces are the files
``conversation_trace.jsonl``, ``toolagent_trace.jsonl`` and ``synthetic_trace.jsonl`` in the folder
``FAST25-release/traces`` of the repository ``kvcache-ai/Mooncake``; their hash ids stand for 512 tokens each.

The store is the product's, its clock the trace's; records are 1/220 of V4-Flash's size (tests/kv_trace_support.py).
With --model the policy alone is replayed (kv_trace_model.py): for full sizes, where the store takes an hour.
"hit": tokens not computed again; what an exact replay recomputes counts as a miss. "ideal": an LRU cache of blocks of
the same quota in which any block boundary is free; "of ideal" is the share of that. "unlimited": the same without
a quota. "written": everything written to segments, checkpoints and copies included, per byte of the distinct blocks.
"over": the most that the files ever held beyond the quota, in segments. Rules: ``product`` is the scheduler's write
points, ``end`` a checkpoint at the end of each prompt only, ``dense`` one every 4,096 tokens besides.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from agent_trace import Load, generate  # noqa: E402
from kv_trace_model import ModelReplay  # noqa: E402
from kv_trace_support import (  # noqa: E402
    REAL_BLOCK_BYTES,
    REPLAY_TOKENS,
    Replay,
    Request,
    Score,
    dense_points,
    end_points,
    ideal_hit,
    product_points,
    quota_bytes,
    read_trace,
)

from runtime.kv.policy import Policy  # noqa: E402

RULES = {"product": product_points, "end": end_points, "dense": dense_points}
_HEAD = "trace            quota  rule      hit %  ideal %  of ideal %  unlimited %  written  copied  over  refused"


def agent_requests(seed: int, sessions: int, hours: float) -> list[Request]:
    """The generated trace as the replay takes it."""
    load = Load(seed=seed, sessions=sessions, hours=hours)
    return [Request(r.timestamp / 1000, r.input_length, r.output_length, r.hash_ids, r.tenant, r.anchors)
            for r in generate(load)]  # fmt: skip


def measure(requests: list[Request], quota_gb: float, rule: str, directory: Path) -> Score:
    """One replay; a line of progress on stderr every few seconds."""
    begin = last = time.monotonic()

    def tick(score: Score) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            sys.stderr.write(f"\r{score.requests} of {len(requests)} requests, {last - begin:.0f} s, "
                             f"hit {100 * score.hit:.2f} %   ")  # fmt: skip
            sys.stderr.flush()

    policy = Policy(max_bytes=quota_bytes(quota_gb * 1e9))
    score = Replay(directory, policy, RULES[rule], _replays(rule)).run(requests, tick)
    sys.stderr.write("\r" + " " * 70 + "\r")
    return score


def _replays(rule: str) -> int:
    return REPLAY_TOKENS if rule == "product" else 0


def report(
    name: str, requests: list[Request], quotas_gb: list[float], rules: list[str], base: Path | None, model: bool
) -> None:  # fmt: skip
    """Print a line for each quota and rule."""
    unlimited = ideal_hit(requests, float("inf"))
    for quota_gb in quotas_gb:
        ideal = ideal_hit(requests, quota_gb * 1e9 / REAL_BLOCK_BYTES)
        for rule in rules:
            if model:
                score = ModelReplay(quota_bytes(quota_gb * 1e9), RULES[rule], _replays(rule)).run(requests)
            else:
                with tempfile.TemporaryDirectory(dir=base) as directory:
                    score = measure(requests, quota_gb, rule, Path(directory) / "kv")
            share = 100 * score.hit / ideal if ideal else 100.0
            cells = (f"{name:<16}", f"{quota_gb:>4g}GB ", f"{rule:<8}", f"{100 * score.hit:>6.2f} ",
                     f"{100 * ideal:>7.2f} ", f"{share:>10.2f} ", f"{100 * unlimited:>11.2f} ",
                     f"{score.written:>7.4f} ", f"{score.copied:>6.4f} ",
                     f"{score.over_segments:>4.2f} ", f"{score.refused:>7}")  # fmt: skip
            print(*cells, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="a file of Mooncake JSON lines instead of the generated agents")
    parser.add_argument("--unit", type=int, default=512, help="tokens that one hash id of --trace stands for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sessions", type=int, default=Load().sessions)
    parser.add_argument("--hours", type=float, default=Load().hours)
    parser.add_argument("--quota", type=float, nargs="+", default=[32, 128, 512], help="GB of the real store")
    parser.add_argument("--rule", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--model", action="store_true", help="the policy without the store: minutes, not hours")
    parser.add_argument("--dir", type=Path, help="where the small store goes; a memory file system is quickest")
    options = parser.parse_args()
    print(_HEAD)
    if options.trace:
        traces = {options.trace.stem: read_trace(options.trace, options.unit)}
    else:
        traces = {f"agents seed {s}": agent_requests(s, options.sessions, options.hours) for s in options.seeds}
    for name, requests in traces.items():
        report(name, requests, options.quota, options.rule, options.dir, options.model)


if __name__ == "__main__":
    main()
