"""Next-token choice: greedy, or seeded sampling whose draws depend on the seed and the step alone.

Logits are f32 [vocab]. The lower id wins every tie. Nothing here reads a clock or a global generator once a
:class:`Sampler` exists, so a request's tokens follow from its prompt, its seed and its parameters.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from appliance.errors import EngineError

MAX_TOKENS_DEFAULT = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_TEMPERATURE = 2.0
SEED_BITS = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a client may set. ``temperature`` 0 is greedy; ``top_p`` in (0, 1]; ``seed`` None draws a fresh one."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = MAX_TOKENS_DEFAULT
    stop: tuple[str, ...] = ()


class Sampler:
    """Chooses the tokens of one request, in order. One uniform draw of PCG64(seed) per sampled token."""

    def __init__(self, params: SamplingParams) -> None:
        self._temperature = params.temperature
        self._top_p = params.top_p
        seed = secrets.randbits(SEED_BITS) if params.seed is None else params.seed % (1 << SEED_BITS)
        self._draws = np.random.Generator(np.random.PCG64(seed))

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token id from ``logits`` f32 [vocab]. Raises EngineError where a logit is NaN or none is finite."""
        best = int(np.argmax(logits))  # the first NaN wins argmax, so one look finds it
        if not np.isfinite(logits[best]):
            raise EngineError(f"the model's logits are not numbers (id {best}: {logits[best]}); run `solocard verify`")
        if self._temperature == 0:
            return best
        return self._sample(logits)

    def _sample(self, logits: npt.NDArray[np.float32]) -> int:
        scaled = (logits.astype(np.float64) - float(np.max(logits))) / self._temperature
        weights = np.exp(scaled)
        ids = np.arange(len(weights)) if self._top_p >= 1 else _nucleus(weights, self._top_p)
        steps = np.cumsum(weights[ids])
        draw = self._draws.random() * steps[-1]
        return int(ids[min(int(np.searchsorted(steps, draw, side="right")), len(ids) - 1)])


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Ids of the smallest set of most likely tokens whose share reaches ``top_p``, most likely first, ties by id.

    Weights below (1 − top_p)·total/vocab add up to less than 1 − top_p, so no nucleus reaches them: only the rest is
    sorted, which on a vocabulary of 129280 is the difference between 10 ms and well under one.
    """
    total = float(np.sum(weights))
    likely = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    ids = likely[np.argsort(-weights[likely], kind="stable")]
    share = np.cumsum(weights[ids]) / total
    return ids[: int(np.searchsorted(share, top_p, side="left")) + 1]
