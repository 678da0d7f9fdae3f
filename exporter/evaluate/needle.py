"""Needles: a fact put at some depth of a long text and asked for at its end, found if greedy decoding would say it.

Teacher-forced: the sequence ends with the value, and it counts as found if each of its tokens is the most likely next
one. With a tokenizer a needle is a sentence; without one a run of random ids that stands twice, and the second time
must be continued as the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from appliance.errors import UsageError
from exporter.evaluate.metrics import TokenScores

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLACES = ("Amsterdam", "Berlin", "Cairo", "Dublin", "Geneva", "Hanoi", "Lima", "Oslo", "Quito", "Riga", "Tokyo")
KEY_TOKENS, VALUE_TOKENS = 4, 3  # of a needle of random ids
SEED = 20260731

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Needle:
    """One sequence of ``length_tokens`` ids whose last ``value_tokens`` are what must be found."""

    length_tokens: int
    depth: float  # 0: at the beginning, 1: right before the question
    value_tokens: int
    ids: tuple[int, ...]

    def found(self, scores: TokenScores) -> tuple[bool, bool]:
        """(teacher, student): all tokens of the value would have been said."""
        rows = self._rows
        return bool(scores.teacher_hit[rows].all()), bool(scores.student_hit[rows].all())

    def logprob(self, scores: TokenScores) -> tuple[float, float]:
        """(teacher, student): mean log-probability of the value's tokens, nats."""
        rows = self._rows
        return -float(scores.teacher_nll[rows].mean()), -float(scores.student_nll[rows].mean())

    @property
    def _rows(self) -> slice:
        """Row t says token t + 1."""
        return slice(self.length_tokens - self.value_tokens - 1, self.length_tokens - 1)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Token ids of one needle and of the question, and the value."""

    before: list[int]
    after: list[int]
    question: list[int]
    value: list[int]


def build_needles(
    haystack: Sequence[int], lengths: Sequence[int], per_cell: int, *, vocab_size: int, encode: Encode | None
) -> list[Needle]:
    """``per_cell`` needles of every length and depth in ids of ``haystack`` (repeated where it is too short).

    Equal arguments give equal needles. UsageError if a length has no room for needle and question.
    """
    draw = np.random.Generator(np.random.PCG64(SEED))
    needles = []
    for length in lengths:
        for depth in DEPTHS:
            for _ in range(per_cell):
                parts = _random(draw, vocab_size) if encode is None else _sentence(draw, encode)
                needles.append(_place(parts, haystack, length, depth, draw))
    return needles


def _sentence(draw: np.random.Generator, encode: Encode) -> _Parts:
    place, number = PLACES[int(draw.integers(len(PLACES)))], int(draw.integers(10_000, 100_000))
    fact = f"The secret number of {place} is"
    return _Parts(encode(f"\n\n{fact}"), encode(".\n\n"), encode(f"\n\n{fact}"), encode(f" {number}"))


def _random(draw: np.random.Generator, vocab_size: int) -> _Parts:
    key, value = (draw.integers(2, vocab_size, count).tolist() for count in (KEY_TOKENS, VALUE_TOKENS))
    return _Parts(key, [], key, value)


def _place(parts: _Parts, haystack: Sequence[int], length: int, depth: float, draw: np.random.Generator) -> Needle:
    needle = [*parts.before, *parts.value, *parts.after]
    end = [*parts.question, *parts.value]
    room = length - len(needle) - len(end)
    if room < 0 or not haystack:
        raise UsageError(f"--needle-lengths {length}: no room for a needle of {len(needle) + len(end)} tokens")
    start = int(draw.integers(len(haystack)))
    hay = [haystack[(start + at) % len(haystack)] for at in range(room)]
    cut = round(depth * room)
    return Needle(length, depth, len(parts.value), (*hay[:cut], *needle, *hay[cut:], *end))


def recall(needles: Sequence[Needle], scores: Sequence[TokenScores]) -> list[dict[str, Any]]:
    """Per length and depth: how many needles, found by teacher and student, mean log-probability of the value."""
    cells: dict[tuple[int, float], list[int]] = {}
    for index, needle in enumerate(needles):
        cells.setdefault((needle.length_tokens, needle.depth), []).append(index)
    rows = []
    for (length, depth), members in cells.items():
        found = [needles[i].found(scores[i]) for i in members]
        logprobs = np.array([needles[i].logprob(scores[i]) for i in members]).mean(0)
        rows.append({
            "tokens": length, "depth": depth, "needles": len(members), "teacher_found": sum(f[0] for f in found),
            "student_found": sum(f[1] for f in found), "teacher_logprob": float(logprobs[0]),
            "student_logprob": float(logprobs[1]),
        })  # fmt: skip
    return rows
