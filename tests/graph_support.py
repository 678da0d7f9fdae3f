"""Building bundles and running single functions of the op set in tests."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from appliance.manifest import object_path
from appliance.model import ModelSpec, state_tensors
from exporter.checkpoint import Checkpoint
from exporter.graph import StoredTensor, build_graph, graph_tensors
from exporter.ops.body import Body, OpFunction, opset_imports
from exporter.ops.moe import record_bytes, record_parts
from exporter.view import View
from runtime.backends.base import Arrays
from runtime.backends.ort import OrtBackend, ort  # onnxruntime by the product's import, which keeps it offline
from runtime.engine import Engine, Sequence

GOLDEN = Path(__file__).parent / "golden"


def build_bundle(checkpoint: Path, out: Path, *, numerics: str = "kv-v4", tokenizer: bool = True, **more: str) -> None:
    """``solocard-export build``, in this process."""
    from exporter.__main__ import main as export

    options = ["--encoding", "dsv4-0731", "--numerics", numerics, *([] if tokenizer else ["--no-tokenizer"])]
    for name, value in more.items():
        options += [f"--{name.replace('_', '-')}", value]
    assert export(["build", str(checkpoint), str(out), *options]) == 0


def quick_engine(
    checkpoint: Path, folder: Path, *, numerics: str = "kv-v4", threads: int = 1, context_tokens: int = 2048,
    max_sequences: int = 1, wrap: Callable[[OrtBackend], Any] = lambda backend: backend,
) -> Engine:  # fmt: skip
    """Graph and objects without manifest and golden search: for tests that want many engines."""
    view = View(Checkpoint.open(checkpoint))
    return view_engine(
        view, folder, numerics=numerics, threads=threads, context_tokens=context_tokens, max_sequences=max_sequences,
        wrap=wrap,
    )  # fmt: skip


def view_engine(
    view: View, folder: Path, *, numerics: str = "kv-v4", threads: int = 1, context_tokens: int = 2048,
    max_sequences: int = 1, wrap: Callable[[OrtBackend], Any] = lambda backend: backend,
) -> Engine:  # fmt: skip
    """As quick_engine, of any view."""
    shutil.rmtree(folder, ignore_errors=True)
    tensors = store_view(view, folder)
    graph = folder / "model.onnx"
    graph.write_bytes(build_graph(view, numerics, tensors).SerializeToString(deterministic=True))
    config = view.config
    spec = ModelSpec("test", config, state_tensors(config, numerics), "dsv4-0731", numerics, (), ())
    backend = wrap(OrtBackend(graph, threads=threads))
    return Engine(spec, backend, context_tokens=context_tokens, max_sequences=max_sequences)


def store_view(view: View, folder: Path) -> dict[str, StoredTensor]:
    """Every tensor the view's graph reads as a file of its own below ``folder``: the plain way to write objects."""
    config, tensors = view.config, {}
    for name in graph_tensors(view):
        data, info = b"".join(view.stream(name)), view.info(name)
        tensors[name] = StoredTensor(name, info.dtype, info.shape, store(folder, data), 0, len(data))
    size_bytes = record_bytes(config.hidden_size, config.moe_intermediate_size)
    parts = [part for part, _ in record_parts(config.hidden_size, config.moe_intermediate_size)]
    for layer, kept in enumerate(view.experts_kept):
        name = f"layers.{layer}.ffn.experts"
        records = [b"".join(view.read(f"{name}.{e}.{part}").tobytes() for part in parts) for e in range(kept)]
        data = b"".join(record.ljust(size_bytes, b"\0") for record in records)
        tensors[name] = StoredTensor(name, "U8", (kept, size_bytes), store(folder, data), 0, len(data))
    return tensors


def store(folder: Path, data: bytes) -> str:
    """An object by its content; → its place below ``folder``."""
    location = object_path(hashlib.sha256(data).hexdigest())
    (folder / location).parent.mkdir(parents=True, exist_ok=True)
    (folder / location).write_bytes(data)
    return location


def run_function(function: OpFunction, **feeds: np.ndarray) -> list[np.ndarray]:
    """One op through stock onnxruntime, with its function body alone."""
    body = Body()
    outputs = body.call(function, *function.inputs, n=len(function.outputs))
    names = [outputs] if isinstance(outputs, str) else outputs
    inputs = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()
    ]
    graph = helper.make_graph(body.nodes, "one", inputs, [onnx.ValueInfoProto(name=name) for name in names])
    protos = [f.to_proto() for f in body.functions.values()]
    model = helper.make_model(graph, opset_imports=opset_imports(), ir_version=8, functions=protos)
    options = ort.SessionOptions()
    options.enable_mem_reuse = False
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(names, feeds))


class Recorder:
    """A backend that keeps every call's outputs: the fresh rows, as committed, by state name."""

    def __init__(self, backend: OrtBackend) -> None:
        self._backend, self.calls = backend, []
        self.description, self.device, self.arithmetic = backend.description, backend.device, backend.arithmetic

    def run(self, feeds: Arrays) -> Arrays:
        outputs = self._backend.run(feeds)
        self.calls.append(outputs)
        return outputs


def committed_rows(engine: Engine, ids: list[int], calls: list[int]) -> dict[str, np.ndarray]:
    """Every row that ``calls`` commit for ``ids``, oldest first, by state name (rings left out)."""
    recorder: Recorder = engine.backend
    rows: dict[str, list[np.ndarray]] = {s.name: [] for s in engine.spec.states if s.kind not in ("ring", "iring")}
    seq, at = engine.open(), 0
    for count in calls:
        recorder.calls.clear()
        engine.forward(seq, ids[at : at + count], rows=[count - 1])
        outputs = recorder.calls[0]
        for state in engine.spec.states:
            if state.kind == "win":
                rows[state.name].append(outputs[f"{state.name}.new"][0, :count])
            elif state.paged:
                closed = (at + count) // state.ratio - at // state.ratio
                rows[state.name].append(outputs[f"{state.name}.new"][0, :closed])
        at += count
    engine.close(seq)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def run_calls(engine: Engine, seq: Sequence, ids: list[int], calls: list[int]) -> np.ndarray:
    """Logits f32 [sum(calls), vocab] of ``ids`` appended to ``seq`` in these calls."""
    parts, at = [], 0
    for count in calls:
        parts.append(engine.forward(seq, ids[at : at + count], rows=range(count)))
        at += count
    return np.concatenate(parts)
