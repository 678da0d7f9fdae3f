"""Teacher against student, token by token, and what is made of it. numpy, float64, a few rows at a time.

KL(p ‖ q) = Σ p·(log p − log q) over the whole vocabulary, p = softmax of the teacher's logits; perplexity =
exp(mean of −log p(next token)), over the tokens that have a next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
MAX_CHUNK_NUMBERS = 1 << 22  # logits looked at together: 32 rows of 129,280, 32 MB a copy
SHORTEST_LENGTH = 256
MAX_LOSS = 700.0  # nats: e^700 is still a float
QUANTILES: Mapping[str, float] = {"50": 0.5, "90": 0.9, "95": 0.95, "99": 0.99, "999": 0.999}


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Per token of one sequence, [n]: KL in nats, equal top-1, both losses −log p on the next token (NaN where there is
    none), and whether each model's top-1 is the next token."""

    kl: F32
    same_top1: NDArray[np.bool_]
    teacher_nll: F32
    student_nll: F32
    teacher_hit: NDArray[np.bool_]
    student_hit: NDArray[np.bool_]


def log_softmax(logits: F32) -> F64:
    """[m, V] in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def compare(teacher: F32, student: F32, following: Sequence[int]) -> TokenScores:
    """Both models' logits [n, V]; ``following`` [n] is the token that really comes next, −1 where the text ends.

    A tie goes to the lower id.
    """
    vocab = teacher.shape[1]
    rows = max(1, MAX_CHUNK_NUMBERS // vocab)
    targets = np.asarray(following, np.int64)
    return joined(
        _compare_rows(teacher[at : at + rows], student[at : at + rows], targets[at : at + rows])
        for at in range(0, len(teacher), rows)
    )


def _compare_rows(teacher: F32, student: F32, following: NDArray[np.int64]) -> TokenScores:
    p, q = log_softmax(teacher), log_softmax(student)
    kl = (np.exp(p) * (p - q)).sum(-1)
    best_p, best_q = teacher.argmax(-1), student.argmax(-1)
    at, known = np.arange(len(p)), following >= 0
    loss_p, loss_q = (
        np.where(known, -logp[at, np.maximum(following, 0)], np.nan).astype(np.float32) for logp in (p, q)
    )
    return TokenScores(
        np.maximum(kl, 0).astype(np.float32), best_p == best_q, loss_p, loss_q, best_p == following, best_q == following
    )


def joined(parts: Iterable[TokenScores]) -> TokenScores:
    """One after the other, as one run of tokens."""
    rows = [(p.kl, p.same_top1, p.teacher_nll, p.student_nll, p.teacher_hit, p.student_hit) for p in parts]
    return TokenScores(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def perplexity(nll: F32) -> float:
    """exp of the mean loss (at most 700 nats) of the tokens that have a next one; NaN if none has."""
    known = nll[np.isfinite(nll)].astype(np.float64)
    return math.exp(min(float(known.mean()), MAX_LOSS)) if len(known) else math.nan


def summary(scores: TokenScores) -> dict[str, Any]:
    """tokens, KL (mean, quantiles, largest), top1, both perplexities and the rise as a share."""
    kl = scores.kl.astype(np.float64)
    teacher, student = perplexity(scores.teacher_nll), perplexity(scores.student_nll)
    return {
        "tokens": len(kl), "kl_mean": float(kl.mean()),
        **{f"kl_p{name}": float(np.quantile(kl, share)) for name, share in QUANTILES.items()},
        "kl_max": float(kl.max()), "top1": float(scores.same_top1.mean()),
        "teacher_ppl": _finite(teacher), "student_ppl": _finite(student),
        "ppl_increase": _finite(student / teacher - 1),
    }  # fmt: skip


def by_domain(texts: Sequence[tuple[str, TokenScores]]) -> dict[str, dict[str, Any]]:
    """:func:`summary` per domain, in the order they first appear."""
    groups: dict[str, list[TokenScores]] = {}
    for domain, scores in texts:
        groups.setdefault(domain, []).append(scores)
    return {domain: summary(joined(group)) for domain, group in groups.items()}


def by_length(texts: Sequence[TokenScores]) -> list[dict[str, Any]]:
    """Perplexity of the first 256, 512 … tokens of the same texts: of all that reach the longest such length.

    A model that cannot use its far context shows a curve that rises where the teacher's falls. Empty if no text has
    256 tokens.
    """
    longest = max((len(scores.kl) for scores in texts), default=0)
    lengths = [SHORTEST_LENGTH]
    while 2 * lengths[-1] <= longest:
        lengths.append(2 * lengths[-1])
    if longest < lengths[0]:
        return []
    reaching = [scores for scores in texts if len(scores.kl) >= lengths[-1]]
    rows = []
    for length in lengths:
        # The first `length` tokens predict length − 1 targets among themselves.
        teacher = perplexity(np.concatenate([s.teacher_nll[: length - 1] for s in reaching]))
        student = perplexity(np.concatenate([s.student_nll[: length - 1] for s in reaching]))
        rows.append({
            "tokens": length, "texts": len(reaching), "teacher_ppl": teacher, "student_ppl": student,
            "ppl_increase": student / teacher - 1,
        })  # fmt: skip
    return rows


def relative_error(teacher: F32, student: F32) -> float:
    """‖student − teacher‖ / ‖teacher‖ over all numbers of two equal shapes; 0 for two zeros."""
    wide = teacher.astype(np.float64)
    size = float(np.sqrt((wide * wide).sum()))
    difference = student.astype(np.float64) - wide
    return float(np.sqrt((difference * difference).sum())) / size if size else float(np.abs(difference).max(initial=0))


def repeat_share(ids: Sequence[int], gram: int = 4) -> float:
    """Share of the 4-grams that occurred before; 0 for fewer than two."""
    grams = [tuple(ids[at : at + gram]) for at in range(len(ids) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def gate_measurements(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Gate → what :mod:`exporter.evaluate.gates` compares with its bound; None where it was not measured."""
    total, generation = metrics.get("total") or {}, metrics.get("generation") or {}
    domains = [domain["ppl_increase"] for domain in (metrics.get("domains") or {}).values()]
    needles = [row for row in metrics.get("needles") or [] if row["needles"]]
    return {
        "kl_mean": total.get("kl_mean"), "kl_p99": total.get("kl_p99"), "top1": total.get("top1"),
        "ppl_increase": _worst(domains), "layer_error": _worst(metrics.get("layer_error") or []),
        "length_ppl_increase": _worst([row["ppl_increase"] for row in metrics.get("lengths") or []]),
        "needle_loss": _needle_loss(needles), "greedy_agreement": generation.get("greedy_agreement"),
        "continuation_nll_increase": generation.get("continuation_nll_increase"),
        "loop_increase": generation.get("loop_increase"),
    }  # fmt: skip


def _needle_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Over all depths of a length: found by the teacher − found by the student, as a share; the worst length."""
    lengths = sorted({row["tokens"] for row in rows})
    losses = []
    for length in lengths:
        here = [row for row in rows if row["tokens"] == length]
        lost = sum(row["teacher_found"] - row["student_found"] for row in here)
        losses.append(lost / sum(row["needles"] for row in here))
    return _worst(losses)


def _worst(values: Sequence[float | None]) -> float | None:
    """The largest; None if there is none, or if one of them was not measured."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
