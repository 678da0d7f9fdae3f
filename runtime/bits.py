"""Does a row get the same bits however it is computed? Measured on this machine, with this bundle, at every start.

Blocks that hold rows written by a tail or by decode may be reused only where one token, a tail and a whole
256-token chunk agree (design: hit = cold, bitwise). onnxruntime's products keep that promise with one thread on the
processors tried; nothing is assumed here: the calls are made and their logits compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.engine import Engine

Logits = npt.NDArray[np.float32]
_SHAPES = ((256, 16), (192, 64, 16), (192, 1, 1, 1), (192, 5, 3, 16), (256, 1, 1, 1))  # tokens per call
_TOKENS = sum(_SHAPES[0])  # into the second block: more than one page of entries


def logits_of(engine: Engine, ids: Sequence[int], calls: Sequence[int]) -> Logits:
    """Logits f32 [sum(calls), vocab] of one fresh sequence fed ``ids`` in the given calls."""
    seq, parts, at = engine.open(), [], 0
    try:
        for count in calls:
            parts.append(engine.forward(seq, ids[at : at + count], rows=range(count)))
            at += count
    finally:
        engine.close(seq)
    return np.concatenate(parts)


def rows_agree(engine: Engine) -> bool:
    """True when single tokens, tails and one whole chunk gave equal bits in every row both computed."""
    rng = np.random.Generator(np.random.PCG64(256))
    ids = [int(i) for i in rng.integers(0, engine.spec.config.vocab_size, _TOKENS)]
    if engine.context_tokens < len(ids):
        return False
    whole = logits_of(engine, ids, _SHAPES[0])
    for calls in _SHAPES[1:]:
        other = logits_of(engine, ids, calls)
        if not np.array_equal(whole[: len(other)].view(np.uint32), other.view(np.uint32)):
            return False
    return True
