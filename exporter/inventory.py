"""Every tensor an official V4-Flash checkpoint holds, with shape and dtype (V4 spec: checkpoint table).

A routed expert is FP4 because its tensor is I8, whatever ``expert_dtype`` of the config says (early files lack it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from appliance.errors import CheckpointError
from appliance.model import ModelConfig
from exporter.checkpoint import Checkpoint
from exporter.safetensors_file import NUMPY_DTYPES

Entry = tuple[tuple[int, ...], str]  # shape, dtype
BLOCK = 128  # rows and columns of one FP8 scale
EXTRA_PREFIX = "mtp."  # MTP block of the preview, DSpark stages of the refresh: tolerated, not needed
DSPARK_MARK = "markov_w1"  # a tensor only the 0731 refresh has


@dataclass(frozen=True, slots=True)
class DSpark:
    """The draft stages of the 0731 refresh: blocks mtp.0 …, the first reads ``targets`` layers, the last predicts."""

    stages: int = 3
    targets: int = 3
    markov_rank: int = 256


def expected_tensors(config: ModelConfig, *, mtp: int = 0, dspark: DSpark | None = None) -> dict[str, Entry]:
    """name → (shape, dtype) of the backbone and of ``mtp`` MTP blocks or of DSpark, in the official order."""
    dims = config.hidden_size
    found: dict[str, Entry] = {"embed.weight": ((config.vocab_size, dims), "BF16")}
    for layer in range(config.num_hidden_layers):
        found |= block_tensors(config, f"layers.{layer}", config.compress_ratios[layer], layer < config.num_hash_layers)
    found |= _head(config, "")
    found["head.weight"] = ((config.vocab_size, dims), "BF16")
    return found | draft_tensors(config, mtp=mtp, dspark=dspark)


def draft_tensors(config: ModelConfig, *, mtp: int = 0, dspark: DSpark | None = None) -> dict[str, Entry]:
    """The draft stages' part of :func:`expected_tensors`."""
    dims = config.hidden_size
    found: dict[str, Entry] = {}
    for stage in range(mtp):
        name = f"mtp.{stage}"
        found |= block_tensors(config, name, 0, hashed=False)
        found |= {**_fp8(f"{name}.e_proj", dims, dims), **_fp8(f"{name}.h_proj", dims, dims)}
        found |= {f"{name}.{norm}.weight": ((dims,), "BF16") for norm in ("enorm", "hnorm")}
        found |= _head(config, f"{name}.")
    return found | (_dspark(config, dspark) if dspark else {})


def draft_of(checkpoint: Checkpoint) -> tuple[int, DSpark | None]:
    """(MTP blocks, DSpark) that the checkpoint's names and config.json tell of."""
    numbers = {name.split(".")[1] for name in checkpoint.names if name.startswith(EXTRA_PREFIX)}
    if not any(DSPARK_MARK in name for name in checkpoint.names):
        return len(numbers), None
    raw, usual = checkpoint.raw_config, DSpark()
    targets, rank = raw.get("dspark_target_layer_ids"), raw.get("dspark_markov_rank")
    return 0, DSpark(
        len(numbers), len(targets) if isinstance(targets, list) else usual.targets,
        rank if type(rank) is int else usual.markov_rank,
    )  # fmt: skip


def block_tensors(config: ModelConfig, name: str, ratio: int, hashed: bool) -> dict[str, Entry]:
    """One transformer block ``name`` with compress ratio ``ratio``; ``hashed`` routes by token id."""
    streams, dims = config.hc_mult, config.hidden_size
    found: dict[str, Entry] = {}
    for part in ("hc_attn", "hc_ffn"):
        mixes = streams * (streams + 2)
        found[f"{name}.{part}_fn"] = ((mixes, streams * dims), "F32")
        found[f"{name}.{part}_base"] = ((mixes,), "F32")
        found[f"{name}.{part}_scale"] = ((3,), "F32")
    found[f"{name}.attn_norm.weight"] = found[f"{name}.ffn_norm.weight"] = ((dims,), "BF16")
    return found | dict(_attention(config, f"{name}.attn", ratio)) | dict(_ffn(config, f"{name}.ffn", hashed))


def check(checkpoint: Checkpoint) -> None:
    """Compare a checkpoint with its config. Raises CheckpointError naming file and tensor, found and expected."""
    expected = expected_tensors(checkpoint.config)
    for name, (shape, dtype) in expected.items():
        wanted = f"{dtype} {list(shape)}"
        if not checkpoint.has(name):
            raise CheckpointError(f"{checkpoint.listing}: tensor {name} is missing, expected {wanted}")
        info = checkpoint.info(name)
        if (info.shape, info.dtype) != (shape, dtype):
            raise CheckpointError(f"{info.file}: {name}: found {info.dtype} {list(info.shape)}, expected {wanted}")
    for name in checkpoint.names:
        if name not in expected and not name.startswith(EXTRA_PREFIX):
            info = checkpoint.info(name)
            raise CheckpointError(f"{info.file}: tensor {name} does not belong to V4-Flash of this config.json")


