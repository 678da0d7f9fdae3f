"""The training loss is the KL divergence of 65 buckets, value and gradient; the cache holds what it needs."""

import numpy as np
import pytest

from exporter.distill import cache

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
ROWS, VOCAB = 7, 200


def log_probabilities(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture
def both():
    rng = np.random.default_rng(11)
    return [(rng.normal(size=(ROWS, VOCAB)) * 3).astype(np.float32) for _ in range(2)]


def bucketed(teacher, student, ids):
    """KL of the coarser distribution by hand, in f64."""
    p, q = np.exp(log_probabilities(teacher)), np.exp(log_probabilities(student))
    found = []
    for row, top in enumerate(ids):
        rest = np.setdiff1d(np.arange(VOCAB), top)
        pb, qb = np.append(p[row, top], p[row, rest].sum()), np.append(q[row, top], q[row, rest].sum())
        found.append(float((pb * np.log(pb / qb)).sum()))
    return np.array(found)


def loss(student, ids, logp, tail):
    from exporter.distill.losses import bucket_kl

    logits = torch.tensor(student, requires_grad=True)
    value = bucket_kl(logits.clone(), torch.from_numpy(ids).long(), torch.from_numpy(logp), torch.from_numpy(tail))
    value.sum().backward()
    return value.detach().numpy(), logits.grad.numpy()


def test_reduced_is_the_sorted_head_of_the_distribution(both):
    logp = log_probabilities(both[0])
    ids, half, tail = cache.reduced(both[0])
    assert ids.shape == half.shape == (ROWS, cache.TOP)
    assert np.array_equal(ids, np.argsort(-logp, 1)[:, : cache.TOP])
    assert np.allclose(half, np.take_along_axis(logp, ids, 1), rtol=1e-3)
    assert np.allclose(tail, 1 - np.exp(np.take_along_axis(logp, ids, 1)).sum(1), rtol=1e-5)


def test_one_token_takes_388_bytes(both):
    assert sum(array[:1].nbytes for _, _, array in cache.stored([cache.reduced(both[0])])) == 388


def test_value_is_that_of_65_buckets(both):
    ids, logp, tail = cache.reduced(both[0])
    exact = np.take_along_axis(log_probabilities(both[0]), ids, 1).astype(np.float32)
    value, _ = loss(both[1], ids, exact, tail)
    assert np.allclose(value, bucketed(both[0], both[1], ids), rtol=1e-4)
    rough, _ = loss(both[1], ids, logp, tail)
    assert np.allclose(rough, value, rtol=5e-3)


def test_equals_the_full_divergence_without_a_tail(both):
    teacher, student = (array[:, :50] for array in both)
    ids, _, tail = cache.reduced(teacher, top=50)
    exact = np.take_along_axis(log_probabilities(teacher), ids, 1).astype(np.float32)
    full = (np.exp(log_probabilities(teacher)) * (log_probabilities(teacher) - log_probabilities(student))).sum(1)
    assert np.allclose(tail, 0)
    assert np.allclose(loss(student, ids, exact, tail)[0], full, rtol=1e-4)


def test_never_more_than_the_full_divergence(both):
    from exporter.distill.losses import full_kl

    full = full_kl(*(torch.from_numpy(array) for array in both)).numpy()
    value, _ = loss(both[1], *cache.reduced(both[0]))
    assert (value < full).all()


def test_gradient_is_that_of_the_formula(both):
    ids, logp, tail = cache.reduced(both[0])
    _, grad = loss(both[1], ids, logp, tail)
    student = torch.tensor(both[1], dtype=torch.float64, requires_grad=True)
    p = torch.from_numpy(logp).double().exp()
    rest = torch.from_numpy(tail).double()
    p = p * ((1 - rest) / p.sum(-1))[:, None]
    q = student.softmax(-1).gather(-1, torch.from_numpy(ids).long())
    value = (p * (p.log() - q.log())).sum(-1) + rest * (rest.log() - (1 - q.sum(-1)).log())
    value.sum().backward()
    assert np.allclose(grad, student.grad.numpy(), atol=1e-6)


def test_zero_for_the_teacher_itself(both):
    value, grad = loss(both[0], *cache.reduced(both[0]))
    assert np.abs(value).max() < 1e-4
    assert np.abs(grad).max() < 1e-3
