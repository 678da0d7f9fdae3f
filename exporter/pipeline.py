"""``solocard-export make``: every stage from checkpoint to bundle, one after the other, in one work folder.

Each stage is the command a person would type; it is printed before it runs. What ran with the same arguments and the
same inputs is not run again, so the same ``make`` goes on where a killed one stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.model import ENCODINGS
from exporter.checkpoint import Checkpoint
from exporter.evaluate.quality import QUALITY, Quality
from exporter.evaluate.report import REPORT, summary_lines
from exporter.plan.plan import Plan
from exporter.stage import digest, read_json, write_json

MADE = "made.json"  # what ran: stage → digest of its arguments and inputs
RECOVERIES = ("none", "heal", "router", "qad")
METHODS = ("rtn", "gptq", "mr-gptq")
HESSIAN_COLUMNS = "4096"
CLOSING = ("observe.json", "overlay.json", "teacher.json", QUALITY, "manifest.json")  # what makes a folder finished


@dataclass(frozen=True, slots=True)
class Stage:
    """One command. ``out``: the file, or the folder with a closing JSON file, that it leaves."""

    name: str
    words: tuple[str, ...]
    out: Path

    @property
    def done(self) -> bool:
        return self.out.is_file() or any((self.out / name).is_file() for name in CLOSING)


def add_command(commands: Any) -> None:
    """Add ``make CKPT OUT``; its ``func`` returns the exit code."""
    parser = commands.add_parser("make", help="all stages, from checkpoint to bundle, for one card")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder in the official V4-Flash format")
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle's folder, not there yet")
    parser.add_argument("--card", required=True, metavar="ID|FILE.yaml", help="as for plan")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="calibration texts, JSON lines")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="evaluation texts (default: --texts)")
    parser.add_argument("--encoding", choices=ENCODINGS, help="as for build")
    parser.add_argument("--context", metavar="N", help="as for plan")
    parser.add_argument("--mode", choices=("pruned", "tiered"), help="as for plan")
    parser.add_argument("--keep", metavar="K", help="as for plan")
    parser.add_argument("--dense", choices=("d4", "d8"), default="d4", help="as for plan (default: d4)")
    parser.add_argument("--head", choices=("fp8", "bf16"), default="fp8", help="as for plan (default: fp8)")
    parser.add_argument("--quantize", choices=METHODS, default="rtn", help="how to round (default: rtn)")
    parser.add_argument("--recover", choices=RECOVERIES, default="heal", help="after a cut (default: heal)")
    parser.add_argument("--steps", metavar="N", help="of --recover router or qad")
    parser.add_argument("--max-tokens", metavar="N", help="of --texts and of the evaluation, each")
    parser.add_argument("--gate", action="append", default=[], metavar="NAME=BOUND", help="as for evaluate")
    parser.add_argument("--waive", action="append", default=[], metavar="GATE=REASON", help="as for evaluate")
    parser.add_argument("--golden-prompts", type=Path, metavar="FILE", help="as for build")
    parser.add_argument("--device", default="cpu", help="of what needs torch (default: cpu)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder of the stages (default: OUT.stages)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 with the bundle at OUT; the first stage that fails ends it with its exit code."""
    checkpoint = Checkpoint.open(args.checkpoint)
    work = args.work or args.out.with_name(args.out.name + ".stages")
    work.mkdir(parents=True, exist_ok=True)
    made = Made(work / MADE, checkpoint)
    if args.evaluation is None:
        print("note: no --evaluation, so the student is judged on the texts it was calibrated on", file=sys.stderr)
    for stage in stages(args, checkpoint.config.n_routed_experts, work):
        code = made.make(stage)
        if code:
            _explain(stage, code)
            return code
    quality = work / "quality"
    print("\n".join(summary_lines(Quality.read(quality / QUALITY))))
    print(f"made {args.out}; report: {quality / REPORT}; next: solocard-export sign {args.out} --keys DIR")
    return 0


class Made:
    """What ran in this work folder, with which arguments on which inputs."""

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self._path, self._checkpoint = path, checkpoint
        self._done = read_json(path) if path.is_file() else {}

    def make(self, stage: Stage) -> int:
        """Run ``stage`` unless it is done; its exit code."""
        inputs = self._inputs(stage)
        if stage.done and self._done.get(stage.name) == inputs:
            print(f"= {stage.name}: done, {stage.out}", flush=True)
            return 0
        from exporter.__main__ import main

        print(f"$ solocard-export {shlex.join(stage.words)}", flush=True)
        code = main(stage.words)
        if code == 0:
            self._done[stage.name] = inputs
            write_json(self._path, self._done)
        return code

    def _inputs(self, stage: Stage) -> str:
        """Digest of the arguments, the checkpoint, and every file or finished folder they name."""
        named = [part for word in stage.words for part in word.split(",")]
        paths = [Path(part) for part in named if Path(part) not in (stage.out, self._checkpoint.path)]
        return digest([stage.words, self._checkpoint.source_sha256, [_content(path) for path in paths]])


