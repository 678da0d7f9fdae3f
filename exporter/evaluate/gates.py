"""The gates: what is measured, which way it must lie of its bound, and the bound where a plan names none.

A gate that was not measured does not pass. One that fails stops `build`, unless a waiver names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from appliance.errors import UsageError

MAX_TEXT = 2000  # characters of a waiver's reason


@dataclass(frozen=True, slots=True)
class Kind:
    """One gate. ``whole`` is the bound for a student that keeps every expert (D4 alone), ``pruned`` for one that
    does not."""

    name: str
    side: Literal["at most", "at least"]
    whole: float
    pruned: float
    meaning: str


# Bounds: the release thresholds of the distillation plan. Where it has none, ours, with the reason:
# kl_p99 of a pruned model keeps the plan's ratio to the mean (15); greedy_agreement is the mean share of 32 tokens
# before the first difference if every token agrees with probability a = the bound of top1: a·(1 − a³²)/(32·(1 − a));
# layer_error stops a layer that is broken, it does not rank students: the streams after a layer may differ by half.
KINDS = (
    Kind("kl_mean", "at most", 0.02, 0.05, "mean KL(teacher ‖ student) over all tokens, nats"),
    Kind("kl_p99", "at most", 0.3, 0.75, "99th percentile of it, nats"),
    Kind("top1", "at least", 0.96, 0.93, "share of tokens with the same most likely next token"),
    Kind("ppl_increase", "at most", 0.02, 0.02, "rise of the perplexity in the worst domain, as a share"),
    Kind("layer_error", "at most", 0.5, 0.5, "largest relative error of the streams after a layer"),
    Kind("length_ppl_increase", "at most", 0.02, 0.02, "rise of the perplexity at the worst length, as a share"),
    Kind("needle_loss", "at most", 0.0, 0.0, "needles the teacher finds and the student does not, worst length, share"),
    Kind("greedy_agreement", "at least", 0.55, 0.37, "share of a greedy answer before the first other token"),
    Kind("continuation_nll_increase", "at most", 0.02, 0.02, "rise of the loss on the teacher's own answers, nats"),
    Kind("loop_increase", "at most", 0.01, 0.01, "rise of the share of generations that loop"),
)
NAMES = tuple(kind.name for kind in KINDS)


@dataclass(frozen=True, slots=True)
class Waiver:
    """A failed gate that a person let pass, in their words."""

    gate: str
    reason: str
    by: str


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate with its bound and what was measured (None: not measured, which does not pass)."""

    name: str
    bound: float
    measured: float | None
    waived: bool = False

    @property
    def passed(self) -> bool:
        """On the right side of the bound; a number that is no number is on neither."""
        if self.measured is None or not math.isfinite(self.measured):
            return False
        at_most = kind_of(self.name).side == "at most"
        return self.measured <= self.bound if at_most else self.measured >= self.bound


def kind_of(name: str) -> Kind:
    """UsageError for an unknown gate."""
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise UsageError(f"gate {name!r} is not known; expected one of {', '.join(NAMES)}")


def default_bounds(*, pruned: bool) -> dict[str, float]:
    """Gate → bound, for a plan: ``pruned`` if any layer keeps fewer experts than the checkpoint has."""
    return {kind.name: kind.pruned if pruned else kind.whole for kind in KINDS}


def bounds(*, pruned: bool, plan: Mapping[str, float], asked: Mapping[str, float]) -> dict[str, float]:
    """Every gate's bound: the default, over it the plan's, over it the command line's. UsageError names the gate."""
    for source, values in (("plan.json: gates", plan), ("--gate", asked)):
        for name, bound in values.items():
            kind_of(name)
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
                raise UsageError(f"{source}: {name}: found {bound!r}, expected a number")
    return default_bounds(pruned=pruned) | dict(plan) | dict(asked)


def judge(
    bounds: Mapping[str, float], measured: Mapping[str, float | None], waivers: Iterable[Waiver] = ()
) -> tuple[Gate, ...]:
    """Every gate of ``bounds`` against ``measured``; a waiver counts where the gate fails."""
    waived = {waiver.gate for waiver in waivers}
    gates = []
    for name, bound in bounds.items():
        gate = Gate(name, float(bound), measured.get(name))
        gates.append(Gate(name, gate.bound, gate.measured, waived=name in waived and not gate.passed))
    return tuple(gates)


def parse_bound(text: str) -> tuple[str, float]:
    """``NAME=BOUND`` of --gate."""
    name, equals, value = text.partition("=")
    kind_of(name)
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if not equals or not math.isfinite(bound):
        raise UsageError(f"--gate {text}: expected {name}=NUMBER")
    return name, bound


def parse_waiver(text: str, by: str) -> Waiver:
    """``GATE=REASON`` of --waive."""
    name, _, reason = text.partition("=")
    kind_of(name)
    if not reason.strip() or len(reason) > MAX_TEXT:
        raise UsageError(f"--waive {name}: say why, in 1 to {MAX_TEXT} characters: --waive {name}='the reason'")
    return Waiver(name, reason.strip(), by)
