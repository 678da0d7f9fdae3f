"""Golden tokens: prompts whose greedy answer leads by a clear margin at every step, so other hardware agrees.

A trained model gives at least 4 prompts of 16 tokens; a random one 16 prompts of 1 token, found by search.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from appliance.errors import CheckpointError
from appliance.model import Golden, ModelConfig
from exporter.engine_process import Logits, engine_logits

MIN_MARGIN = 0.5  # of the best logit over the second
LONG, LONG_PROMPTS = 16, 4
SHORT_PROMPTS = 16
SEARCHED, ROUNDS = 64, 8  # random prompts per call of the engine, and how many calls at most
PROMPT_TOKENS = 12


def find_goldens(
    bundle: Path, config: ModelConfig, prompts: Sequence[Sequence[int]], profile: str = "full"
) -> tuple[Golden, ...]:
    """Try ``prompts`` (token ids) on ``profile`` for 16-token answers, then random ones for single tokens.

    Raises CheckpointError when too few prompts have a clear answer.
    """
    if prompts:
        found = _clear(profile, prompts, engine_logits(bundle, prompts, generate=LONG, profile=profile), LONG)
        if len(found) >= LONG_PROMPTS:
            return tuple(found)
    rng = np.random.Generator(np.random.PCG64(0))
    short: list[Golden] = []
    for _ in range(ROUNDS):
        random = rng.integers(2, config.vocab_size, (SEARCHED, PROMPT_TOKENS)).tolist()
        short += _clear(profile, random, engine_logits(bundle, random, profile=profile), 1)
        if len(short) >= SHORT_PROMPTS:
            return tuple(short[:SHORT_PROMPTS])
    raise CheckpointError(
        f"profile {profile}: only {len(short)} of {SEARCHED * ROUNDS} searched prompts have a top token leading by "
        f"{MIN_MARGIN}: no {SHORT_PROMPTS} golden prompts; give prompts the model knows with --golden-prompts"
    )


def _clear(
    profile: str, prompts: Sequence[Sequence[int]], logits: Sequence[Logits], tokens: int
) -> list[Golden]:
    found = []
    for prompt, rows in zip(prompts, logits, strict=True):
        steps = rows[len(prompt) - 1 : len(prompt) - 1 + tokens]
        best = np.partition(steps, -2, axis=-1)[:, -2:]
        margin = float((best[:, 1] - best[:, 0]).min())
        if margin >= MIN_MARGIN:
            expected = tuple(int(i) for i in steps.argmax(-1))
            found.append(Golden(profile, tuple(int(i) for i in prompt), expected, MIN_MARGIN))
    return found
