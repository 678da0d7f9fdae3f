"""The built graph through the engine's own ``logits`` command against independent implementations (kv-f32, 1e-4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hf_support
import numpy as np
import onnx
import pytest
from graph_support import GOLDEN, build_bundle, quick_engine

from appliance.model import state_tensors
from exporter.checkpoint import Checkpoint
from exporter.engine_process import engine_logits
from exporter.graph import StoredTensor, build_graph, graph_tensors
from exporter.ops.moe import record_parts
from exporter.view import View
from runtime.backends.ort import OrtBackend
from runtime.engine import Engine
from runtime.logits import sequence_logits

MAX_ERROR = 1e-4
CHUNKS = {"256 at a time": [], "ragged": [5, 3, 16, 33, 2, 1, 7, 64, 29], "one by one": [1] * 1024}


def expected_case(name: str, folder: Path) -> tuple[Path, list[int], np.ndarray]:
    """→ checkpoint, ids, reference logits of the last rows."""
    if name == "tiny-q":
        golden = np.load(GOLDEN / "tiny-q" / "golden.npz")
        return GOLDEN / "tiny-q", golden["ids"].tolist(), golden["float32_dequant_logits"]
    case, golden = hf_support.random_configs()[name], hf_support.golden(name)
    checkpoint = hf_support.write_official(folder / name, case.config, case.seed)
    assert hf_support.weights_sha256(checkpoint) == str(golden["weights_sha256"])
    return checkpoint.path, case.ids, golden["logits"]


@pytest.mark.parametrize("name", ["tiny-q", "short", "wide"])
def test_logits_agree_in_every_chunking(name: str, tmp_path: Path) -> None:
    checkpoint, ids, expected = expected_case(name, tmp_path)
    bundle = tmp_path / "bundle"
    build_bundle(checkpoint, bundle, numerics="kv-f32", tokenizer=name != "tiny-q")
    onnx.checker.check_model(str(bundle / "model.onnx"))
    for chunks in CHUNKS.values():
        (logits,) = engine_logits(bundle, [ids], chunks=chunks)
        assert np.abs(logits[-len(expected) :] - expected).max() <= MAX_ERROR


def scale_byte(record: np.ndarray) -> None:
    used = sum(rows * width for _, (rows, width) in record_parts(256, 128))
    record[0, used - 1] += 1  # the last E8M0 byte of expert 0


def nibble_order(record: np.ndarray) -> None:
    record[:, :4096] = (record[:, :4096] >> 4) | (record[:, :4096] << 4)  # in w1's first rows


@pytest.mark.parametrize("change", [scale_byte, nibble_order, None])
def test_one_wrong_byte_or_nibble_breaks_parity(change: Callable[[np.ndarray], None] | None, tmp_path: Path) -> None:
    checkpoint, ids, expected = expected_case("tiny-q", tmp_path)
    engine = quick_engine(checkpoint, tmp_path / "bundle", numerics="kv-f32")
    if change:
        graph = onnx.load(str(tmp_path / "bundle" / "model.onnx"), load_external_data=False)
        tensor = next(t for t in graph.graph.initializer if t.name == "layers.4.ffn.experts")
        place = {entry.key: entry for entry in tensor.external_data}
        record = np.fromfile(tmp_path / "bundle" / place["location"].value, np.uint8).reshape(tuple(tensor.dims))
        change(record)
        place["location"].value = "objects/changed"
        record.tofile(tmp_path / "bundle" / "objects" / "changed")
        (tmp_path / "bundle" / "changed.onnx").write_bytes(graph.SerializeToString())
        engine = Engine(engine.spec, OrtBackend(tmp_path / "bundle" / "changed.onnx", threads=1), context_tokens=512)
    error = np.abs(sequence_logits(engine, ids, None, 0) - expected).max()
    assert (error > MAX_ERROR) if change else (error <= MAX_ERROR)


def test_graph_holds_no_weight_bytes_and_names_every_dim() -> None:
    ckpt = Checkpoint.open(GOLDEN / "tiny-q")
    rows = ckpt.config.n_routed_experts
    names = [*graph_tensors(View(ckpt)), *(f"layers.{i}.ffn.experts" for i in range(6))]
    tensors = {n: StoredTensor(n, "F32", (rows,), "objects/00/x", 0, 4 * rows) for n in names}
    model = build_graph(View(ckpt), "kv-v4", tensors)
    assert {o.version for o in model.opset_import if o.domain == ""} == {18}
    assert model.ir_version == 8
    assert all(len(t.raw_data) <= 8 for t in model.graph.initializer)
    for value in (*model.graph.input, *model.graph.output):
        assert all(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim), value.name
    states = {s.name for s in state_tensors(ckpt.config, "kv-v4")}
    assert states <= {value.name for value in model.graph.input}
    assert {f"{name}.new" for name in states} <= {value.name for value in model.graph.output}