def size_bytes(entries: Mapping[str, Entry]) -> int:
    """Tensor bytes of ``entries``."""
    return sum(math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize for shape, dtype in entries.values())


def _fp8(name: str, rows: int, columns: int) -> dict[str, Entry]:
    scale = (-(-rows // BLOCK), -(-columns // BLOCK))
    return {f"{name}.weight": ((rows, columns), "F8_E4M3"), f"{name}.scale": (scale, "F8_E8M0")}


def _fp4(name: str, rows: int, columns: int) -> dict[str, Entry]:
    return {f"{name}.weight": ((rows, columns // 2), "I8"), f"{name}.scale": ((rows, columns // 32), "F8_E8M0")}


def _head(config: ModelConfig, prefix: str) -> dict[str, Entry]:
    streams = config.hc_mult
    return {
        f"{prefix}norm.weight": ((config.hidden_size,), "BF16"),
        f"{prefix}hc_head_fn": ((streams, streams * config.hidden_size), "F32"),
        f"{prefix}hc_head_base": ((streams,), "F32"),
        f"{prefix}hc_head_scale": ((1,), "F32"),
    }


def _dspark(config: ModelConfig, dspark: DSpark) -> dict[str, Entry]:
    """Facts from the refresh's file headers (V4 spec: DSpark)."""
    dims, vocabulary, rank = config.hidden_size, config.vocab_size, dspark.markov_rank
    found: dict[str, Entry] = {}
    for stage in range(dspark.stages):
        found |= block_tensors(config, f"mtp.{stage}", 0, hashed=False)
    found |= _fp8("mtp.0.main_proj", dims, dspark.targets * dims)
    found["mtp.0.main_norm.weight"] = ((dims,), "BF16")
    last = f"mtp.{dspark.stages - 1}"
    found |= _head(config, f"{last}.")
    for part in ("markov_w1", "markov_w2"):
        found[f"{last}.markov_head.{part}.weight"] = ((vocabulary, rank), "BF16")
    found[f"{last}.confidence_head.proj.weight"] = ((1, dims + rank), "BF16")
    return found


def _compressor(name: str, ratio: int, width: int, dims: int, overlap: int) -> Iterator[tuple[str, Entry]]:
    yield f"{name}.ape", ((ratio, overlap * width), "F32")
    yield f"{name}.wkv.weight", ((overlap * width, dims), "BF16")
    yield f"{name}.wgate.weight", ((overlap * width, dims), "BF16")
    yield f"{name}.norm.weight", ((width,), "BF16")


def _attention(config: ModelConfig, name: str, ratio: int) -> Iterator[tuple[str, Entry]]:
    c, dims = config, config.hidden_size
    heads, latent = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    yield f"{name}.attn_sink", ((c.num_attention_heads,), "F32")
    yield from _fp8(f"{name}.wq_a", c.q_lora_rank, dims).items()
    yield f"{name}.q_norm.weight", ((c.q_lora_rank,), "BF16")
    yield from _fp8(f"{name}.wq_b", heads, c.q_lora_rank).items()
    yield from _fp8(f"{name}.wkv", c.head_dim, dims).items()
    yield f"{name}.kv_norm.weight", ((c.head_dim,), "BF16")
    yield from _fp8(f"{name}.wo_a", latent, heads // c.o_groups).items()
    yield from _fp8(f"{name}.wo_b", dims, latent).items()
    if ratio == 0:
        return
    overlap = 2 if ratio == c.csa_ratio else 1
    yield from _compressor(f"{name}.compressor", ratio, c.head_dim, dims, overlap)
    if ratio == c.csa_ratio:
        yield from _fp8(f"{name}.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank).items()
        yield f"{name}.indexer.weights_proj.weight", ((c.index_n_heads, dims), "BF16")
        yield from _compressor(f"{name}.indexer.compressor", ratio, c.index_head_dim, dims, overlap)


def _ffn(config: ModelConfig, name: str, hashed: bool) -> Iterator[tuple[str, Entry]]:
    dims, inner = config.hidden_size, config.moe_intermediate_size
    yield f"{name}.gate.weight", ((config.n_routed_experts, dims), "BF16")
    if hashed:
        yield f"{name}.gate.tid2eid", ((config.vocab_size, config.num_experts_per_tok), "I64")
    else:
        yield f"{name}.gate.bias", ((config.n_routed_experts,), "F32")
    for expert in range(config.n_routed_experts):
        for part, rows, columns in (("w1", inner, dims), ("w2", dims, inner), ("w3", inner, dims)):
            yield from _fp4(f"{name}.experts.{expert}.{part}", rows, columns).items()
    for part, rows, columns in (("w1", inner, dims), ("w2", dims, inner), ("w3", inner, dims)):
        yield from _fp8(f"{name}.shared_experts.{part}", rows, columns).items()
