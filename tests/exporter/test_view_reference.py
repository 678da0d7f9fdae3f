"""The torch reference of a view: ranked but whole gives equal bits; cut, FP4, rotated, it is what the engine serves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from build_support import build  # noqa: E402
from graph_support import run_calls, view_engine  # noqa: E402
from view_support import cut_view, random_ranking, rotate_rows, short_checkpoint, write_plan  # noqa: E402

from exporter import codec  # noqa: E402
from exporter.__main__ import main  # noqa: E402
from exporter.bundle_weights import BundleWeights  # noqa: E402
from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.parity import MAX_ERROR_F32, Parity  # noqa: E402
from exporter.reference import Arrangement, CheckpointWeights, Reference  # noqa: E402
from exporter.view import View  # noqa: E402

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
CALLS = {"prefill": [60], "ragged": [5, 3, 16, 2, 33, 1]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return short_checkpoint(tmp_path_factory.mktemp("short") / "checkpoint")


@pytest.fixture(scope="module")
def cut(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> View:
    return cut_view(base, 5, tmp_path_factory.mktemp("cut") / "overlay")


def logits(reference: Reference, calls: list[int]) -> np.ndarray:
    ids = np.random.default_rng(9).integers(0, reference.config.vocab_size, sum(calls)).tolist()
    state, parts, at = reference.new_state(), [], 0
    with torch.no_grad():
        for count in calls:
            parts.append(reference.forward(ids[at : at + count], state).numpy())
            at += count
    return np.concatenate(parts)


def floats(base: Checkpoint) -> dict[str, np.ndarray]:
    source = CheckpointWeights(base)
    return {name: source[name] for name in base.names if not name.endswith(".scale")}


@pytest.mark.parametrize("switches", [{}, {"kv_sim": True}], ids=["float", "kv"])
def test_ranked_and_whole_gives_the_same_bits(base: Checkpoint, switches: dict[str, bool]) -> None:
    plain = Reference.from_checkpoint(base, **switches)
    ranked = Reference.from_view(View(base, ranking=random_ranking(base)), **switches)
    for name, calls in CALLS.items():
        assert np.abs(logits(ranked, calls) - logits(plain, calls)).max() == 0.0, name


def test_ranked_without_its_arrangement_has_other_bits(base: Checkpoint) -> None:
    view = View(base, ranking=random_ranking(base))
    dropped = Reference(CheckpointWeights(view), view.config)
    error = np.abs(logits(dropped, [60]) - logits(Reference.from_checkpoint(base), [60])).max()
    assert 0 < error < 1e-3


def test_view_is_the_model_written_out_by_hand(base: Checkpoint, cut: View) -> None:
    """Experts picked by official id, FP4 turned back by hand: what is compared with knows no view, rotation or rank."""
    config = base.config
    weights = floats(base)
    for layer in range(config.num_hidden_layers):
        name, order = f"layers.{layer}.ffn", cut.ranking.orders[layer]
        if layer >= config.num_hash_layers:
            kept = sorted(order[:5])
            weights[f"{name}.gate.weight"] = base.float32(f"{name}.gate.weight")[kept]
            weights[f"{name}.gate.bias"] = base.float32(f"{name}.gate.bias")[kept]
            for column, expert in enumerate(kept):
                for part in ("w1", "w2", "w3"):
                    own = f"{name}.experts.{{}}.{part}.weight"
                    weights[own.format(column)] = base.float32(own.format(expert))
    for linear in {n.removesuffix(".scale") for n in cut.overlays[0].tensors if n.endswith(".scale")} - {"head"}:
        codes, scales = cut.read(f"{linear}.weight"), cut.read(f"{linear}.scale")
        stored, block = codec.fp4_dequantize(codes, scales), cut.rotation(linear)
        weights[f"{linear}.weight"] = rotate_rows(stored, block) if block else stored  # H is its own inverse
    weights["head.weight"] = codec.fp8_block_dequantize(cut.read("head.weight"), cut.read("head.scale"))
    assert any(cut.rotation(f"layers.0.{linear}") for linear in ("attn.wq_b", "attn.wo_a", "attn.wo_b"))
    error = np.abs(logits(Reference.from_view(cut), [60]) - logits(Reference(weights, config), [60])).max()
    assert error <= MAX_ERROR_F32


@pytest.mark.parametrize("numerics", ["kv-f32", "kv-v4"])
def test_engine_serves_what_the_reference_of_the_view_says(cut: View, numerics: str, tmp_path: Path) -> None:
    engine = view_engine(cut, tmp_path / "bundle", numerics=numerics)
    reference = Reference.from_view(cut, kv_sim=numerics == "kv-v4")
    ids = np.random.default_rng(9).integers(0, cut.config.vocab_size, 300).tolist()
    expected = logits(reference, [300])
    for calls in ([256, 44], [5, 3, 16, 33, 2, 1, 7, 64, 169], [256, *([1] * 44)]):
        seq = engine.open()
        got = run_calls(engine, seq, ids, calls)
        engine.close(seq)
        result = Parity.of(expected, got)
        assert result.passed(numerics), f"{calls[:9]}: {result}"


def test_a_token_table_that_names_one_expert_twice_adds_both_terms(base: Checkpoint) -> None:
    config = base.config
    weights = floats(base)
    weights["layers.0.ffn.gate.tid2eid"] = np.full((config.vocab_size, config.num_experts_per_tok), 3, np.int64)
    reference = Reference(weights, config)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((4, config.hidden_size)).astype(np.float32))
    with torch.no_grad():
        twice = reference._moe("layers.0.ffn", 0, x, torch.zeros(4, dtype=torch.int64), None)
        shared = reference._expert("layers.0.ffn.shared_experts", x, torch.ones(4), _swiglu)
        scale = torch.full((4,), config.routed_scaling_factor)
        once = reference._expert("layers.0.ffn.experts.3", x, scale, _swiglu)
    assert (twice - shared - once).abs().max() <= 1e-5


def _swiglu(gate, up, limit):
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(gate) * up.clamp(-limit, limit)


@pytest.fixture(scope="module")
def built(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, View]:
    """A kv-f32 bundle of full and one cut profile without golden tokens, and the profile's view."""
    folder = tmp_path_factory.mktemp("built")
    view = cut_view(base, 5, folder / "overlay")
    plan = write_plan(folder / "plan.json", view, "small")
    profiles = [f"{plan},{folder / 'overlay'}"]
    build(base.path, folder / "b", ranking=view.ranking, profiles=profiles, reason="a test", numerics="kv-f32")
    return folder / "b", view


def test_a_profile_is_read_back_from_its_graph_and_objects_alone(built: tuple[Path, View]) -> None:
    bundle, view = built
    weights = BundleWeights(bundle / "model.small.onnx", view.config)
    assert weights.arrangement == Arrangement.of(view)
    names = [n for n in view.names if not n.endswith(".scale") and not n.startswith("mtp.")]
    assert sorted(weights) == sorted(names)
    source = CheckpointWeights(view)
    for name in names:
        assert np.array_equal(weights[name], source[name]), name
    full = BundleWeights(bundle / "model.onnx", view.config)
    assert not full.arrangement.rotations
    assert "layers.2.ffn.experts.7.w1.weight" in list(full)


def test_parity_command_compares_one_profile(
    built: tuple[Path, View], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", str(built[0]), "--profile", "small", "--tokens", "40"]) == 0
    errors = [float(text) for text in re.findall(r"logit\| (\S+),", capsys.readouterr().out)]
    assert len(errors) == 3
    assert max(errors) <= MAX_ERROR_F32
    assert main(["parity", str(built[0]), "--profile", "big"]) == 2
    assert "which has full, small" in capsys.readouterr().err
