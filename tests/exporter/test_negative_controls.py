"""The seven common errors of V4-Flash ports, each as a patch: the P1 check must fail on every one of them."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import parity_support as parity  # noqa: E402

from exporter import reference_math as ops  # noqa: E402
from exporter import rope  # noqa: E402

pytestmark = pytest.mark.torch

TRUE = {name: getattr(ops, name) for name in ("attend", "rope_tables", "sinkhorn")}
TRUE_FREQUENCIES = rope.frequencies


def comb_not_transposed(patch, config):
    patch.setattr(ops, "hc_post", lambda y, h, post, comb: post[..., None] * y[:, None] + comb @ h)


def shared_expert_not_clamped(patch, config):
    patch.setattr(ops, "shared_swiglu", lambda gate, up, limit: ops.swiglu(gate, up, float("inf")))


def no_sink(patch, config):
    def without(q, k, allowed, sink, cast):
        return TRUE["attend"](q, k, allowed, sink - float("inf"), cast)

    patch.setattr(ops, "attend", without)


def no_inverse_rope(patch, config):
    patch.setattr(ops, "unrope", lambda out, table: out)


def plain_theta_on_compressed_layers(patch, config):
    patch.setattr(rope, "frequencies", lambda _, *, compressed: TRUE_FREQUENCIES(config, compressed=False))


def yarn_mscale(patch, config):
    compressed = torch.from_numpy(TRUE_FREQUENCIES(config, compressed=True))

    def scaled(frequency, positions):
        factor = 1.2772588722239782 if torch.equal(frequency, compressed) else 1.0  # 0.1 · ln 16 + 1
        return tuple(t * factor for t in TRUE["rope_tables"](frequency, positions))

    patch.setattr(ops, "rope_tables", scaled)


def one_sinkhorn_iteration(patch, config):
    patch.setattr(ops, "sinkhorn", lambda logits, iterations, eps: TRUE["sinkhorn"](logits, 1, eps))


CONTROLS = {  # patch → max |Δlogit| another implementation showed with the same mistake (None: not quite the same)
    comb_not_transposed: 1.51, shared_expert_not_clamped: 4.04, no_sink: 2.30, no_inverse_rope: 2.84,
    plain_theta_on_compressed_layers: None, yarn_mscale: 2.76, one_sinkhorn_iteration: 1.47,
}


@pytest.fixture(scope="module")
def case():
    return parity.tiny_a("s200")


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_the_check_fails(control, case, monkeypatch):
    assert parity.check_p1(case, (1 << 20,)) <= parity.P1_LIMIT
    with monkeypatch.context() as patch:
        control(patch, case.config)
        with pytest.raises(AssertionError, match=r"^P1 tiny-a") as failure:
            parity.check_p1(case, (1 << 20,))
    largest = float(str(failure.value).split("|Δlogit| ")[1].split()[0])
    assert largest > 1.0  # 50,000 times the limit: no mistake of this size hides behind it
    if CONTROLS[control] is not None:
        assert largest == pytest.approx(CONTROLS[control], rel=0.02)
    assert parity.check_p1(case, (1 << 20,)) <= parity.P1_LIMIT
