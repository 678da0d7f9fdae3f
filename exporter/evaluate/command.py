"""``evaluate`` measures a student against its teacher and gates it; ``report`` writes its report again."""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appliance.errors import UsageError
from exporter.calibration import TOKENIZER, Text, open_tokenizer, read_texts, texts_sha256
from exporter.evaluate import gates
from exporter.evaluate.metrics import SHORTEST_LENGTH, gate_measurements
from exporter.evaluate.needle import Needle, build_needles
from exporter.evaluate.quality import QUALITY, Quality
from exporter.evaluate.report import summary_lines, write_report
from exporter.overlay import Overlay
from exporter.stage import StageFolder, code_version, digest, read_json
from exporter.view import View
from exporter.view_arguments import add_view_arguments, open_view

FAILED = 1  # exit code when a gate fails that no waiver names


def add_commands(commands: Any) -> None:
    """Add ``evaluate`` and ``report``."""
    parser = commands.add_parser("evaluate", help="a student against its teacher: quality.json, report.md and plots")
    add_view_arguments(parser)
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="evaluation texts, JSON lines")
    parser.add_argument("--long", type=Path, metavar="FILE", help="longer texts, for perplexity at growing lengths")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="quality.json, report.md, *.svg")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keeps the teacher's part for the next student")
    parser.add_argument("--teacher-overlay", type=Path, action="append", default=[], metavar="DIR",
                        help="the teacher is the checkpoint in full; with this, the checkpoint with overlays on top")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="only the first N tokens of --texts")
    parser.add_argument("--needles", type=int, default=1, metavar="N", help="of each length and depth (default: 1)")
    parser.add_argument("--needle-lengths", metavar="LIST", help="tokens (default: 256, 512 … up to the longest text)")
    parser.add_argument("--answers", type=int, default=16, metavar="N", help="greedy answers to compare (default: 16)")
    parser.add_argument("--answer-tokens", type=int, default=64, metavar="N", help="tokens of one (default: 64)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu (default: cpu)")
    _add_gate_arguments(parser)
    parser.set_defaults(func=run)
    parser = commands.add_parser("report", help="write report.md and its plots again from quality.json")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of evaluate")
    parser.set_defaults(func=_run_report)


def _add_gate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gate", action="append", default=[], metavar="NAME=BOUND",
                        help=f"another bound than the plan's or the default; gates: {', '.join(gates.NAMES)}")
    parser.add_argument("--waive", action="append", default=[], metavar="GATE=REASON",
                        help="let a failed gate pass; the reason is recorded and shown in the report")
    parser.add_argument("--by", metavar="NAME", help="who waives (default: the name logged in)")


