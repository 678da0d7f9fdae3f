"""Muon and AdamW against torch's own; stacks of matrices give what each matrix gives."""

import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")


def gradients(shape, count=4):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
def test_matrices_move_as_with_torch(shape):
    from exporter.distill.muon import Muon

    start = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    muon = Muon({"w": ours})
    peer = torch.optim.Muon([theirs], lr=0.01, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for grad in gradients(shape):
        muon.step("w", ours, grad, 0.01)
        theirs.grad = grad.clone()
        peer.step()
    moved = (theirs.detach() - start).norm()
    assert moved > 0.1
    assert (ours - theirs.detach()).norm() < 0.02 * moved  # torch orthogonalizes in BF16


def test_a_stack_moves_as_its_matrices():
    from exporter.distill.muon import Muon

    stack = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(2))
    single = [matrix.clone() for matrix in stack]
    together, alone = Muon({"w": stack}), [Muon({"w": matrix}) for matrix in single]
    for grad in gradients(stack.shape):
        together.step("w", stack, grad, 0.02)
        for number, matrix in enumerate(single):
            alone[number].step("w", matrix, grad[number], 0.02)
    assert torch.allclose(stack, torch.stack(single), atol=1e-5)


def test_updates_have_the_stated_size():
    from exporter.distill.muon import Muon

    weight = torch.zeros(64, 64)
    Muon({"w": weight}).step("w", weight, gradients((64, 64))[0], 0.01)
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.25)


def test_vectors_move_as_with_torch():
    from exporter.distill.muon import BETAS, EPSILON, Adam

    start = torch.randn(50, generator=torch.Generator().manual_seed(3))
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    adam = Adam({"b": ours})
    peer = torch.optim.AdamW([theirs], lr=0.01, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    for count, grad in enumerate(gradients((50,)), 1):
        adam.step("b", ours, grad, 0.01, count)
        theirs.grad = grad.clone()
        peer.step()
    assert torch.allclose(ours, theirs.detach(), atol=1e-6)
