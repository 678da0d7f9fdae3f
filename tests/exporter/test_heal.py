"""Healing: its error formula against plain sums, its start error against the whole reference, never worse, kills."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import UsageError
from exporter.checkpoint import Checkpoint
from exporter.overlay import Overlay, OverlayWriter
from exporter.ranking import Ranking
from exporter.view import View

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from exporter.calibration import Text  # noqa: E402
from exporter.distill import heal_run, router_fit  # noqa: E402
from exporter.distill.heal_run import HealOptions, heal  # noqa: E402
from exporter.distill.router_fit import Quadratics, Router  # noqa: E402
from exporter.reference import Reference, Trace  # noqa: E402

FIRST_CUT = 3
TEXTS = [Text("a", tuple(int(t) for t in np.random.default_rng(n).integers(3, 700, 60))) for n in range(10)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cut(tiny_checkpoint: Path) -> View:
    """Half of the experts of layers 3 to 6, in an order that is not the official one."""
    base = Checkpoint.open(tiny_checkpoint)
    orders = ((0, 1, 2, 3, 4, 5, 6, 7),) * FIRST_CUT + ((5, 2, 7, 0, 1, 3, 4, 6),) * 4
    return View(base, ranking=Ranking(base.source_sha256, "test", orders), experts_kept=(8, 8, 8, 4, 4, 4, 4))


@pytest.fixture(scope="module")
def healed(cut: View, tmp_path_factory: pytest.TempPathFactory) -> Overlay:
    folder = tmp_path_factory.mktemp("heal")
    found = heal(cut, TEXTS, folder / "overlay", folder / "work", HealOptions("0" * 64))
    assert not (folder / "work").exists()
    return found


def notes(overlay: Overlay) -> list[dict[str, float]]:
    return json.loads((overlay.path / "overlay.json").read_text())["notes"]["layers"]


def test_the_quadratic_is_the_squared_distance(cut: View) -> None:
    draw = np.random.default_rng(0)
    n, experts, dims, k = 9, 5, 32, cut.config.num_experts_per_tok
    x, gate, bias = draw.normal(size=(n, dims)), draw.normal(size=(experts, dims)) * 0.3, draw.normal(size=experts)
    outputs, target = draw.normal(size=(n, experts, dims)), draw.normal(size=(n, dims))
    importance = draw.random(n)
    wrong = 0.0
    for token in range(n):
        scores = np.sqrt(np.log1p(np.exp(gate @ x[token])))
        chosen = sorted(range(experts), key=lambda e: -(scores[e] + bias[e]))[:k]
        weights = scores[chosen] / scores[chosen].sum() * cut.config.routed_scaling_factor
        wrong += importance[token] * np.sum((weights @ outputs[token][chosen] - target[token]) ** 2)
    f32 = [torch.from_numpy(a.astype(np.float32)) for a in (
        x, outputs @ outputs.transpose(0, 2, 1), np.einsum("ned,nd->ne", outputs, target),
        (target**2).sum(1), importance)]
    data = Quadratics(f32[0], torch.arange(experts).repeat(n, 1), *f32[1:])
    router = Router(*(torch.from_numpy(a.astype(np.float32)) for a in (gate, bias)))
    for soft in (0.0, 0.2):
        found = float(router_fit.error(router, data, cut.config, soft=soft))
        assert found == pytest.approx(wrong / importance.sum(), rel=1e-4)


def test_the_error_before_is_the_references(cut: View, healed: Overlay) -> None:
    """First cut layer: both models' experts on the same inputs, relative squared error of the held-out texts."""
    whole, student = Reference.from_view(View(cut.base), kv_sim=True), Reference.from_view(cut, kv_sim=True)
    c, name = cut.config, f"layers.{FIRST_CUT}"
    fn, base, scale = (cut.float32(f"{name}.hc_ffn_{part}").astype(np.float64) for part in ("fn", "base", "scale"))
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    plain_moe, plain_pre = whole._moe, whole._hc_pre
    streams: list[torch.Tensor] = []

    def pre(at: str, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if at == f"{name}.hc_ffn":
            streams.append(held)
        return plain_pre(at, held)

    def moe(at: str, layer: int, x: torch.Tensor, ids: torch.Tensor, trace: Trace | None) -> torch.Tensor:
        y = plain_moe(at, layer, x, ids, trace)
        if layer == FIRST_CUT:
            ones = torch.ones(len(x))
            shared = whole._expert(f"{at}.shared_experts", x, ones, heal_shared)
            seen.append((y, student._moe(at, layer, x, ids, None), y - shared))
        return y

    from exporter.reference_math import swiglu as heal_shared

    whole._moe, whole._hc_pre = moe, pre
    wrong = total = 0.0
    for number, text in enumerate(TEXTS):
        with torch.no_grad():
            whole.forward(list(text.ids), whole.new_state())
        (full, ours, routed), held = (a.numpy().astype(np.float64) for a in seen.pop()), streams.pop().numpy()
        if number % 5 != 4:
            continue
        flat = held.astype(np.float64).reshape(len(held), -1)
        mixes = flat @ fn.T / np.sqrt((flat**2).mean(1, keepdims=True) + c.rms_norm_eps)
        columns = slice(c.hc_mult, 2 * c.hc_mult)
        post = 2 / (1 + np.exp(-(mixes[:, columns] * scale[1] + base[columns])))
        importance = (post**2).sum(1) / (flat**2).sum(1)
        wrong += (importance * ((full - ours) ** 2).sum(1)).sum()
        total += (importance * (routed**2).sum(1)).sum()
    assert notes(healed)[0]["relative_error_before"] == pytest.approx(wrong / total, rel=1e-4)


def test_only_routers_change_and_no_layer_gets_worse(cut: View, healed: Overlay) -> None:
    assert [note["layer"] for note in notes(healed)] == [3, 4, 5, 6]
    assert any(note["changed"] for note in notes(healed))
    for note in notes(healed):
        assert note["relative_error_after"] <= note["relative_error_before"]
        assert note["changed"] == (note["relative_error_after"] < note["relative_error_before"])
    expected = {f"layers.{note['layer']}.ffn.gate.{part}" for note in notes(healed) if note["changed"]
                for part in ("weight", "bias")}
    assert set(healed.tensors) == expected
    over = cut.over(healed)
    for name in expected:
        assert (over.info(name).dtype, over.info(name).shape) == (cut.info(name).dtype, cut.info(name).shape)


def test_what_does_not_help_is_left(cut: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal_run, "fit", lambda router, *_: Router(-router.gate, router.bias))
    found = heal(cut, TEXTS, tmp_path / "overlay", tmp_path / "work", HealOptions("0" * 64))
    assert not found.tensors
    assert not any(note["changed"] for note in notes(found))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_killed_and_resumed_gives_equal_bytes(
    cut: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str
) -> None:
    options, texts = HealOptions("0" * 64, inputs=inputs), TEXTS[:5]
    monkeypatch.setattr(router_fit, "STEPS", 20)
    once = heal(cut, texts, tmp_path / "once", tmp_path / "once.work", options)
    real = heal_run._Heal.close

    def dying(self: heal_run._Heal, layer: int) -> None:
        if layer == 4:
            raise KilledError  # the overlay has this layer's shard, the streams are still those before it
        real(self, layer)

    monkeypatch.setattr(heal_run._Heal, "close", dying)
    with pytest.raises(KilledError):
        heal(cut, texts, tmp_path / "killed", tmp_path / "killed.work", options)
    monkeypatch.setattr(heal_run._Heal, "close", real)
    again = heal(cut, texts, tmp_path / "killed", tmp_path / "killed.work", options)
    assert {p.name: p.read_bytes() for p in again.path.iterdir()} == \
        {p.name: p.read_bytes() for p in once.path.iterdir()}


def test_refusals(cut: View, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layer with a learned router is cut"):
        heal(View(cut.base), TEXTS, tmp_path / "a", tmp_path / "w", HealOptions("0"))
    writer = OverlayWriter(tmp_path / "router", "router", cut.recipe_sha256, {})
    writer.add("layer_003", [("layers.3.ffn.gate.bias", "F32", np.zeros(4, np.float32))])
    with pytest.raises(UsageError, match=r"has changed layers\.3\.ffn\.gate\.bias; heal first"):
        heal(cut.over(writer.finish()), TEXTS, tmp_path / "b", tmp_path / "w", HealOptions("0"))
    with pytest.raises(UsageError, match="--fit-tokens 1: leaves no token to hold out"):
        heal(cut, TEXTS, tmp_path / "c", tmp_path / "w", HealOptions("0", fit_tokens=1))
    assert not (tmp_path / "a").exists()
