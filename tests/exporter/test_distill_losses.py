"""The training loss is the full KL divergence on average over what the cache drew of the tail, value and gradient."""

import numpy as np
import pytest

from exporter.distill import cache

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
ROWS, VOCAB = 7, 400


def log_probabilities(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def both():
    rng = np.random.default_rng(11)
    return [(rng.normal(size=(ROWS, VOCAB)) * 3).astype(np.float32) for _ in range(2)]


def loss(student, ids, logp, tail, threshold):
    from exporter.distill.losses import cached_kl

    logits = torch.tensor(student, requires_grad=True)
    value = cached_kl(logits.clone(), *tensors(ids.astype(np.int64), logp, tail, threshold))
    value.sum().backward()
    return value.detach().numpy(), logits.grad.numpy()


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def weights(logp, tail, threshold):
    from exporter.distill.losses import token_weights

    return token_weights(*tensors(logp.astype(np.float32), tail, threshold)).numpy()


def full(teacher, student):
    """KL over the whole vocabulary by hand, in f64."""
    p, q = log_probabilities(teacher), log_probabilities(student)
    return (np.exp(p) * (p - q)).sum(1)


def drawn_often(row, times):
    """The targets of one token drawn ``times`` times: as that many places of a text."""
    return cache.reduced(np.repeat(row[None], times, 0), sequence=3)


def test_reduced_begins_with_the_sorted_head_of_the_distribution(both):
    logp = log_probabilities(both[0])
    ids, half, tail, threshold = cache.reduced(both[0], 0)
    assert ids.shape == half.shape == (ROWS, cache.TOP + cache.DRAWN)
    assert np.array_equal(ids[:, : cache.TOP], np.argsort(-logp, 1)[:, : cache.TOP])
    assert np.allclose(half, np.take_along_axis(logp, ids, 1), rtol=1e-3)
    head = np.exp(np.take_along_axis(logp, ids[:, : cache.TOP], 1)).sum(1)
    assert np.allclose(tail, 1 - head, rtol=1e-4)
    assert (threshold > 0).all()
    assert all(len(set(row)) == cache.TOP + cache.DRAWN for row in ids.tolist())


def test_one_token_takes_776_bytes(both):
    assert sum(array[:1].nbytes for _, _, array in cache.stored([cache.reduced(both[0], 0)])) == 776


def test_a_token_has_the_same_draw_however_its_text_is_cut(both):
    whole = cache.reduced(both[0], 5)
    parts = [cache.reduced(both[0][:3], 5), cache.reduced(both[0][3:], 5, 3)]
    assert all(np.array_equal(a, np.concatenate(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))
    assert not np.array_equal(whole[0], cache.reduced(both[0], 6)[0])


def test_a_token_is_drawn_for_its_mass_on_average(both):
    p = np.exp(log_probabilities(both[0][:1]))[0]
    ids, logp, tail, threshold = drawn_often(both[0][0], 4000)
    found = np.zeros((4000, VOCAB))
    np.put_along_axis(found, ids.astype(np.int64), weights(logp, tail, threshold).astype(np.float64), 1)
    assert np.allclose(found.sum(1), 1, atol=1e-5)
    error = found.std(0) / np.sqrt(4000) + threshold.mean() / 4000  # one draw more or less: some are never drawn
    assert (np.abs(found.mean(0) - p) < 5 * error + 5e-3 * p).all()  # a half-precision log is off by up to .004


def test_value_and_gradient_are_those_of_the_full_divergence_on_average(both):
    targets = drawn_often(both[0][0], 4000)
    value, grad = loss(np.repeat(both[1][:1], 4000, 0), *targets)
    exact = full(both[0][:1], both[1][:1])[0]
    assert abs(value.mean() - exact) < 5 * value.std() / np.sqrt(4000) + 2e-3 * exact
    assert value.std() < 0.25 * exact  # a draw tells much, not only many draws
    student, teacher = (torch.tensor(array[:1], dtype=torch.float64) for array in (both[1], both[0]))
    wanted = (student.softmax(-1) - teacher.softmax(-1)).numpy()[0]
    error = grad.std(0) / np.sqrt(4000)
    assert (np.abs(grad.mean(0) - wanted) < 5 * error + 2e-4).all()


def test_equals_the_full_divergence_where_the_draw_takes_the_rest(both):
    teacher, student = (array[:, :100] for array in both)
    ids, _, tail, threshold = cache.reduced(teacher, 0)
    assert ids.shape == (ROWS, 100)
    assert not threshold.any()
    exact = np.take_along_axis(log_probabilities(teacher), ids, 1).astype(np.float32)
    assert np.allclose(loss(student, ids, exact, tail, threshold)[0], full(teacher, student), rtol=1e-4)


def test_equals_the_full_divergence_without_a_tail(both):
    teacher, student = (array[:, :50] for array in both)
    ids, _, tail, threshold = cache.reduced(teacher, 0)
    exact = np.take_along_axis(log_probabilities(teacher), ids, 1).astype(np.float32)
    assert ids.shape == (ROWS, 50)
    assert np.allclose(tail, 0)
    assert np.allclose(loss(student, ids, exact, tail, threshold)[0], full(teacher, student), rtol=1e-4)


def test_full_kl_is_the_formula(both):
    from exporter.distill.losses import full_kl

    assert np.allclose(full_kl(*tensors(*both)).numpy(), full(*both), rtol=1e-4)


def test_gradient_is_that_of_the_formula(both):
    ids, logp, tail, threshold = cache.reduced(both[0], 0)
    _, grad = loss(both[1], ids, logp, tail, threshold)
    student = torch.tensor(both[1], dtype=torch.float64, requires_grad=True)
    shares = torch.from_numpy(weights(logp, tail, threshold)).double()
    chosen = student.log_softmax(-1).gather(-1, torch.from_numpy(ids).long())
    (shares * (torch.from_numpy(logp).double() - chosen)).sum().backward()
    assert np.allclose(grad, student.grad.numpy(), atol=1e-6)


def test_about_zero_for_the_teacher_itself(both):
    value, _ = loss(both[0], *cache.reduced(both[0], 0))
    assert np.abs(value).max() < 2e-3
