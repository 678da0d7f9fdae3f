"""The quantize stage: one layer in memory, one shard a layer; killed anywhere it goes on to the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import UsageError
from exporter.codec import WEIGHT_BLOCK, bf16_decode, fp8_block_dequantize
from exporter.overlay import Overlay, OverlayWriter
from exporter.progress import Progress
from exporter.quantize import schemes
from exporter.quantize.dense import LINEARS, Method, quantize_linear, wanted
from exporter.quantize.fp8 import band_to_fp8
from exporter.stage import code_version, read_json, write_json
from exporter.statistics import Statistics
from exporter.view import View

HEAD = "head.weight"
Tensors = list[tuple[str, str, NDArray[Any]]]
Errors = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Options:
    """What to do. ``only``: glob patterns of linears, none = all."""

    dense: bool
    head: bool
    method: Method
    only: tuple[str, ...] = ()
    statistics: Path | None = None


def quantize(view: View, options: Options, out: Path) -> Overlay:
    """Write the overlay of ``view`` to ``out``. UsageError for statistics of another checkpoint or nothing to do."""
    statistics = None if options.statistics is None else Statistics.open(options.statistics)
    if statistics is not None:
        statistics.check_source(view.source_sha256, view.path)
    layers = {layer: names for layer in range(view.config.num_hidden_layers) if (names := _names(view, layer, options))}
    head = options.head and view.info(HEAD).dtype == "BF16"
    if not layers and not head:
        raise UsageError(f"{view.path}: nothing to quantize: no FP8 linear that --only takes, and no BF16 head")
    writer = OverlayWriter(out, "quantize", view.recipe_sha256, _recipe(options, statistics))
    weights = {layer: sum(math.prod(view.info(f"{n}.weight").shape) for n in names) for layer, names in layers.items()}
    head_weights = math.prod(view.info(HEAD).shape) if head else 0
    progress = Progress("quantize", sum(weights.values()) + head_weights, "weights")
    errors: Errors = {}
    for layer, names in layers.items():
        shard = f"layer_{layer:03d}"
        errors |= _shard(writer, out, shard, weights[layer], progress,
                         lambda names=names: _layer(view, names, options.method, statistics))
    if head:
        errors |= _shard(writer, out, "head", head_weights, progress, lambda: _head(view))
    rotated = {name: options.method.block for names in layers.values() for name in names if options.method.block}
    return writer.finish(rotated=rotated, notes=_notes(options, errors, head))


def summary(overlay: Overlay) -> list[str]:
    """The overlay for a person: errors by kind of linear over the layers."""
    notes: Mapping[str, Any] = read_json(overlay.path / "overlay.json")["notes"]
    lines = [f"wrote {overlay.path}: {notes['linears']} linears by {notes['method']}"
             + (", head FP8" if notes["head"] else "")]
    errors: Errors = notes["errors"]
    for part in (*LINEARS, "head"):
        found = {name: error for name, error in errors.items() if name == part or name.endswith(f".{part}")}
        found = {n: e for n, e in found.items() if not (part == "attn.wq_b" and ".indexer." in n)}
        if found:
            lines.append(_line(part, found))
    return lines


def _line(part: str, errors: Errors) -> str:
    kind = "output" if all("output" in error for error in errors.values()) else "weight"
    worst = max(errors, key=lambda name: errors[name][kind])
    mean = sum(error[kind] for error in errors.values()) / len(errors)
    where = f", most {errors[worst][kind]:.5f} in {worst.split('.')[1]}" if len(errors) > 1 else ""
    return f"  {part:24} {kind} error {mean:.5f} of the mean square{where}"


def _names(view: View, layer: int, options: Options) -> list[str]:
    return list(wanted(view, layer, options.only)) if options.dense else []


def _recipe(options: Options, statistics: Statistics | None) -> dict[str, Any]:
    return {
        "dense": "d4" if options.dense else "d8", "head": "fp8" if options.head else "bf16",
        "method": asdict(options.method), "only": list(options.only),
        "statistics_sha256": "" if statistics is None else statistics.sha256,
    }  # fmt: skip


def _shard(writer: OverlayWriter, out: Path, shard: str, weights: int, progress: Progress, make: Any) -> Errors:
    """One shard and, before it, its errors: whatever is there of an earlier run is whole."""
    beside = out / f"{shard}.json"
    if writer.has(shard) and beside.is_file():
        progress.resume(weights)
        kept: Errors = read_json(beside)["errors"]
        return kept
    tensors, errors = make()
    write_json(beside, {"errors": errors})
    writer.add(shard, tensors)
    progress.add(shard, weights)
    found: Errors = errors
    return found


def _layer(view: View, names: list[str], method: Method, statistics: Statistics | None) -> tuple[Tensors, Errors]:
    tensors: Tensors = []
    errors: Errors = {}
    for name in names:
        made = quantize_linear(view, name, method, statistics)
        tensors += [(f"{name}.weight", "I8", made.codes), (f"{name}.scale", "F8_E8M0", made.scales)]
        errors[name] = {"weight": made.weight_error}
        if made.output_error is not None:
            errors[name]["output"] = made.output_error
    return tensors, errors


def _head(view: View) -> tuple[Tensors, Errors]:
    rows, columns = view.info(HEAD).shape
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((-(-rows // WEIGHT_BLOCK), -(-columns // WEIGHT_BLOCK)), np.uint8)
    lost = whole = 0.0
    for number, (part, bits) in enumerate(_bands(view, rows, columns)):
        codes[part], scales[number] = band_to_fp8(bits, name=HEAD)
        w = bf16_decode(bits)
        back: NDArray[np.float32] = fp8_block_dequantize(codes[part], scales[number : number + 1])
        lost += float(np.square(w - back, dtype=np.float64).sum())
        whole += float(np.square(w, dtype=np.float64).sum())
    tensors: Tensors = [(HEAD, "F8_E4M3", codes), ("head.scale", "F8_E8M0", scales)]
    return tensors, {"head": {"weight": lost / max(whole, 1e-300)}}


def _bands(view: View, rows: int, columns: int) -> Iterator[tuple[slice, NDArray[np.uint16]]]:
    """128 rows of the head at a time: the whole is 1 GB for the real model."""
    pieces = view.stream(HEAD, WEIGHT_BLOCK * columns * 2)
    for start, piece in zip(range(0, rows, WEIGHT_BLOCK), pieces, strict=True):
        bits = np.frombuffer(piece, "<u2").reshape(-1, columns).astype(np.uint16)
        yield slice(start, start + len(bits)), bits


def _notes(options: Options, errors: Errors, head: bool) -> dict[str, Any]:
    method = options.method
    weighted = ", weighted by activations" if options.statistics is not None and method.kind == "rtn" else ""
    label = {"rtn": f"best of 3 scales{weighted}", "gptq": "GPTQ", "mr-gptq": f"MR-GPTQ, block {method.block}"}
    used = [schemes.MXFP4] if options.dense else []
    used += [schemes.FP8_BLOCK] if head else []
    return {
        "method": label[method.kind], "linears": len(errors) - head, "head": head, "errors": errors,
        "schemes": {scheme.dtype: scheme.preset for scheme in used}, "code": code_version(),
    }  # fmt: skip


