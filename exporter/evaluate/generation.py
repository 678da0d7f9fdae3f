"""What a model says by itself: greedy answers of teacher and student to the same beginnings, and whether they loop.

Needs the whole model in memory as f32, so it is measured on models that fit and "not measured" on others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exporter.evaluate.metrics import log_softmax, repeat_share
from exporter.progress import Progress
from exporter.view import View

PROMPT_TOKENS = 32
GREEDY_TOKENS = 32  # of an answer that are compared; loops are looked for in all of it
LOOP_SHARE = 0.5  # of repeated 4-grams
MEMORY_SHARE = 0.5  # of what is free that a model may take


class Generator(Protocol):
    """What is asked of :class:`exporter.reference.Reference`."""

    def new_state(self) -> Any: ...

    def forward(self, ids: list[int], state: Any) -> Any: ...


def prompts(texts: Sequence[Sequence[int]], count: int) -> list[tuple[int, ...]]:
    """The first 32 tokens of ``count`` texts, spread over all that have as many."""
    long_enough = [tuple(ids[:PROMPT_TOKENS]) for ids in texts if len(ids) >= PROMPT_TOKENS]
    picked = sorted({int(at) for at in np.linspace(0, len(long_enough) - 1, count)}) if long_enough else []
    return [long_enough[at] for at in picked]


def too_large(view: View) -> str | None:
    """Why ``view`` cannot generate on this machine, or None if it can."""
    needed = sum(4 * int(np.prod(view.info(name).shape)) * (2 if view.info(name).dtype == "I8" else 1)
                 for name in view.names if not name.endswith(".scale"))  # fmt: skip
    free = available_bytes()
    if needed <= MEMORY_SHARE * free:
        return None
    return f"the model in f32 takes {needed:,} bytes, {free:,} are free: generation runs it whole"


def available_bytes() -> int:
    """Free memory, from /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def greedy(model: Generator, prompt: Sequence[int], tokens: int, eos: int) -> list[int]:
    """The most likely token, again and again, up to ``tokens`` of them or to the end token (included)."""
    state, said = model.new_state(), list[int]()
    row = model.forward(list(prompt), state)[-1]
    while True:
        said.append(int(row.argmax()))
        if len(said) == tokens or said[-1] == eos:
            return said
        row = model.forward([said[-1]], state)[-1]


def answers(
    model: Generator, beginnings: Sequence[Sequence[int]], tokens: int, eos: int, label: str
) -> list[list[int]]:
    """A greedy answer to every beginning."""
    progress, said = Progress(f"{label} answers", len(beginnings) * tokens, "tokens"), []
    for number, prompt in enumerate(beginnings):
        said.append(greedy(model, prompt, tokens, eos))
        progress.add(f"answer {number + 1}", tokens)
    return said


def loss(model: Generator, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Sum of −log p of an answer's tokens, nats."""
    if not answer:
        return 0.0
    rows = model.forward([*prompt, *answer[:-1]], model.new_state())[len(prompt) - 1 :].numpy()
    return -float(log_softmax(rows)[np.arange(len(answer)), list(answer)].sum())


def losses(model: Generator, beginnings: Sequence[Sequence[int]], said: Sequence[Sequence[int]]) -> float:
    """Mean loss per token on the first 32 tokens of given answers."""
    heads = [answer[:GREEDY_TOKENS] for answer in said]
    total = sum(loss(model, prompt, head) for prompt, head in zip(beginnings, heads, strict=True))
    return total / sum(map(len, heads))


def compared(
    teacher: Sequence[Sequence[int]], student: Sequence[Sequence[int]], teacher_nll: float, student_nll: float
) -> dict[str, Any]:
    """The numbers of the report from both models' answers, and their losses on the teacher's."""
    shares = [
        _common(ours[:GREEDY_TOKENS], theirs[:GREEDY_TOKENS]) for ours, theirs in zip(teacher, student, strict=True)
    ]
    teacher_loops, student_loops = loop_rate(teacher), loop_rate(student)
    return {
        "answers": len(teacher), "tokens": max(map(len, teacher)), "greedy_agreement": float(np.mean(shares)),
        "teacher_loops": teacher_loops, "student_loops": student_loops, "loop_increase": student_loops - teacher_loops,
        "teacher_nll": teacher_nll, "student_nll": student_nll, "continuation_nll_increase": student_nll - teacher_nll,
    }  # fmt: skip


def loop_rate(said: Sequence[Sequence[int]]) -> float:
    """Share of answers of which more than half the 4-grams are repeats."""
    return sum(repeat_share(answer) > LOOP_SHARE for answer in said) / len(said)


def _common(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of ``ours`` before the first difference."""
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
        same += 1
    return same / len(ours)


def measured(
    work: Mapping[str, Generator], beginnings: Sequence[Sequence[int]], tokens: int, eos: int
) -> dict[str, Any]:
    """All of it for ``work`` = {"teacher": model, "student": model}."""
    teacher, student = work["teacher"], work["student"]
    said = {name: answers(model, beginnings, tokens, eos, name) for name, model in work.items()}
    return compared(
        said["teacher"], said["student"], losses(teacher, beginnings, said["teacher"]),
        losses(student, beginnings, said["teacher"]),
    )
