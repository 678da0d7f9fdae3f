"""Writes a checkpoint folder in DeepSeek's official V4-Flash layout: names, dtypes, shards, index, configs.

Shard 1 holds the embedding, then one shard per layer, one for the head, one per MTP block, as the original has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from appliance.errors import CheckpointError, UsageError
from appliance.model import ModelConfig
from exporter import spec
from exporter.inventory import Entry, expected_tensors
from exporter.safetensors_file import write_file

TensorSource = Callable[[str, tuple[int, ...], str], NDArray[Any]]


def write_checkpoint(
    out: Path, config: ModelConfig, tensor: TensorSource, *, mtp: int = 1, tokenizer: Mapping[str, Any] | None = None
) -> int:
    """Write every tensor of ``config``; returns the tensor bytes written.

    ``tensor(name, shape, dtype)`` gives the raw bits: uint8 for F8_E4M3, F8_E8M0 and I8 (packed FP4), uint16 for
    BF16, float32 for F32, int64 for I64. ``tokenizer`` is a tokenizer.json. Raises UsageError if ``out`` is not empty.
    """
    claim_folder(out)
    shards = _shards(expected_tensors(config, mtp=mtp))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = [(name, dtype, _checked(tensor, name, shape, dtype)) for name, (shape, dtype) in entries.items()]
        write_file(out / file, arrays)
        weight_map |= dict.fromkeys(entries, file)
        total_bytes += sum(array.nbytes for _, _, array in arrays)
    write_json(out / "model.safetensors.index.json",
               {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(out / "config.json", spec.config_json(config, mtp_layers=mtp))
    write_json(out / "generation_config.json", {
        "_from_model_config": True, "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id,
        "do_sample": True, "temperature": 1.0, "top_p": 1.0,
    })
    if tokenizer is not None:
        write_json(out / "tokenizer.json", tokenizer)
        write_json(out / "tokenizer_config.json", _tokenizer_config(config, tokenizer))
    return total_bytes


def claim_folder(out: Path) -> None:
    """Make the folder ``out``; raises UsageError if it holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty; name a new folder")
    out.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented UTF-8 JSON with a final newline, keys in the given order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _shards(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
    """Split by "embed", "layers.N", the top-level head, "mtp.N", in this order."""
    shards: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        parts = name.split(".")
        shard = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else "embed" if parts[0] == "embed" else "head"
        shards.setdefault(shard, {})[name] = entry
    return list(shards.values())


def _checked(tensor: TensorSource, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    array = tensor(name, shape, dtype)
    if array.shape != shape:
        raise CheckpointError(f"writing {name}: array of shape {list(array.shape)}, expected {dtype} {list(shape)}")
    return array


def _tokenizer_config(config: ModelConfig, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    literals = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    bos, eos = literals[config.bos_token_id], literals[config.eos_token_id]
    return {
        "add_bos_token": False, "add_eos_token": False, "bos_token": bos, "eos_token": eos, "pad_token": eos,
        "clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None,
    }