def run(args: argparse.Namespace) -> int:
    """Exit 0 when every gate passes or is waived, 1 when one fails; all results are written either way."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError("evaluate needs torch: pip install 'solocard[distill]' (CPU build: about 200 MB)")
    student = open_view(args)
    bounds, waivers = _bounds(args, student), _waivers(args)
    teacher = View(student.base, overlays=[Overlay.open(path) for path in args.teacher_overlay])
    texts = read_texts(args.texts, student, max_tokens=args.max_tokens)
    longer = read_texts(args.long, student) if args.long else []
    needles = _needles(args, student, [*texts, *longer])
    from exporter.evaluate.measure import Measurement, Question

    question = Question(teacher, student, texts, longer, needles, args.answers, args.answer_tokens, args.device)
    folder = StageFolder(args.out, _recipe(args, question))
    measurement = Measurement(question, folder, args.work or args.out / "work")
    metrics = measurement.metrics() | {"student": _described(student)}
    quality = Quality(
        student.recipe_sha256, student.source_sha256, _described(teacher), texts_sha256(args.texts), code_version(),
        metrics, gates.judge(bounds, gate_measurements(metrics), waivers), waivers,
    )
    folder.finish(QUALITY, quality.to_dict())
    report = write_report(args.out)
    measurement.discard_student()
    if args.work is None:
        shutil.rmtree(args.out / "work", ignore_errors=True)
    return _tell(quality, report)


def _run_report(args: argparse.Namespace) -> int:
    report = write_report(args.folder)
    return _tell(Quality.read(args.folder / QUALITY), report)


def _tell(quality: Quality, report: Path) -> int:
    """Print gates and verdict; the exit code."""
    print("\n".join(summary_lines(quality)))
    print(f"wrote {report}")
    if not quality.failed_gates:
        return 0
    names = " ".join(f"--waive {name}='…'" for name in quality.failed_gates)
    print(f"solocard: build refuses this student; improve it, or evaluate again with {names}", file=sys.stderr)
    return FAILED


def _bounds(args: argparse.Namespace, student: View) -> dict[str, float]:
    plan = read_json(args.plan).get("gates", {}) if args.plan else {}
    if not isinstance(plan, dict):
        raise UsageError(f"{args.plan}: gates: found a {type(plan).__name__}, expected an object of bounds")
    pruned = any(kept < student.config.n_routed_experts for kept in student.experts_kept)
    return gates.bounds(pruned=pruned, plan=plan, asked=dict(map(gates.parse_bound, args.gate)))


def _waivers(args: argparse.Namespace) -> tuple[gates.Waiver, ...]:
    by = args.by or (_user() if args.waive else "")
    waivers = tuple(gates.parse_waiver(text, by) for text in args.waive)
    if len({waiver.gate for waiver in waivers}) < len(waivers):
        raise UsageError("--waive: a gate is named twice; give one reason for each")
    return waivers


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in passwd
        raise UsageError("--waive: the name logged in is not known; give --by NAME") from None


def _needles(args: argparse.Namespace, view: View, texts: Sequence[Text]) -> list[Needle]:
    for option in ("needles", "answers", "answer_tokens"):
        if getattr(args, option) < (1 if option == "answer_tokens" else 0):
            raise UsageError(f"--{option.replace('_', '-')} {getattr(args, option)}: expected 0 or more")
    longest = max(len(text.ids) for text in texts)
    lengths = _lengths(args.needle_lengths, longest, view.config.max_position_embeddings)
    haystack = [token for text in sorted(texts, key=lambda text: -len(text.ids)) for token in text.ids]
    encode = None
    if args.needles and lengths and (view.path / TOKENIZER).is_file():
        tokenizer = open_tokenizer(view.path / TOKENIZER)

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return build_needles(haystack, lengths, args.needles, vocab_size=view.config.vocab_size, encode=encode)


def _lengths(asked: str | None, longest: int, limit: int) -> list[int]:
    """Needle lengths in tokens: as asked, or 256 doubled up to the longest text."""
    if asked is None:
        return [SHORTEST_LENGTH << at for at in range(24) if SHORTEST_LENGTH << at <= min(longest, limit)]
    try:
        lengths = [int(word) for word in asked.split(",")]
    except ValueError:
        lengths = []
    if not lengths or not all(1 <= length <= limit for length in lengths):
        raise UsageError(f"--needle-lengths {asked}: expected tokens, 1 to {limit}, separated by commas")
    return sorted(set(lengths))


def _recipe(args: argparse.Namespace, question: Any) -> dict[str, Any]:
    """What was measured. Bounds and waivers are not in it: judging again measures nothing again."""
    return {
        "stage": "evaluate", "student": question.student.recipe_sha256, "teacher": question.teacher.recipe_sha256,
        "texts_sha256": texts_sha256(args.texts), "long_sha256": texts_sha256(args.long) if args.long else "",
        "max_tokens": args.max_tokens or 0, "needles": digest([needle.ids for needle in question.needles]),
        "answers": args.answers, "answer_tokens": args.answer_tokens, "device": args.device,
    }  # fmt: skip


def _described(view: View) -> dict[str, Any]:
    return {
        "recipe_sha256": view.recipe_sha256, "experts_kept": list(view.experts_kept),
        "ranking": view.ranking.score, "overlays": [f"{o.stage} {o.sha256[:12]}" for o in view.overlays],
    }  # fmt: skip
