"""KV state on disk beside llama.cpp's sequence state files: same weights, same KV geometry, same machine.

    python benchmarks/llamacpp.py [--library PATH] [--layers 6] [--tokens 1024] [--cache f16] [--lengths 255,256,700]

PATH is any shared library that exports llama.cpp's C interface and knows the architecture "deepseek4": libllama.so of
a build (cmake -B build -DBUILD_SHARED_LIBS=ON; cmake --build build --target llama), or a wheel's extension module:

    pip download --no-deps xllamacpp==2026.10.11549 && unzip xllamacpp-*.whl -d peer
    python benchmarks/llamacpp.py --library peer/xllamacpp/xllamacpp.abi3.so

Without it only our side is measured. Both sides run random weights of the preset ``kv-true`` (head_dim 512, window
128, ratios 0, 0, 4, 128, 4, …, indexer 128), with 43 layers or the first 6, one thread each, one after the other, in
processes of their own. Prints absolute figures; asserts that all saved tokens come back, nothing about speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import llamacpp_measure as measure  # noqa: E402
from llamacpp_library import ELEMENT_TYPES, LibraryError  # noqa: E402
from llamacpp_sides import FilledSide, OurSide, PeerSide, Side  # noqa: E402

from exporter.presets import KV_TRUE  # noqa: E402

SEEDS = (0, 1)
LABELS = {"llama.cpp": "llama.cpp", "ours": "solocard", "ours-tail": "solocard, exact tail"}
Figures = dict[str, Any]


# -- one side, in a process of its own -------------------------------------------------------------------------------


def make_side(name: str, seed: int, args: argparse.Namespace) -> Side:
    folder, context_tokens = Path(args.folder), max(args.tokens, *args.lengths) + args.steps + 256
    if name == "llama.cpp":
        return PeerSide(args.library, folder / f"{seed}.gguf", context_tokens=context_tokens, cache=args.cache)
    kind = FilledSide if args.cost_only else OurSide
    return kind(folder / f"checkpoint-{seed}", folder / f"bundle-{seed}", context_tokens=context_tokens,
                   exact_tail=name == "ours-tail")  # fmt: skip


def measure_side(args: argparse.Namespace) -> Figures:
    """Everything of ``args.side``; progress goes to stderr."""
    logging.getLogger("solocard.kv").setLevel(logging.ERROR)  # a warning per damaged record
    side = make_side(args.side, SEEDS[0], args)
    kept = Path(args.folder) / f"kept-{args.side}"
    ids = measure.prompt(KV_TRUE.vocab_size, max(args.tokens, *args.lengths) + args.steps)
    figures: Figures = {"name": args.side, "exact": [], "cost": []}
    for n in [] if args.cost_only else args.lengths:
        if n % side.unit_tokens == 0:
            say(f"{args.side}: exactness at {n} tokens")
            figures["exact"].append(measure.exactness(side, ids, n, args.steps, kept))
    for n in (args.tokens // 2, args.tokens):
        say(f"{args.side}: cost at {n} tokens")
        figures["cost"].append(measure.cost(side, ids, n, args.rounds, kept))
    if isinstance(side, PeerSide):
        figures["library"] = side.library.description
    if args.cost_only:
        return figures
    say(f"{args.side}: damage")
    ids = ids[: args.tokens + 4]
    figures["damage"] = measure.damage(side, ids, args.tokens, args.places, kept)
    say(f"{args.side}: another model's state")
    figures["other"] = measure.in_child(lambda: other_weights(args, ids, kept))
    return figures


def other_weights(args: argparse.Namespace, ids: list[int], kept: Path) -> Figures:
    """The state of seed 0 given to the model of seed 1, beside what that model computes itself."""
    side, n = make_side(args.side, SEEDS[1], args), args.tokens
    chat = side.start()
    side.feed(chat, ids[:n])
    right = measure.steps(side, chat, ids[n:])
    side.close(chat)
    return measure.attempt(side, ids, right, kept) | {"deviation": float(right.std())}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- both, and the report --------------------------------------------------------------------------------------------


def write_models(args: argparse.Namespace) -> None:
    """Two checkpoints of equal shapes and other weights, and their GGUF files where there is a peer."""
    from llamacpp_gguf import write_gguf

    from exporter.checkpoint import Checkpoint
    from exporter.sample import write_random

    ratios = KV_TRUE.compress_ratios[: args.layers]
    config = dataclasses.replace(KV_TRUE, num_hidden_layers=args.layers, compress_ratios=ratios)
    for seed in SEEDS:
        path = Path(args.folder) / f"checkpoint-{seed}"
        write_random(path, config, seed, mtp=0)
        if args.library:
            write_gguf(Checkpoint.open(path), Path(args.folder) / f"{seed}.gguf")


def run_side(name: str, args: argparse.Namespace) -> Figures:
    options = {"side": name, "folder": args.folder, "library": args.library, "layers": args.layers,
               "tokens": args.tokens, "steps": args.steps, "cache": args.cache, "rounds": args.rounds,
               "places": args.places, "lengths": ",".join(map(str, args.lengths))}  # fmt: skip
    command = [sys.executable, __file__, *(["--cost-only"] if args.cost_only else [])]
    for key, value in options.items():
        command += [f"--{key}", str(value)] if value is not None else []
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}  # else an abort starts a debugger
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{LABELS[name]}: stopped with exit code {done.returncode}; its error is above")
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def report(sides: list[Figures], args: argparse.Namespace) -> None:
    print(f"machine: {cpu_name()}, {os.cpu_count()} cores, Linux {platform.release()}, Python "
          f"{platform.python_version()}; load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"model: kv-true, {args.layers} layers, random weights; {args.tokens} tokens; one thread each")
    for figures in sides:
        if "library" in figures:
            print(f"llama.cpp: {args.library.name}: {figures['library']}; cache {args.cache}")
    if not args.library:
        print("llama.cpp: not measured, give --library PATH (how to get one: --help)")
    for figures in sides:
        print(f"\n{LABELS[figures['name']]}")
        print_cost(figures["cost"], not args.cost_only or figures["name"] == "llama.cpp")
        print_exact(figures["exact"])
        if "damage" in figures:
            print_damage(figures)
    print_agreement(sides)


def print_cost(cost: list[Figures], computed: bool) -> None:
    half, full = cost
    per_token = (full["bytes"] - half["bytes"]) / (full["tokens"] - half["tokens"])
    print(f"  size      {full['bytes']:>12,} B at {full['tokens']} tokens = {per_token:,.0f} B a token + "
          f"{full['bytes'] - per_token * full['tokens']:,.0f} B")  # fmt: skip
    print(f"            {', '.join(f'{name} {size:,}' for name, size in full['files'].items())}")
    ms = {name: f"{1000 * wall:,.1f} ms ({1000 * best:,.1f}; CPU {1000 * cpu:,.1f})"
          for name, (wall, best, cpu) in full["seconds"].items()}  # fmt: skip
    print("            below: median (best; median of the CPU time)")
    print(f"  save      {ms['save']}; a further fsync of its files {ms['sync']}")
    for name in ("cold", "warm"):
        print(f"  restore   {name} {ms[f'restore_{name}']}; opening {ms[f'open_{name}']}; plain read of the files "
              f"{ms[f'read_{name}']}")  # fmt: skip
    if computed:
        print(f"  prefill   {full['seconds']['prefill'][0]:,.1f} s for the same tokens")


def print_exact(exact: list[Figures]) -> None:
    for found in exact:
        print(f"  exact     n = {found['tokens']}: max |change of a logit| restored {found['restored']:.3g}, two cold "
              f"runs {found['control']:.3g} (their deviation {found['deviation']:.2f})")  # fmt: skip


def print_damage(figures: Figures) -> None:
    for name, found in figures["damage"].items():
        parts = [f"{found[key]} {text}" for key, text in (
            ("refused", "refused"), ("accepted_wrong", "accepted with other logits"),
            ("accepted_same", "accepted with the same logits"), ("died", "ended the process"),
        ) if found[key]]  # fmt: skip
        change = f", largest change {found['largest_change']:.3g}" if found["accepted_wrong"] else ""
        reasons = f" ({'; '.join(found['reasons'])})" if found["reasons"] else ""
        print(f"  {name}: of {found['tried']}: {', '.join(parts)}{change}{reasons}")
        if found.get("recomputed") is not None:
            print(f"            computed again after a refusal: largest change of a logit {found['recomputed']:.3g}")
    other = figures["other"]
    if "died" in other:
        said = f"ended the process ({other['died']})"
    elif "logits" in other:
        said = f"ACCEPTED, logits off by up to {other['logits']:.3g} (their deviation {other['deviation']:.2f})"
    else:
        said = f"refused: {other['reason']}"
    print(f"  another model's state: {said}")


def print_agreement(sides: list[Figures]) -> None:
    """Both sides' logits after the same prompt: that they run the same model."""
    if len(sides) < 2 or sides[0]["name"] != "llama.cpp":
        return
    for a in sides[0]["exact"]:
        for b in sides[-1]["exact"]:
            if a["tokens"] == b["tokens"]:
                x, y = np.array(a["prompt_logits"]), np.array(b["prompt_logits"])
                print(f"\nlogits after {a['tokens']} tokens, llama.cpp against solocard: correlation "
                      f"{np.corrcoef(x, y)[0, 1]:.5f}, max |difference| {np.abs(x - y).max():.3f}")  # fmt: skip


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, help="llama.cpp's shared library; without it only our side is measured")
    parser.add_argument("--layers", type=int, choices=[6, 43], default=6)
    parser.add_argument("--tokens", type=int, default=1024, help="a multiple of 512 (default: 1024)")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[255, 256, 700, 1024],
                        help="prompts whose restore is checked for exactness (default: 255,256,700,1024)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=64, help="further tokens compared (default: 64)")
    parser.add_argument("--cache", choices=[*ELEMENT_TYPES], default="f16", help="llama.cpp's cache (default: f16)")
    parser.add_argument(
        "--cost-only", action="store_true", help="sizes and times alone; our state is random bytes then"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--places", type=int, default=16, help="damaged copies of each kind (default: 16)")
    parser.add_argument("--json", type=Path, help="write all figures to this file too")
    parser.add_argument("--dir", type=Path, help="where the temporary folder is made")
    parser.add_argument("--side", choices=[*LABELS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens % 512 or args.tokens < 512:
        parser.error(f"--tokens {args.tokens}: expected a multiple of 512")
    if args.side:
        print(json.dumps(measure_side(args)))
        return
    with tempfile.TemporaryDirectory(prefix="solocard-bench-", dir=args.dir) as args.folder:
        write_models(args)
        names = [*(["llama.cpp"] if args.library else []), "ours", "ours-tail"]
        sides = [run_side(name, args) for name in names]
    report(sides, args)
    if args.json:
        args.json.write_text(json.dumps(sides, indent=1))


if __name__ == "__main__":
    try:
        main()
    except LibraryError as error:
        raise SystemExit(str(error)) from None