def _content(path: Path) -> str:
    """Digest of a file, of the closing file of a folder, or "" for what is no path."""
    for candidate in (path, *(path / name for name in CLOSING)):
        if candidate.is_file():
            with candidate.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def stages(args: argparse.Namespace, experts: int, work: Path) -> Iterator[Stage]:
    """The commands in order; later ones depend on the plan that the first one writes."""
    checkpoint, plan_file, ranking = str(args.checkpoint), work / "plan.json", work / "ranking.json"
    yield Stage("plan", (
        "plan", checkpoint, "--card", str(args.card), *_given(args, "context", "mode", "keep"), "--dense", args.dense,
        "--head", args.head, "--out", str(plan_file),
    ), plan_file)  # fmt: skip
    plan = Plan.read(plan_file)
    device, limit = ("--device", args.device), _given(args, "max_tokens")
    hessian = () if args.quantize == "rtn" else ("--hessian", HESSIAN_COLUMNS)
    texts = ("--texts", str(args.texts))
    yield Stage("observe", ("observe", checkpoint, *texts, *limit, *hessian, *device, "--out", str(work / "stats")),
                work / "stats")  # fmt: skip
    overlays: list[Path] = []
    hashed: tuple[str, ...] = ()
    if plan.hash_layers == "cut":
        overlays.append(work / "hash")
        hashed = ("--overlay-out", str(work / "hash"), "--plan", str(plan_file))
    yield Stage("rank", ("rank", checkpoint, str(work / "stats"), *hashed, "--out", str(ranking)), ranking)

    def view() -> tuple[str, ...]:
        laid = [word for overlay in overlays for word in ("--overlay", str(overlay))]
        return (checkpoint, "--ranking", str(ranking), "--plan", str(plan_file), *laid)

    for stage in _dense_and_recovery(args, work, view, min(plan.experts_kept) < experts):
        yield stage
        if stage.name != "teacher":
            overlays.append(stage.out)
    judged = [word for name in ("gate", "waive") for value in getattr(args, name) for word in (f"--{name}", value)]
    yield Stage("evaluate", (
        "evaluate", *view(), "--texts", str(args.evaluation or args.texts), *limit, *device, *judged,
        "--out", str(work / "quality"),
    ), work / "quality")  # fmt: skip
    profile = ",".join(map(str, (plan_file, *overlays)))
    yield Stage("build", (
        "build", checkpoint, str(args.out), *_given(args, "encoding", "golden_prompts"), "--ranking", str(ranking),
        "--profile", profile, "--quality", str(work / "quality" / QUALITY),
    ), args.out)  # fmt: skip


def _dense_and_recovery(
    args: argparse.Namespace, work: Path, view: Callable[[], tuple[str, ...]], pruned: bool
) -> Iterator[Stage]:
    """Healing before the dense part is rounded; router training after it, to make up for that, too; QAD rounds the
    dense part itself and leaves the head. Healing has nothing to do where no expert is cut."""
    common = ("--texts", str(args.texts), *_given(args, "max_tokens"), "--device", args.device)
    if args.recover == "heal" and pruned:
        yield _overlay("heal", ("distill", "heal", *view(), *common), work)
    if args.recover in ("router", "qad"):
        out = work / "teacher"
        yield Stage("teacher", ("distill", "teacher", str(args.checkpoint), *common, "--out", str(out)), out)
    train = (*_given(args, "steps"), "--texts", str(args.texts), "--teacher", str(work / "teacher"), *common[-2:])
    if args.recover == "qad":
        yield _overlay("qad", ("distill", "qad", *view(), "--dense", args.dense, *train), work)
    dense = "d8" if args.recover == "qad" else args.dense
    if dense == "d4" or args.head == "fp8":
        method = () if args.quantize == "rtn" or dense == "d8" else (f"--{args.quantize}",)
        formats = ("--stats", str(work / "stats"), "--dense", dense, "--head", args.head, *method)
        yield _overlay("quantized", ("quantize", *view(), *formats), work)
    if args.recover == "router":
        yield _overlay("router", ("distill", "router", *view(), *train), work)


def _overlay(name: str, words: tuple[str, ...], work: Path) -> Stage:
    return Stage(name, (*words, "--out", str(work / name)), work / name)


def _given(args: argparse.Namespace, *options: str) -> tuple[str, ...]:
    """``--option value`` of those that were given."""
    pairs = [(f"--{option.replace('_', '-')}", getattr(args, option)) for option in options]
    return tuple(str(word) for pair in pairs if pair[1] is not None for word in pair)


def _explain(stage: Stage, code: int) -> None:
    """What to do after a stage failed; its own message stands above."""
    todo = f"mend that and run the same make again: what is done stays in {stage.out.parent}"
    if stage.name == "evaluate" and code == 1:
        todo = (
            "a gate failed: keep more experts, recover for longer, or run make again with --waive GATE=REASON "
            "(measures nothing again)"
        )
    print(f"solocard: make stopped at {stage.name} (exit {code}); {todo}", file=sys.stderr)
