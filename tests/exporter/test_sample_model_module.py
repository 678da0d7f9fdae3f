"""The trainable module of the sample model computes what the reference computes, on the committed weights."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from exporter.checkpoint import Checkpoint

pytestmark = pytest.mark.torch
FOLDER = Path(__file__).resolve().parents[2] / "packaging" / "sample-model"
TOKENS = 180  # more than 4 · index_topk, so that the indexer's selection is real
MAX_ERROR = 2e-5


@pytest.fixture(scope="module")
def both() -> SimpleNamespace:
    """The module, and the reference with and without rounded cache rows, of the committed checkpoint."""
    torch = pytest.importorskip("torch")
    from exporter.reference import Reference

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import convert
    checkpoint = Checkpoint.open(FOLDER / "checkpoint")
    assert checkpoint.config.index_topk * 4 < TOKENS
    ids = np.random.default_rng(5).integers(2, checkpoint.config.vocab_size - 20, TOKENS).tolist()
    net = convert.load(FOLDER / "checkpoint")
    with torch.no_grad():
        module = {rounding: net.logits(torch.tensor([ids]), round_rows=rounding)[0] for rounding in (False, True)}
        reference = {}
        for rounding in (False, True):
            model = Reference.from_checkpoint(checkpoint, kv_sim=rounding)
            reference[rounding] = model.forward(ids, model.new_state())
    return SimpleNamespace(module=module, reference=reference)


def test_equal_without_cache_rounding(both: SimpleNamespace) -> None:
    assert (both.module[False] - both.reference[False]).abs().max() <= MAX_ERROR


def test_same_top_token_with_cache_rounding(both: SimpleNamespace) -> None:
    same = both.module[True].argmax(1) == both.reference[True].argmax(1)
    assert same.float().mean() >= 0.98


def test_rounding_is_real(both: SimpleNamespace) -> None:
    assert (both.module[True] - both.module[False]).abs().max() > 1e-2
