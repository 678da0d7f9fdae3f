"""The reference model with one layer in memory: the layer's experts as stored bytes, made f32 one after the other.

Same maths as :class:`Reference`, which it extends; a layer runs over a batch of tokens from many sequences, so that
each expert is dequantised once a batch.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from appliance.errors import UsageError
from exporter import codec
from exporter import reference_math as ops
from exporter.checkpoint import dequantize
from exporter.codec import WEIGHT_BLOCK
from exporter.reference import Reference
from exporter.reference_state import LayerState, Trace, new_layer
from exporter.reference_weights import Arrangement
from exporter.safetensors_file import TensorInfo
from exporter.view import View

DEVICES = ("cpu", "cuda", "npu")
SCORE_ELEMENTS = 1 << 24  # attention scores [rows, heads, keys] of one step: 64 MiB
MAX_STEP_ROWS = 256
DEQUANTIZED_ROWS = 4096  # a multiple of WEIGHT_BLOCK

Stored = tuple[TensorInfo, NDArray[Any]]


class LayerReference(Reference):
    """A reference over ``view``. :meth:`release` after each layer keeps the process at one layer."""

    def __init__(
        self, view: View, *, act_sim: bool = False, kv_sim: bool = True, device: str = "cpu"
    ) -> None:
        super().__init__({}, view.config, act_sim=act_sim, kv_sim=kv_sim, arrangement=Arrangement.of(view))
        self.view, self.device = view, open_device(device)
        self._stored: dict[str, Stored] = {}

    def release(self) -> None:
        """Forget every weight read so far."""
        self._tensors.clear()
        self.release_stored()

    def release_stored(self) -> None:
        """Forget the experts' bytes, to be read again when needed."""
        self._stored.clear()

    def begin_batch(self, sequence_of: torch.Tensor) -> None:
        """Called before each batch goes through the experts: i64 [n], the sequence of each token."""

    def new_layer_state(self, layer: int) -> LayerState:
        """An empty sequence, as layer ``layer`` keeps it."""
        with self.device:
            return new_layer(self.config, self.config.compress_ratios[layer])

    def embed_rows(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [n] to S equal streams [n, S, D]; only the rows asked for become f32."""
        info, raw = self._store("embed.weight")
        rows = raw[ids.cpu().numpy()]
        values = torch.from_numpy(codec.bf16_decode(rows) if info.dtype == "BF16" else rows)
        return values[:, None].repeat(1, self.config.hc_mult, 1)

    def attention_rows(self, layer: int, streams: torch.Tensor, state: LayerState, start: int) -> None:
        """One sequence's streams [n, S, D] from position ``start`` through the attention, in place."""
        done = 0
        with self.device, torch.no_grad():
            while done < len(streams):
                rows = streams[done : done + self._step_rows(layer, start + done)]
                out = self._attention_half(
                    f"layers.{layer}", layer, rows.to(self.device), state, start + done, False, None
                )
                rows.copy_(out)
                done += len(rows)

    def experts_rows(self, layer: int, streams: torch.Tensor, ids: torch.Tensor) -> None:
        """Streams [n, S, D] of any sequences, tokens ids [n], through the experts, in place."""
        x = self.ffn_input(layer, streams)
        y = self.moe(layer, self.ffn_norm(layer, x), ids)
        self.ffn_output(layer, streams, y)

    def ffn_input(self, layer: int, streams: torch.Tensor) -> torch.Tensor:
        """Streams [n, S, D] collected to the experts' input [n, D], before ffn_norm; on the device."""
        with self.device, torch.no_grad():
            steps = [self._hc_pre(f"layers.{layer}.hc_ffn", rows.to(self.device))[0] for rows in _steps(streams)]
            return torch.cat(steps)

    def ffn_norm(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, D] normalised as router and experts see it."""
        with self.device, torch.no_grad():
            return self._norm(x, f"layers.{layer}.ffn_norm")

    def moe(self, layer: int, x: torch.Tensor, ids: torch.Tensor, trace: Trace | None = None) -> torch.Tensor:
        """Normalised x [n, D] to routed plus shared experts [n, D]."""
        with self.device, torch.no_grad():
            return self._moe(f"layers.{layer}.ffn", layer, x, ids.to(self.device), trace)

    def ffn_output(self, layer: int, streams: torch.Tensor, y: torch.Tensor) -> None:
        """Add the experts' output y [n, D] to streams [n, S, D], in place."""
        with self.device, torch.no_grad():
            for rows, y_rows in zip(_steps(streams), _steps(y), strict=True):
                held = rows.to(self.device)
                _, post, comb = self._hc_pre(f"layers.{layer}.hc_ffn", held)
                rows.copy_(self._cast(ops.hc_post(y_rows, held, post, comb)))

    def logits(self, streams: torch.Tensor) -> torch.Tensor:
        """Streams [n, S, D] after the last layer to logits f32 [n, vocab]."""
        with self.device, torch.no_grad():
            return self.head(streams.to(self.device)).cpu()

    def _step_rows(self, layer: int, position: int) -> int:
        """Rows of one attention step at ``position``: its scores stay within SCORE_ELEMENTS."""
        c, ratio = self.config, self.config.compress_ratios[layer]
        keys = c.sliding_window + MAX_STEP_ROWS + (position // ratio if ratio else 0)
        heads = max(c.num_attention_heads, c.index_n_heads if ratio == c.csa_ratio else 0)
        return min(MAX_STEP_ROWS, max(16, SCORE_ELEMENTS // (heads * keys)))

    def _w(self, name: str) -> torch.Tensor:
        """A weight as f32 on the device; a routed expert's is made anew each time."""
        if name in self._tensors:
            return self._tensors[name]
        if ".ffn.experts." in name:
            return torch.from_numpy(self._expert_f32(name)).to(self.device)
        if not self.view.has(name):
            raise KeyError(name)
        integer = self.view.info(name).dtype == "I64"
        array = self.view.read(name) if integer else self._dense_f32(name)
        self._tensors[name] = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return self._tensors[name]

    def _dense_f32(self, name: str) -> NDArray[np.float32]:
        """``name`` as f32, large matrices some rows at a time: the head's 2 GB are not needed twice."""
        info = self.view.info(name)
        if len(info.shape) != 2 or info.dtype not in ("BF16", "F8_E4M3", "I8"):
            return self.view.float32(name)
        raw, found = self.view.read(name), np.empty(_values_shape(info), np.float32)
        scale = f"{name.removesuffix('.weight')}.scale"
        scaled = None if info.dtype == "BF16" else (self.view.info(scale), self.view.read(scale))
        for at in range(0, len(raw), DEQUANTIZED_ROWS):
            rows = slice(at, at + DEQUANTIZED_ROWS)
            part = _rows(info, raw, rows)
            per_row = info.dtype == "I8"
            scales = rows if per_row else slice(at // WEIGHT_BLOCK, -(-(at + len(part[1])) // WEIGHT_BLOCK))
            found[rows] = dequantize(*part, None if scaled is None else _rows(*scaled, scales))
        return found

    def _expert_f32(self, name: str) -> NDArray[np.float32]:
        info, raw = self._store(name)
        return dequantize(info, raw, self._store(f"{name.removesuffix('.weight')}.scale"))

    def _store(self, name: str) -> Stored:
        """``name`` as stored, read once a layer."""
        if name not in self._stored:
            self._stored[name] = (self.view.info(name), self.view.read(name))
        return self._stored[name]

    def _frequency(self, compressed: bool) -> torch.Tensor:
        found: torch.Tensor = super()._frequency(compressed).to(self.device)
        return found


def open_device(name: str) -> torch.device:
    """The torch device "cpu", "cuda" or "npu" (imports torch_npu); UsageError if this machine has none."""
    if name not in DEVICES:
        raise UsageError(f"--device {name}: expected one of {', '.join(DEVICES)}")
    if name == "npu":
        try:
            importlib.import_module("torch_npu")
        except ImportError as error:
            raise UsageError(f"--device npu: torch_npu cannot be imported ({error}); install it or use cpu") from None
    module = getattr(torch, name)
    if not module.is_available():
        raise UsageError(f"--device {name}: torch finds none on this machine; use --device cpu")
    return torch.device(name)


def _rows(info: TensorInfo, raw: NDArray[Any], rows: slice) -> Stored:
    part = raw[rows]
    return replace(info, shape=part.shape), part


def _values_shape(info: TensorInfo) -> tuple[int, int]:
    rows, columns = info.shape
    return rows, columns * (2 if info.dtype == "I8" else 1)


def _steps(rows: torch.Tensor) -> list[torch.Tensor]:
    return [rows[at : at + MAX_STEP_ROWS] for at in range(0, len(rows), MAX_STEP_ROWS)]
