"""Writes a checkpoint folder in DeepSeek's official V4-Flash layout: names, dtypes, shards, index, configs.

Shard 1 holds the embedding, then one shard per layer, one for the head, one per MTP block, as the original has them.
Everything is written in OUT.partial, one tensor at a time; OUT appears complete, by one rename, or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError, SpaceError, UsageError
from appliance.model import ModelConfig
from exporter import spec
from exporter.inventory import DSpark, expected_tensors
from exporter.safetensors_file import NUMPY_DTYPES, write_streamed

TensorSource = Callable[[str, tuple[int, ...], str], NDArray[Any]]
Report = Callable[[str, int], None]  # (shard or tensor written, its bytes)
INDEX = "model.safetensors.index.json"


def write_checkpoint(
    out: Path, config: ModelConfig, tensor: TensorSource, *, mtp: int = 1, dspark: DSpark | None = None,
    tokenizer: Mapping[str, Any] | None = None, report: Report | None = None,
) -> int:  # fmt: skip
    """Write every tensor of ``config`` with ``mtp`` MTP blocks or DSpark's stages; returns the tensor bytes written.

    ``tensor(name, shape, dtype)`` gives the raw bits: uint8 for F8_E4M3, F8_E8M0 and I8 (packed FP4), uint16 for
    BF16, float32 for F32, int64 for I64. ``tokenizer`` is a tokenizer.json. UsageError if ``out`` is not empty,
    SpaceError if the disk is full.
    """
    partial = claim_folder(out)
    mtp = 0 if dspark else mtp
    entries = expected_tensors(config, mtp=mtp, dspark=dspark)

    def pieces(name: str) -> Iterable[memoryview]:
        raw = _raw(tensor, name, *entries[name])
        if report is not None:
            report(name, raw.nbytes)
        return [raw]

    try:
        total_bytes = 0
        for file, names in shard_files(entries).items():
            total_bytes += write_streamed(partial / file, [(n, entries[n][1], entries[n][0]) for n in names], pieces)
        write_index(partial, shard_files(entries), total_bytes)
        write_json(partial / "config.json", _config_json(config, mtp, dspark))
        write_json(partial / "generation_config.json", _generation_config(config))
        if tokenizer is not None:
            write_json(partial / "tokenizer.json", tokenizer)
            write_json(partial / "tokenizer_config.json", _tokenizer_config(config, tokenizer))
        partial.rename(out)
    except OSError as error:
        raise SpaceError(f"{partial}: writing failed ({error.strerror}); free space and start again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total_bytes


def claim_folder(out: Path) -> Path:
    """A new folder OUT.partial to be renamed to ``out``; UsageError if ``out`` holds anything."""
    check_empty(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def check_empty(out: Path) -> None:
    """UsageError if ``out`` is there and not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty; name a new folder")


def shard_files(entries: Iterable[str]) -> dict[str, list[str]]:
    """File name → tensor names: "embed", each layer, the top-level head, each MTP block, in this order."""
    shards: dict[str, list[str]] = {}
    for name in entries:
        parts = name.split(".")
        shard = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else "embed" if parts[0] == "embed" else "head"
        shards.setdefault(shard, []).append(name)
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(shards.values(), 1)}


def write_index(folder: Path, files: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """model.safetensors.index.json: the file of every tensor, sorted by name."""
    weight_map = {name: file for file, names in files.items() for name in names}
    write_json(folder / INDEX,
               {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented UTF-8 JSON with a final newline, keys in the given order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _raw(tensor: TensorSource, name: str, shape: tuple[int, ...], dtype: str) -> memoryview:
    """The tensor's bytes as they go into the file."""
    array = tensor(name, shape, dtype)
    if array.shape != shape:
        raise CheckpointError(f"writing {name}: array of shape {list(array.shape)}, expected {dtype} {list(shape)}")
    return np.ascontiguousarray(array, NUMPY_DTYPES[dtype]).reshape(-1).view(np.uint8).data


def _config_json(config: ModelConfig, mtp: int, dspark: DSpark | None) -> dict[str, Any]:
    if dspark is None:
        return spec.config_json(config, mtp_layers=mtp)
    layers = config.num_hidden_layers
    return spec.config_json(config, mtp_layers=dspark.stages) | {
        "num_nextn_predict_layers": 1, "dspark_block_size": 5, "dspark_markov_rank": dspark.markov_rank,
        "dspark_noise_token_id": config.vocab_size - 1,
        "dspark_target_layer_ids": list(range(layers - dspark.targets, layers)),
    }  # fmt: skip


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id,
        "do_sample": True, "temperature": 1.0, "top_p": 1.0,
    }


def _tokenizer_config(config: ModelConfig, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    literals = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    bos, eos = literals[config.bos_token_id], literals[config.eos_token_id]
    return {
        "add_bos_token": False, "add_eos_token": False, "bos_token": bos, "eos_token": eos, "pad_token": eos,
        "clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None,
    }
