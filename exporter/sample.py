"""``solocard-export sample``: a random checkpoint in the official layout, equal bytes for equal seeds. numpy only.

Weights are scaled so that activations stay near 1 through all layers, attention and router scores are spread, and
logits have a standard deviation near 2. Quantised weights are drawn as codes, not rounded from floats.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import UsageError
from appliance.model import ModelConfig
from exporter import codec, inventory, sample_tokenizer
from exporter.official import write_checkpoint
from exporter.presets import MTP_BLOCKS, PRESETS, V4_FLASH, preset
from exporter.progress import Progress

_FP8_SPREAD = 112.0  # largest standard deviation of E4M3 codes: 4 of them reach 448
_FP4_SPREAD = 2.4
DRAFTS = ("none", "mtp", "dspark")
_FAST_BYTES = 1 << 20  # above: drawn by the byte
_SILENT_BYTES = 256 << 20  # above: shows progress
_GAINS = {"head": 2.0, "gate": 2.0, "w1": 1.5, "w3": 1.5, "hc": 0.7}  # times 1/sqrt(inputs); others 1


def write_sample(
    out: Path, preset_name: str, seed: int = 0, *, experts: int | None = None, draft: str | None = None
) -> int:
    """Write the checkpoint of ``preset_name`` ("tiny", "kv-true", "slice") to the empty folder ``out``; its bytes.

    ``experts`` replaces the preset's routed experts a layer, ``draft`` ("none", "mtp", "dspark") its draft stages, as
    the first release ("mtp") or the 0731 refresh ("dspark") has them. UsageError if ``out`` is not empty, the preset is
    unknown or a token could not choose its experts.
    """
    config = preset(preset_name)
    if experts is not None:
        config = dataclasses.replace(config, n_routed_experts=_allowed(config, experts))
    mtp = MTP_BLOCKS[preset_name] if draft is None else int(draft == "mtp")
    return write_random(out, config, seed, mtp=mtp, dspark=inventory.DSpark() if draft == "dspark" else None)


def _allowed(config: ModelConfig, experts: int) -> int:
    if not config.num_experts_per_tok <= experts <= V4_FLASH.n_routed_experts:
        least, most = config.num_experts_per_tok, V4_FLASH.n_routed_experts
        raise UsageError(f"--experts {experts}: expected {least} (experts per token) to {most}")
    return experts


def write_random(
    out: Path, config: ModelConfig, seed: int = 0, *, mtp: int = 1, dspark: inventory.DSpark | None = None
) -> int:
    """A random checkpoint of any config, with a tokenizer where the vocabulary has room for one."""
    room = sample_tokenizer.text_capacity(config.vocab_size) >= 256
    tokenizer = sample_tokenizer.build(config.vocab_size) if room else None
    total_bytes = inventory.size_bytes(inventory.expected_tensors(config, mtp=mtp, dspark=dspark))
    progress = Progress("sample", total_bytes) if total_bytes > _SILENT_BYTES else None
    weights = RandomWeights(config, seed)
    report = progress.add if progress else None
    return write_checkpoint(out, config, weights.tensor, mtp=mtp, dspark=dspark, tokenizer=tokenizer, report=report)


def add_command(subparsers: Any) -> None:
    """Add ``sample``; its ``func`` returns the exit code."""
    parser = subparsers.add_parser("sample", help="write a random checkpoint in the official layout")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="size (default: tiny)")
    parser.add_argument("--experts", type=int, metavar="N", help="routed experts a layer (default: the preset's)")
    parser.add_argument("--draft", choices=DRAFTS, help="draft stages: first release's or 0731's")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal bytes (default: 0)")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    total_bytes = write_sample(args.out, args.preset, args.seed, experts=args.experts, draft=args.draft)
    layers = preset(args.preset).num_hidden_layers
    print(f"wrote {args.out}: preset {args.preset}, {layers} layers, {total_bytes} tensor bytes, random weights")
    return 0


class RandomWeights:
    """Raw bits of any tensor by name; each depends on the seed, its name and its shape alone.

    FP8 and FP4 tensors above 1 MiB are drawn faster: one random byte a stored byte, so 256 FP8 quantiles in place of
    65,536, and 16 a FP4 code.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config, self._seed = config, seed

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """Raw bits of ``name`` (uint8, uint16, float32 or int64) with ``shape``."""
        draw = np.random.Generator(np.random.PCG64([self._seed, zlib.crc32(name.encode())]))
        if dtype == "I64":
            keys = draw.random((shape[0], self._config.n_routed_experts))
            return np.asarray(np.argsort(keys, axis=1)[:, : shape[1]], np.int64)
        if dtype == "F8_E8M0":
            return self._scales(draw, name, shape)
        if dtype in ("F8_E4M3", "I8") and math.prod(shape) > _FAST_BYTES:
            return self._fast(draw, name, shape, dtype)
        numbers = draw.integers(0, 1 << 16, shape if dtype != "I8" else (shape[0], 2 * shape[1]), np.uint16)
        if dtype == "F8_E4M3":
            codes: NDArray[Any] = _e4m3_codes(_spread(self._deviation(name), _FP8_SPREAD))[numbers]
            return codes
        if dtype == "I8":
            return codec.fp4_pack(_e2m1_codes(_spread(self._deviation(name), _FP4_SPREAD))[numbers])
        return self._plain(name, dtype, _normal()[numbers])

    def _fast(self, draw: np.random.Generator, name: str, shape: tuple[int, ...], dtype: str) -> codec.U8:
        """Random bytes through a 256-entry table: near the speed of the generator."""
        size_bytes = math.prod(shape)
        words = draw.integers(0, 1 << 64, -(-size_bytes // 8), np.uint64)
        numbers = words.view(np.uint8)[:size_bytes].tobytes()
        if dtype == "F8_E4M3":
            table = codec.e4m3_encode(_quantiles(256) * np.float32(_spread(self._deviation(name), _FP8_SPREAD)))
        else:
            nibble = codec.e2m1_encode(_quantiles(16) * np.float32(_spread(self._deviation(name), _FP4_SPREAD)))
            table = codec.fp4_pack(np.stack(np.meshgrid(nibble, nibble), -1)).reshape(-1)
        return np.frombuffer(numbers.translate(table.tobytes()), np.uint8).reshape(shape)

    def _plain(self, name: str, dtype: str, normal: codec.F32) -> NDArray[Any]:
        """F32 and BF16 tensors: norms near 1, mHC scales at 1, the rest around 0."""
        if name.endswith("norm.weight"):
            values = 1 + normal * np.float32(0.1)
        elif name.endswith("_scale"):
            values = 1 + normal * np.float32(0.05)
        else:
            values = normal * np.float32(self._deviation(name))
        return codec.bf16_encode(values) if dtype == "BF16" else values

    def _scales(self, draw: np.random.Generator, name: str, shape: tuple[int, ...]) -> codec.U8:
        """E8M0 bytes: the exponent that brings the codes to their deviation, or one less, half of each."""
        experts = ".experts." in name
        deviation = self._deviation(name)
        exponent = round(np.log2(deviation / _spread(deviation, _FP4_SPREAD if experts else _FP8_SPREAD)))
        return codec.e8m0_encode(exponent - draw.integers(0, 2, shape, np.int32))

    def _deviation(self, name: str) -> float:
        """Standard deviation of a weight: gain / sqrt(inputs), fixed values for embedding, biases and sinks."""
        c = self._config
        part = name.removesuffix(".weight").removesuffix(".scale").rsplit(".", 1)[-1]
        fixed = {"embed": 1.0, "bias": 0.1, "attn_sink": 1.0, "ape": 0.5}
        if part in fixed or part.endswith("_base"):
            return fixed.get(part, 0.5)
        inputs = {
            "wq_b": c.q_lora_rank, "wo_a": c.num_attention_heads * c.head_dim // c.o_groups,
            "wo_b": c.o_groups * c.o_lora_rank, "w2": c.moe_intermediate_size,
        }.get(part, c.hc_mult * c.hidden_size if part.startswith("hc_") else c.hidden_size)
        gain = _GAINS.get("hc" if part.startswith("hc_") else part, 1.0)
        return float(gain / inputs**0.5)


def _normal() -> codec.F32:
    """The 65,536 quantiles of the normal distribution: indexed by random u16, no libm in the draw."""
    return _quantiles(65536)


@functools.cache
def _quantiles(count: int) -> codec.F32:
    """``count`` equally likely values of the normal distribution, ascending."""
    inverse = statistics.NormalDist().inv_cdf
    return np.array([inverse((i + 0.5) / count) for i in range(count)], np.float32)


def _spread(deviation: float, largest: float) -> float:
    """The code deviation in (largest/2, largest] that a power of two brings to ``deviation``."""
    return float(deviation * 2.0 ** np.floor(np.log2(largest / deviation)))


@functools.cache
def _e4m3_codes(spread: float) -> codec.U8:
    return codec.e4m3_encode(_normal() * np.float32(spread))


@functools.cache
def _e2m1_codes(spread: float) -> codec.U8:
    return codec.e2m1_encode(_normal() * np.float32(spread))
