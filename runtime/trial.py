"""``python -m runtime trial BUNDLE_ID``: does this machine give the bundle's golden tokens, exactly?

Greedy tokens after each golden prompt, in the schedule that serves. Exit 0 when all agree, else TrialError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from appliance.errors import TrialError
from appliance.model import Golden
from runtime.engine import Engine
from runtime.schedule import prompt_calls


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What was checked, and the smallest lead of the best token over the second."""

    prompts: int
    tokens: int
    least_margin: float

    def __str__(self) -> str:
        return f"checked {self.tokens} golden tokens of {self.prompts} prompts, least margin {self.least_margin:.2f}"


def run_trial(engine: Engine) -> TrialReport:
    """Try the engine's profile on its own golden tokens.

    Raises TrialError naming the first prompt and token that differ, or when there is nothing to check.
    """
    goldens = [golden for golden in engine.spec.goldens if golden.profile == engine.profile]
    if not goldens:
        raise TrialError(f"model.json holds no golden tokens for profile {engine.profile!r}; it cannot be tried")
    margins = [_check(engine, index, golden) for index, golden in enumerate(goldens)]
    return TrialReport(len(goldens), sum(len(g.expected_ids) for g in goldens), min(margins))


def _check(engine: Engine, index: int, golden: Golden) -> float:
    seq, least = engine.open(), float("inf")
    try:
        for ids in prompt_calls(golden.prompt_ids):
            logits = engine.prefill(seq, ids)
        for step, expected in enumerate(golden.expected_ids):
            if step:
                logits = engine.decode(seq, golden.expected_ids[step - 1])
            second, first = np.partition(logits, -2)[-2:]
            token, least = int(logits.argmax()), min(least, float(first - second))
            if token != expected:
                raise TrialError(
                    f"golden prompt {index}, token {step}: got {token}, expected {expected}; "
                    "this machine does not compute this model as it was built"
                )
    finally:
        engine.close(seq)
    return least
