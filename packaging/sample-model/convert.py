"""Between the training state and the official checkpoint layout: `python convert.py --work DIR --out checkpoint`.

Training rounded every weight to its stored format in each step, so writing loses nothing: every encoded tensor is
decoded again here and compared with the value the model was trained with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import model
import numpy as np
import torch
import train
from numpy.typing import NDArray

from exporter import codec, official
from exporter.checkpoint import Checkpoint
from exporter.spec import parse_config
from exporter.trainable.loading import load as load_view
from exporter.view import View

RAW_CONFIG: dict[str, Any] = {
    **train.CONFIG, "model_type": "deepseek_v4", "n_shared_experts": 1, "num_key_value_heads": 1,
}


class StateTensors:
    """Raw bits of one official tensor from the training state, as `official.write_checkpoint` asks for them."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.values = {n: train.rounded(n, p).numpy() for n, p in state["masters"].items()}
        self.values |= {n: b.numpy() for n, b in state["buffers"].items()}
        self.scales: dict[str, NDArray[Any]] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        if dtype == "F8_E8M0":
            return self.scales[name]
        value = self._value(name)
        if dtype in ("F32", "I64"):
            return value
        if dtype == "BF16":
            return self._same(name, value, codec.bf16_encode(value), codec.bf16_decode)
        pack = codec.fp4_quantize if dtype == "I8" else codec.fp8_block_quantize
        unpack = codec.fp4_dequantize if dtype == "I8" else codec.fp8_block_dequantize
        codes, scale = pack(value)
        self.scales[name.removesuffix(".weight") + ".scale"] = scale
        return self._same(name, value, codes, lambda bits: unpack(bits, scale))

    def _value(self, name: str) -> NDArray[Any]:
        if ".ffn.experts." not in name:
            return self.values[name]
        layer, _, rest = name.partition(".ffn.experts.")
        expert, part, _ = rest.split(".")
        return self.values[f"{layer}.ffn.{part}"][int(expert)]

    @staticmethod
    def _same(name: str, value: NDArray[Any], bits: NDArray[Any], decode: Any) -> NDArray[Any]:
        if not np.array_equal(decode(bits), value):
            raise SystemExit(f"{name}: the stored format does not hold the trained value exactly")
        return bits


def load(folder: Path) -> model.SampleModel:
    """The trainable module with the weights of an official checkpoint."""
    return load_view(View(Checkpoint.open(folder)))


@torch.no_grad()
def average(state: dict[str, Any], start: Path, mix: float) -> None:
    """The trained weights become (1 − mix) of those they began with and mix of their own."""
    before = dict(load(start).named_parameters())
    for name, trained in state["masters"].items():
        state["masters"][name] = torch.lerp(before[name].detach(), trained, mix)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder with state.pt and tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--start", type=Path, help="checkpoint the training state began with, to average with")
    parser.add_argument("--mix", type=float, default=1.0, help="share of the trained weights in that average")
    args = parser.parse_args()
    state = torch.load(args.work / "state.pt")
    if args.start:
        average(state, args.start, args.mix)
    tokenizer = json.loads((args.work / "tokenizer.json").read_text("utf-8"))
    config = parse_config(RAW_CONFIG, "config of the sample model")
    size_bytes = official.write_checkpoint(args.out, config, StateTensors(state), mtp=0, tokenizer=tokenizer)
    print(f"{args.out}: {size_bytes} tensor bytes, step {state['steps']}, {state['tokens']} tokens")


if __name__ == "__main__":
    main()
