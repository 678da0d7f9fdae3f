"""Statistics of a calibration run against sums made by hand from the whole reference; kills; refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import CheckpointError, UsageError
from exporter.__main__ import main
from exporter.checkpoint import Checkpoint
from exporter.statistics import Statistics, reap_mean
from exporter.view import View

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from exporter import layerwise  # noqa: E402
from exporter.calibration import Text, texts_sha256  # noqa: E402
from exporter.observe.run import ObserveOptions, observe  # noqa: E402
from exporter.reference import Reference, Trace  # noqa: E402

TEXTS = [
    Text("prose", tuple(range(3, 90))), Text("code", (9, 700, 9, 9, 300) * 9), Text("prose", (5, 6)),
    Text("code", tuple(range(700, 640, -1))),
]  # fmt: skip
DOMAIN = [1, 0, 1, 0]  # sorted: code, prose


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def view(tiny_checkpoint: Path) -> View:
    return View(Checkpoint.open(tiny_checkpoint))


@pytest.fixture(scope="module")
def statistics(view: View, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    folder = tmp_path_factory.mktemp("observe")
    found = observe(view, TEXTS, folder / "stats", folder / "work", ObserveOptions("0" * 64, hessian=32))
    assert not (folder / "work").exists()
    return found


def softplus_route(x: np.ndarray, gate: np.ndarray) -> np.ndarray:
    return np.sqrt(np.log1p(np.exp(x @ gate.T)))


class ByHand:
    """Everything a learned layer is counted for, token by token, in f64 numpy."""

    def __init__(self, view: View, layer: int) -> None:
        self.view, self.layer, c = view, layer, view.config
        self.reap, self.gate, self.norm = (np.zeros((2, c.n_routed_experts)) for _ in range(3))
        self.count = np.zeros((2, c.n_routed_experts), np.int64)
        self.together = np.zeros((c.n_routed_experts,) * 2, np.int64)
        self.peak = np.zeros(c.n_routed_experts)
        self.inputs: list[np.ndarray] = []
        self.x_of: dict[int, list[np.ndarray]] = {}
        self.mid_of: dict[int, list[np.ndarray]] = {}
        self.weights = {n: view.float32(n).astype(np.float64) for n in view.names
                        if n.startswith(f"layers.{layer}.ffn.") and n.endswith(("weight", "bias"))}

    def token(self, domain: int, x: np.ndarray, experts: list[int]) -> None:
        c, name = self.view.config, f"layers.{self.layer}.ffn"
        scores = softplus_route(x, self.weights[f"{name}.gate.weight"])
        for expert in experts:
            weight = scores[expert] / scores[experts].sum() * c.routed_scaling_factor
            up = np.clip(self.weights[f"{name}.experts.{expert}.w3.weight"] @ x, -c.swiglu_limit, c.swiglu_limit)
            gate = np.minimum(self.weights[f"{name}.experts.{expert}.w1.weight"] @ x, c.swiglu_limit)
            act = gate / (1 + np.exp(-gate)) * up
            out = self.weights[f"{name}.experts.{expert}.w2.weight"] @ act
            self.reap[domain, expert] += weight * np.linalg.norm(out)
            self.gate[domain, expert] += weight
            self.norm[domain, expert] += np.linalg.norm(out)
            self.count[domain, expert] += 1
            self.peak[expert] = max(self.peak[expert], np.abs(out).max())
            self.x_of.setdefault(expert, []).append(x)
            self.mid_of.setdefault(expert, []).append(weight * act)
            for other in experts:
                self.together[expert, other] += 1
        self.inputs.append(x)


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("layer", [1, 4])
def test_experts_by_hand(view: View, statistics: Statistics, layer: int) -> None:
    """Layer 1 is routed by token id, layer 4 by a learned router. Inputs come from hooks on the whole reference."""
    hand, seen = ByHand(view, layer), []
    reference = Reference.from_checkpoint(view.base, kv_sim=True)
    plain = reference._moe

    def spy(name: str, at: int, x: torch.Tensor, *rest: object) -> torch.Tensor:
        if at == layer:
            seen.append(x.numpy().astype(np.float64))
        return plain(name, at, x, *rest)

    reference._moe = spy
    for text, domain in zip(TEXTS, DOMAIN, strict=True):
        trace = Trace()
        with torch.no_grad():
            reference.forward(list(text.ids), reference.new_state(), trace=trace)
        for x, experts in zip(seen.pop(), torch.cat(trace.routed[layer]).tolist(), strict=True):
            hand.token(domain, x, experts)
    assert statistics.domains == ("code", "prose")
    np.testing.assert_array_equal(statistics.tensor(layer, "count"), hand.count)
    np.testing.assert_array_equal(statistics.tensor(layer, "cooccurrence"), hand.together)
    for name, expected in (("reap_sum", hand.reap), ("gate_sum", hand.gate), ("norm_sum", hand.norm),
                           ("output_peak", hand.peak)):
        np.testing.assert_allclose(statistics.tensor(layer, name), expected, rtol=2e-5, atol=1e-6)
    shared = np.array(hand.inputs)
    np.testing.assert_allclose(
        statistics.tensor(layer, "x2.ffn.shared_experts.w1"), (shared * shared).mean(0), rtol=2e-5
    )
    for expert, rows in hand.x_of.items():
        for name, held in (("w13", np.array(rows)), ("w2", np.array(hand.mid_of[expert]))):
            found = statistics.tensor(layer, f"x2.ffn.experts.{name}")[expert]
            np.testing.assert_allclose(found, (held * held).mean(0), rtol=5e-5, atol=1e-9)
    weights = np.array([3.0, 1.0])
    expected = (weights @ hand.reap) / np.maximum(weights @ hand.count, 1)
    np.testing.assert_allclose(reap_mean(statistics, layer, weights), expected, rtol=2e-5)


def test_dense_inputs_by_hand(view: View, statistics: Statistics) -> None:
    """First layer: the input of attention is the normed, stream-weighted embedding."""
    c, name = view.config, "layers.0"
    x = []
    fn, base, scale = (view.float32(f"{name}.hc_attn_{part}").astype(np.float64) for part in ("fn", "base", "scale"))
    embedding = view.float32("embed.weight").astype(np.float64)
    for token in (t for text in TEXTS for t in text.ids):
        streams = np.tile(embedding[token], (c.hc_mult, 1))
        flat = streams.reshape(-1)
        mixes = fn @ flat / np.sqrt((flat * flat).mean() + c.rms_norm_eps)
        pre = 1 / (1 + np.exp(-(mixes[: c.hc_mult] * scale[0] + base[: c.hc_mult]))) + c.hc_eps
        x.append(rms(pre @ streams, view.float32(f"{name}.attn_norm.weight"), c.rms_norm_eps))
    inputs = np.array(x)
    latent = rms(inputs @ view.float32(f"{name}.attn.wq_a.weight").T.astype(np.float64),
                 view.float32(f"{name}.attn.q_norm.weight"), c.rms_norm_eps)
    for linear, rows in (("attn.wq_a", inputs), ("attn.wkv", inputs), ("attn.wq_b", latent)):
        np.testing.assert_allclose(statistics.tensor(0, f"x2.{linear}"), (rows * rows).mean(0), rtol=2e-5)
        products = statistics.tensor(0, f"hessian.{linear}")
        assert products.shape == (rows.shape[1] // 32, 32, 32)
        for block, found in enumerate(products):
            part = rows[:, 32 * block : 32 * block + 32]
            np.testing.assert_allclose(found, part.T @ part / len(part), rtol=1e-4, atol=1e-5)
    assert statistics.tensor(0, "x2.attn.wo_a").shape == (c.o_groups, c.num_attention_heads * c.head_dim // c.o_groups)
    assert statistics.tensor(0, "x2.attn.indexer.wq_b") is not None
    assert statistics.tensor(0, "x2.attn.nothing") is None


def test_super_experts_are_outliers(view: View, statistics: Statistics) -> None:
    peaks = np.array([statistics.tensor(layer, "output_peak") for layer in range(7)], np.float64)
    ordered = np.sort(peaks.reshape(-1))
    place = 0.995 * (len(ordered) - 1)
    percentile = ordered[int(place)] + (place - int(place)) * (ordered[int(place) + 1] - ordered[int(place)])
    expected = {
        (layer, expert) for layer in range(7) for expert in range(8)
        if peaks[layer, expert] > percentile and peaks[layer, expert] > 0.1 * ordered[-1]
        and peaks[layer, expert] > 3 * np.median(peaks[layer])
    }  # fmt: skip
    assert set(statistics.super_experts) == expected
    for layer in range(7):
        flags = statistics.tensor(layer, "super_expert")
        assert flags.dtype == np.uint8
        assert flags.sum() == len([at for at, _ in expected if at == layer])


def texts_file(path: Path) -> Path:
    path.write_text("".join(json.dumps({"domain": t.domain, "ids": list(t.ids)}) + "\n" for t in TEXTS))
    return path


def digests(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "layers", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_killed_process_ends_with_the_same_bytes(view: View, tmp_path: Path, layers: int) -> None:
    """kill -9 of the real command when it has stored some layers, then the same command to the end."""
    file = texts_file(tmp_path / "texts.jsonl")
    options = ObserveOptions(texts_sha256(file), hessian=32, batch_tokens=64)
    once = observe(view, TEXTS, tmp_path / "once", tmp_path / "once.work", options)
    command = [sys.executable, "-m", "exporter", "observe", str(view.path), "--texts", str(file), "--hessian", "32",
               "--out", str(tmp_path / "killed"), "--batch-tokens", "64"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen(command, **quiet)
    wanted = tmp_path / "killed" / ("recipe.json" if layers == 0 else f"layer_{layers:03d}.safetensors")
    deadline = time.monotonic() + 120
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wanted.exists()
    assert not (tmp_path / "killed" / "observe.json").exists()
    subprocess.run(command, check=True, **quiet)
    assert digests(tmp_path / "killed") == digests(once.path)
    assert not (tmp_path / "killed.work").exists()


def test_a_lost_piece_is_made_again(
    view: View, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    real, options = layerwise.StreamSpill.close, ObserveOptions("0" * 64, hessian=32)

    def stop(self: layerwise.StreamSpill, layer: int) -> None:
        if layer == 4:
            raise StoppedError
        real(self, layer)

    monkeypatch.setattr(layerwise.StreamSpill, "close", stop)
    with pytest.raises(StoppedError):
        observe(view, TEXTS, tmp_path / "stats", tmp_path / "work", options)
    monkeypatch.setattr(layerwise.StreamSpill, "close", real)
    (tmp_path / "stats" / "layer_001.safetensors").unlink()
    again = observe(view, TEXTS, tmp_path / "stats", tmp_path / "work", options)
    assert digests(again.path) == digests(statistics.path)


def test_refusals(
    tiny_checkpoint: Path, statistics: Statistics, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = texts_file(tmp_path / "texts.jsonl"), str(tmp_path / "out")
    start = ["observe", str(tiny_checkpoint), "--texts", str(file), "--out", out]
    assert main([*start, "--domain", "law"]) == 2
    assert "--domain law: " in capsys.readouterr().err
    assert main([*start, "--hessian", "-1"]) == 2
    assert "--hessian -1: expected at least 0" in capsys.readouterr().err
    with pytest.raises(UsageError, match="was observed on another checkpoint"):
        statistics.check_source("0" * 64, tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"observe\.json: cannot be read"):
        Statistics.open(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "observe.json").write_bytes((statistics.path / "observe.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"layer_000\.safetensors: missing or not"):
        Statistics.open(broken)


def test_statistics_without_a_field_are_named(tmp_path: Path) -> None:
    (tmp_path / "observe.json").write_text('{"format": 1, "files": []}')
    with pytest.raises(CheckpointError, match=r"observe\.json: field 'source_sha256' is missing or wrong"):
        Statistics.open(tmp_path)
