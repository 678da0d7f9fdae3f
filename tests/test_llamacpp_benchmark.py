"""benchmarks/llamacpp.py: the GGUF file by a reader of its own, and that damage is counted as what it is."""

from __future__ import annotations

import importlib
import os
import signal
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from exporter import codec
from exporter.checkpoint import Checkpoint

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    return load("llamacpp_measure")


def load(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        return importlib.import_module(name)


# -- the file --------------------------------------------------------------------------------------------------------


class Reader:
    """GGUF version 3 by the format's public description: keys {name: value}, tensors {name: array}."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        assert data[:4] == b"GGUF"
        self._at = 4
        version, tensors, keys = self._take("IQQ")
        assert version == 3
        self.keys = {self._text(): self._value(self._take("I")[0]) for _ in range(keys)}
        infos = [self._info() for _ in range(tensors)]
        start = -(-self._at // 32) * 32
        self.tensors = {name: self._tensor(shape, kind, start + offset) for name, shape, kind, offset in infos}

    def _take(self, code: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return values

    def _text(self) -> str:
        (length,) = self._take("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            inner, count = self._take("IQ")
            return [self._value(inner) for _ in range(count)]
        return self._take({4: "I", 6: "f", 7: "?"}[kind])[0]

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (rank,) = self._text(), self._take("I")
        dims = self._take(f"{rank}Q")
        kind, offset = self._take("IQ")
        assert offset % 32 == 0
        return name, dims[::-1], kind, offset

    def _tensor(self, shape: tuple[int, ...], kind: int, at: int) -> np.ndarray:
        dtype = {0: "<f4", 26: "<i4"}[kind]
        return np.frombuffer(self._data, dtype, int(np.prod(shape)), at).reshape(shape)


@pytest.fixture(scope="module")
def written(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    size_bytes = load("llamacpp_gguf").write_gguf(Checkpoint.open(tiny_checkpoint), out)
    assert size_bytes == out.stat().st_size
    return Reader(out.read_bytes())


def test_keys_are_the_config(written: Reader, tiny_checkpoint: Path) -> None:
    config = Checkpoint.open(tiny_checkpoint).config
    assert written.keys["general.architecture"] == "deepseek4"
    assert written.keys["deepseek4.attention.compress_ratios"] == list(config.compress_ratios)
    assert written.keys["deepseek4.attention.key_length"] == config.head_dim
    assert written.keys["deepseek4.rope.freq_base"] == config.rope_theta
    assert written.keys["deepseek4.expert_weights_scale"] == pytest.approx(config.routed_scaling_factor)
    assert written.keys["deepseek4.swiglu_clamp_exp"] == [config.swiglu_limit] * config.num_hidden_layers


def test_weights_are_exact(written: Reader, tiny_checkpoint: Path) -> None:
    """FP4 experts, FP8, BF16, F32 and token-to-expert rows, decoded here from the raw bytes."""
    source = Checkpoint.open(tiny_checkpoint)
    part = "layers.2.ffn.experts.3.w2"
    packed, scales = source.read(f"{part}.weight"), source.read(f"{part}.scale")
    values = codec.e2m1_decode(np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1))
    steps = np.exp2(np.repeat(scales.astype(np.float64), 32, 1) - 127)
    assert np.array_equal(written.tensors["blk.2.ffn_down_exps.weight"][3], (values * steps).astype(np.float32))
    codes, scales = source.read("layers.0.attn.wkv.weight"), source.read("layers.0.attn.wkv.scale")
    spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: codes.shape[0], : codes.shape[1]]
    fp8 = codec.e4m3_decode(codes) * np.exp2(spread.astype(np.float32) - 127)
    assert np.array_equal(written.tensors["blk.0.attn_kv.weight"], fp8)
    wide = source.read("embed.weight").astype(np.uint32) << 16
    assert np.array_equal(written.tensors["token_embd.weight"].view(np.uint32), wide)
    assert np.array_equal(written.tensors["blk.1.attn_sinks.weight"], source.read("layers.1.attn.attn_sink"))
    assert np.array_equal(written.tensors["blk.0.ffn_gate_tid2eid.weight"], source.read("layers.0.ffn.gate.tid2eid"))


def test_every_tensor_but_scales_and_drafts_is_there(written: Reader, tiny_checkpoint: Path) -> None:
    names = [n for n in Checkpoint.open(tiny_checkpoint).names if not n.startswith("mtp.") and not n.endswith(".scale")]
    experts = [n for n in names if ".ffn.experts." in n]
    layers = {n.split(".")[1] for n in experts}
    assert len(written.tensors) == len(names) - len(experts) + 3 * len(layers)


# -- the measurement -------------------------------------------------------------------------------------------------


class FakeSide:
    """A side whose state is the sum of its tokens, in one file: 8 bytes of it, and bytes nobody reads."""

    unit_tokens, size_bytes = 1, 64 << 10

    def start(self) -> list[float]:
        return [0.0]

    def feed(self, chat: list[float], ids: list[int]) -> np.ndarray:
        chat[0] += sum(ids)
        return np.array([chat[0]], np.float32)

    def step(self, chat: list[float], token: int) -> np.ndarray:
        return self.feed(chat, [token])

    def clear(self, chat: list[float]) -> None:
        chat[0] = 0.0

    def close(self, chat: list[float]) -> None: ...

    def saver(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "state"

    opened = saver

    def save(self, saver: Path, chat: list[float], ids: list[int]) -> None:
        saver.write_bytes(struct.pack("<d", chat[0]) * (self.size_bytes // 16) + b"\xff" * (self.size_bytes // 2))

    def restore(self, opened: Path, chat: list[float], ids: list[int]) -> Any:
        data = opened.read_bytes()
        if len(data) < self.size_bytes // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        sums = np.frombuffer(data[: self.size_bytes // 2], "<f8")
        restored = load("llamacpp_sides").Restored
        if len(data) != self.size_bytes:
            chat[0] = sums[0]  # half done
            return restored(0, "short")
        chat[0] = float(sums.mean())
        return restored(len(ids) - 1)

    def done(self, saver_or_opened: Path) -> None: ...


def test_exactness_and_cost_of_a_side_that_keeps_its_state(measure: ModuleType, tmp_path: Path) -> None:
    ids = list(range(1, 80))
    found = measure.exactness(FakeSide(), ids, 64, 8, tmp_path / "kept")
    assert (found["restored"], found["control"]) == (0.0, 0.0)
    cost = measure.cost(FakeSide(), ids, 64, 2, tmp_path / "kept")
    assert cost["bytes"] == FakeSide.size_bytes
    assert set(cost["seconds"]) >= {"save", "sync", "restore_cold", "restore_warm", "read_cold"}


def test_damage_is_counted_as_refused_wrong_same_or_death(measure: ModuleType, tmp_path: Path) -> None:
    side, ids, folder = FakeSide(), list(range(1, 69)), tmp_path / "kept"
    chat = side.start()
    side.feed(chat, ids[:64])
    measure.saved(side, chat, ids[:64], folder)
    found = measure.damage(side, ids, 64, 12, folder)
    zeroed = found["64 bytes zeroed"]
    assert zeroed["accepted_wrong"] > 0, "places in the first half change the state"
    assert zeroed["accepted_same"] > 0, "places in the second half are read by nobody"
    assert zeroed["accepted_wrong"] + zeroed["accepted_same"] == zeroed["tried"] == 12
    cut = found["truncated"]
    assert (cut["refused"], cut["died"], cut["reasons"]) == (2, 2, ["short"])
    assert cut["recomputed"] == 0.0
    assert folder.joinpath("state").stat().st_size == side.size_bytes, "only copies are damaged"
