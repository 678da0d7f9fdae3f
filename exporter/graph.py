"""The graph of a view: ids in, logits and fresh cache rows out (graph contract v1, docs/ops.md).

Weights are external data in the bundle's objects; nothing of their bytes passes through here. A view that keeps K
experts of a layer maps the first K records and router rows of objects that may hold more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from appliance.errors import CheckpointError
from appliance.model import ModelConfig, StateTensor, state_tensors
from exporter.blocks.layer import LayerContext, layer
from exporter.blocks.linear import head, is_coded
from exporter.blocks.moe import is_reordered
from exporter.ops import hyper
from exporter.ops.body import BFLOAT16, FLOAT, INT32, INT64, IR_VERSION, UINT8, Body, opset_imports
from exporter.view import View

ONNX_TYPES = {
    "F32": FLOAT, "BF16": BFLOAT16, "I64": INT64, "U8": UINT8, "I8": UINT8, "F8_E4M3": UINT8, "F8_E8M0": UINT8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where an initializer's bytes lie: ``location`` relative to the graph, in bytes; dtype as in the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    location: str
    offset: int
    size_bytes: int

    def first_rows(self, rows: int) -> StoredTensor:
        """The first ``rows`` rows of it; CheckpointError when fewer are stored."""
        if self.shape[0] < rows:
            raise CheckpointError(f"{self.name}: {self.shape[0]} rows are stored in {self.location}, expected {rows}")
        size_bytes = self.size_bytes // self.shape[0] * rows
        return replace(self, shape=(rows, *self.shape[1:]), size_bytes=size_bytes)

    def to_proto(self) -> TensorProto:
        proto = TensorProto(name=self.name, data_type=ONNX_TYPES[self.dtype], dims=self.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", self.offset), ("length", self.size_bytes)):
            proto.external_data.add(key=key, value=str(value))
        return proto


def graph_tensors(view: View) -> tuple[str, ...]:
    """Names of the tensors the graph reads as they are; experts come as ``layers.L.ffn.experts``.

    Which linears have a ``.scale`` follows from the dtypes in the view.
    """
    names = ["embed.weight", "head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"]
    names += ["head.scale"] if is_coded(view, "head") else []
    for index in range(view.config.num_hidden_layers):
        names += [f"layers.{index}.{tail}" for tail in _layer_tensors(view.config, index)]
    return tuple(names)


def _layer_tensors(config: ModelConfig, index: int) -> Iterator[str]:
    yield from (f"hc_{part}_{what}" for part in ("attn", "ffn") for what in ("fn", "base", "scale"))
    yield from ("attn_norm.weight", "ffn_norm.weight", "attn.attn_sink", "attn.q_norm.weight", "attn.kv_norm.weight")
    linears = [f"attn.{w}" for w in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
    linears += [f"ffn.shared_experts.{w}" for w in ("w1", "w2", "w3")]
    compressors = [] if config.layer_kind(index) == "S" else ["attn.compressor"]
    if config.layer_kind(index) == "C":
        linears.append("attn.indexer.wq_b")
        compressors.append("attn.indexer.compressor")
        yield "attn.indexer.weights_proj.weight"
    for name in linears:
        yield from (f"{name}.weight", f"{name}.scale")
    for name in compressors:
        yield from (f"{name}.{tail}" for tail in ("ape", "wkv.weight", "wgate.weight", "norm.weight"))
    yield "ffn.gate.weight"
    yield "ffn.gate.tid2eid" if index < config.num_hash_layers else "ffn.gate.bias"


def build_graph(view: View, numerics: str, tensors: Mapping[str, StoredTensor]) -> onnx.ModelProto:
    """The view's graph over ``tensors``: every name of graph_tensors, and ``layers.L.ffn.experts`` [E, R].

    Experts and router rows may be stored in full: the graph maps the first ``view.experts_kept[L]`` of them. Layers
    whose kept experts are not in official order carry ``layers.L.ffn.official`` i64 [K].
    """
    config, body = view.config, Body()
    states = state_tensors(config, numerics)
    b_m = body.op("Shape", "ids")
    flat_ids = body.reshape("ids", -1)
    half = config.qk_rope_head_dim // 2
    rope = {name: body.reshape(name, -1, half) for name in ("cos_main", "sin_main", "cos_comp", "sin_comp")}
    ctx = LayerContext(view, numerics, flat_ids, b_m, rope)
    h = body.cast(body.op("Gather", "embed.weight", flat_ids, axis=0), FLOAT)
    h = body.op("Expand", body.unsqueeze(h, 1), body.ints(1, config.hc_mult, 1))
    fresh: dict[str, str] = {}
    for index in range(config.num_hidden_layers):
        h, rows = layer(body, ctx, index, h)
        fresh |= rows
    h = body.op("Gather", h, "rows_out", axis=0)
    collect = hyper.hc_head(config.hc_mult, config.hidden_size, config.hc_eps, config.rms_norm_eps)
    x = body.call(collect, h, "hc_head_fn", "hc_head_base", "hc_head_scale")
    x = body.rms_norm(x, body.cast("norm.weight", FLOAT), config.rms_norm_eps)
    outputs = {"logits": head(body, view, x)} | {f"{s.name}.new": fresh[s.name] for s in states}
    for name, value in outputs.items():
        body.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}_out"))
    return _model(body, view, states, tensors)


def _initializers(view: View, tensors: Mapping[str, StoredTensor]) -> Iterator[TensorProto]:
    """What is stored, by name, cut to the experts kept; then K and, where it says anything, the official ids."""
    cut: dict[str, int] = {}
    for index, kept in enumerate(view.experts_kept):
        cut |= {f"layers.{index}.ffn.{part}": kept for part in ("experts", "gate.weight", "gate.bias")}
    for name in sorted(tensors):
        yield (tensors[name].first_rows(cut[name]) if name in cut else tensors[name]).to_proto()
    for index in range(view.config.num_hash_layers, view.config.num_hidden_layers):
        yield numpy_helper.from_array(np.array(view.experts_kept[index], np.int64), f"layers.{index}.ffn.n_kept")
    for index, kept in enumerate(view.experts_kept):
        if is_reordered(view, index):
            official = np.array(view.ranking.orders[index][:kept], np.int64)
            yield numpy_helper.from_array(official, f"layers.{index}.ffn.official")


def _model(
    body: Body, view: View, states: tuple[StateTensor, ...], tensors: Mapping[str, StoredTensor]
) -> onnx.ModelProto:
    config = view.config
    graph = helper.make_graph(
        body.nodes, "deepseek_v4_flash", _inputs(config, states), _outputs(config, states),
        list(_initializers(view, tensors)),
    )  # fmt: skip
    functions = [function.to_proto() for function in body.functions.values()]
    return helper.make_model(
        graph, opset_imports=opset_imports(), ir_version=IR_VERSION, functions=functions, producer_name="solocard"
    )


def _ratios(config: ModelConfig) -> list[int]:
    return sorted({r for r in config.compress_ratios if r})


def _inputs(config: ModelConfig, states: tuple[StateTensor, ...]) -> list[onnx.ValueInfoProto]:
    info, half = helper.make_tensor_value_info, config.qk_rope_head_dim // 2
    inputs = [
        info("ids", INT64, ["b", "m"]), info("pos", INT64, ["b"]), info("slots", INT32, ["b"]),
        info("block_table", INT32, ["b", "nb"]), info("rows_out", INT64, ["v"]),
    ]  # fmt: skip
    for table in ("main", "comp"):
        inputs += [info(f"{f}_{table}", FLOAT, ["b", "m", half]) for f in ("cos", "sin")]
    for ratio in _ratios(config):
        inputs += [info(f"{f}_c{ratio}", FLOAT, ["b", f"c{ratio}", half]) for f in ("cos", "sin")]
    for state in states:
        pool = "blocks" if state.paged else "slots_total"
        inputs.append(info(state.name, _dtype(state), [pool, state.rows, state.width]))
    return inputs


def _outputs(config: ModelConfig, states: tuple[StateTensor, ...]) -> list[onnx.ValueInfoProto]:
    info = helper.make_tensor_value_info
    outputs = [info("logits", FLOAT, ["v", config.vocab_size])]
    for state in states:
        rows = f"c{state.ratio}" if state.paged else "m"
        outputs.append(info(f"{state.name}.new", _dtype(state), ["b", rows, state.width]))
    return outputs


def _dtype(state: StateTensor) -> int:
    return int(UINT8 if state.dtype == "u8" else FLOAT)
