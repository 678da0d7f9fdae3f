"""The trainable module: rounding is the codecs', gradients are autograd's, views give the reference's logits."""

import numpy as np
import pytest
from view_support import random_ranking, short_checkpoint

from exporter import codec
from exporter.overlay import OverlayWriter
from exporter.view import View
from exporter.view_arguments import learned_cut

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
TOKENS, KEPT = 90, 5
ROTATED = {"layers.1.attn.wq_b": 64, "layers.1.attn.wo_a": 32, "layers.2.ffn.shared_experts.w2": 64}


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    base = short_checkpoint(tmp_path_factory.mktemp("short") / "checkpoint")
    return View(base, ranking=random_ranking(base), experts_kept=learned_cut(base.config, KEPT))


@pytest.fixture(scope="module")
def rotated(view, tmp_path_factory):
    """Three linears in MXFP4, stored rotated."""
    writer = OverlayWriter(tmp_path_factory.mktemp("overlay") / "d4", "quantize", view.recipe_sha256, {})
    tensors = []
    for linear, block in ROTATED.items():
        weight = view.float32(f"{linear}.weight")
        turned = codec.hadamard(weight.reshape(len(weight), -1, block)).reshape(weight.shape)
        codes, scale = codec.fp4_quantize(turned)
        tensors += [(f"{linear}.weight", "I8", codes), (f"{linear}.scale", "F8_E8M0", scale)]
    writer.add("all", tensors)
    return view.over(writer.finish(rotated=ROTATED))


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 1e6])
def test_rounding_is_the_codecs(scale):
    from exporter.trainable import rounding

    rng = np.random.default_rng(4)
    x = (rng.normal(size=(40, 256)) * np.exp(2 * rng.normal(size=(40, 256))) * scale).astype(np.float32)
    row = x[:, :192]
    expected = {
        rounding.round_fp4_groups: codec.fp4_dequantize(*codec.fp4_quantize(x)),
        rounding.round_fp8_blocks: codec.fp8_block_dequantize(*codec.fp8_block_quantize(x)),
        rounding.round_bf16: codec.bf16_round(x),
    }
    for function, values in expected.items():
        assert np.array_equal(function(torch.from_numpy(x)).numpy(), values), function.__name__
    stored = codec.attention_row_unpack(codec.attention_row_pack(row, 64), 192, 64)
    assert np.array_equal(rounding.round_row(torch.from_numpy(row), 64).numpy(), stored)


def test_every_e2m1_tie_goes_to_the_even_code():
    from exporter.trainable.rounding import e2m1

    x = np.arange(-6, 6.001, 0.125, dtype=np.float32)
    rounded = e2m1(torch.from_numpy(x), torch.ones(()))
    assert np.array_equal(rounded.numpy(), codec.e2m1_decode(codec.e2m1_encode(x)))


def test_straight_through_gives_the_rounded_value_exactly():
    from exporter.trainable.rounding import round_row

    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    round_row(x, 64).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_written_gradients_are_those_of_autograd():
    from exporter.trainable import autograd

    generator = torch.Generator().manual_seed(6)
    x = torch.randn(4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    comb = torch.rand(3, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    scores = torch.randn(2, 3, 2, 5, dtype=torch.float64, generator=generator).requires_grad_()
    sink = torch.randn(2, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.zeros(1, 3, 5, dtype=torch.float64)

    def softmax(scores, sink):  # the last score is the sink's: a constant for the caller
        return autograd.sink_softmax(torch.cat([scores[..., :-1], torch.zeros_like(scores[..., -1:])], -1), bias, sink)

    assert torch.autograd.gradcheck(lambda x: autograd.rms(x, 1e-6), x)
    assert torch.autograd.gradcheck(autograd.mean_square, x)
    assert torch.autograd.gradcheck(lambda c: autograd.sinkhorn(c, 4, 1e-6), comb)
    assert torch.autograd.gradcheck(softmax, (scores, sink))


def test_rope_is_the_same_without_complex_numbers():
    from exporter.trainable.rotary import turned_complex, turned_real, turns

    x = torch.randn(2, 9, 3, 80, generator=torch.Generator().manual_seed(7))
    cos, sin = (part.view(9, 1, 32) for part in turns(torch.arange(9), torch.rand(32)))
    assert torch.allclose(turned_complex(x, cos, sin), turned_real(x, cos, sin), atol=1e-6)


@pytest.mark.parametrize("which", ["view", "rotated"])
def test_logits_are_those_of_the_reference(which, request):
    from exporter.reference import Reference
    from exporter.trainable.loading import load

    chosen = request.getfixturevalue(which)
    ids = np.random.default_rng(8).integers(0, chosen.config.vocab_size, TOKENS).tolist()
    reference = Reference.from_view(chosen)
    with torch.no_grad():
        expected = reference.forward(ids, reference.new_state())
        found = load(chosen).logits(torch.tensor([ids]), round_rows=False)[0]
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()


def test_pads_do_not_touch_real_rows(view):
    from exporter.trainable.loading import load

    net = load(view)
    ids = torch.from_numpy(np.random.default_rng(9).integers(0, view.config.vocab_size, (1, 70)))
    with torch.no_grad():
        alone = net.logits(ids[:, :50])[0]
        beside = net.logits(torch.cat([torch.cat([ids[:, :50], torch.zeros(1, 20, dtype=torch.int64)], 1), ids]))[0]
    assert torch.allclose(beside[:50], alone, atol=1e-4)
