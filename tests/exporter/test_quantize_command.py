"""``solocard-export quantize``: what the overlay holds, what it refuses, and that a kill changes nothing."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from quantize_support import write_statistics

from exporter import codec
from exporter.__main__ import main
from exporter.checkpoint import Checkpoint
from exporter.overlay import Overlay
from exporter.quantize.dense import LINEARS
from exporter.view import View


@pytest.fixture(scope="module")
def statistics(tiny_checkpoint, tmp_path_factory):
    return write_statistics(tiny_checkpoint, tmp_path_factory.mktemp("statistics") / "stats")


@pytest.fixture(scope="module")
def plain(tiny_checkpoint, tmp_path_factory):
    """An overlay without statistics."""
    out = tmp_path_factory.mktemp("overlays") / "plain"
    assert main(["quantize", str(tiny_checkpoint), "--out", str(out)]) == 0
    return Overlay.open(out)


def fails(capsys, *arguments) -> str:
    """The one line that the command ends with."""
    code = main(["quantize", *map(str, arguments)])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert line.startswith("solocard: ")
    return line


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_every_dense_linear_and_the_head_and_nothing_else(tiny_checkpoint, plain):
    base = Checkpoint.open(tiny_checkpoint)
    expected = {"head.weight", "head.scale"}
    for layer in range(base.config.num_hidden_layers):
        linears = [p for p in LINEARS if base.has(f"layers.{layer}.{p}.weight")]
        assert len(linears) >= 8
        expected |= {f"layers.{layer}.{p}.{end}" for p in linears for end in ("weight", "scale")}
    assert set(plain.tensors) == expected
    assert not plain.rotated
    assert plain.stage == "quantize"


def test_values_are_near_the_checkpoints(tiny_checkpoint, plain):
    base = View(Checkpoint.open(tiny_checkpoint))
    view = base.over(plain)
    for part in ("attn.wq_a", "attn.wo_a", "ffn.shared_experts.w2"):
        name = f"layers.1.{part}.weight"
        rows, columns = base.info(name).shape
        assert view.info(name).dtype == "I8"
        assert view.info(name).shape == (rows, columns // 2)
        w, rounded = base.float32(name), view.float32(name)
        assert 0 < np.square(w - rounded).sum() / np.square(w).sum() < 0.03
    assert view.info("head.weight").dtype == "F8_E4M3"
    np.testing.assert_allclose(view.float32("head.weight"), base.float32("head.weight"), rtol=2**-4, atol=1e-3)


def test_untouched_tensors_are_the_checkpoints(tiny_checkpoint, plain):
    base = View(Checkpoint.open(tiny_checkpoint))
    view = base.over(plain)
    experts = [n for n in view.names if ".ffn.experts." in n]
    assert experts
    for name in [*experts[:6], *experts[-6:], "embed.weight", "layers.0.attn_norm.weight"]:
        assert not view.touched(name)
        assert b"".join(view.stream(name)) == b"".join(base.stream(name))


def test_statistics_bring_the_outputs_nearer(tiny_checkpoint, statistics, tmp_path, capsys):
    errors = {}
    for kind in ([], ["--gptq"], ["--mr-gptq", "--block", "32"], ["--gptq", "--act-order"]):
        out = tmp_path / "-".join(["w", *kind])
        common = ["--stats", str(statistics), "--head", "bf16", "--only", "layers.2.*", "--out", str(out)]
        arguments = ["quantize", str(tiny_checkpoint), *common]
        assert main([*arguments, *kind]) == 0
        notes = json.loads((out / "overlay.json").read_text())["notes"]
        errors[" ".join(kind)] = np.mean([e["output"] for e in notes["errors"].values()])
        assert "output error" in capsys.readouterr().out
        assert notes["schemes"] == {"I8": "MXFP4A16"}
        rotated = Overlay.open(out).rotated
        assert set(rotated.values()) == ({32} if "--mr-gptq" in kind else set())
        assert len(rotated) == (notes["linears"] if "--mr-gptq" in kind else 0)
    assert errors["--gptq"] < 0.8 * errors[""]
    assert errors["--gptq --act-order"] < 0.8 * errors[""]
    assert errors["--mr-gptq --block 32"] < 0.8 * errors[""]


def test_a_rotated_overlay_gives_the_linear_back(tiny_checkpoint, statistics, tmp_path):
    out = tmp_path / "rotated"
    main(["quantize", str(tiny_checkpoint), "--stats", str(statistics), "--mr-gptq", "--only", "attn.wq_a",
          "--head", "bf16", "--out", str(out)])  # fmt: skip
    base = View(Checkpoint.open(tiny_checkpoint))
    view = base.over(Overlay.open(out))
    name = "layers.2.attn.wq_a"
    assert view.rotation(name) == 64
    w = base.float32(f"{name}.weight")
    back = codec.hadamard(view.float32(f"{name}.weight").reshape(len(w), -1, 64)).reshape(w.shape)
    assert np.corrcoef(back.ravel(), w.ravel())[0, 1] > 0.97
    assert np.corrcoef(view.float32(f"{name}.weight").ravel(), w.ravel())[0, 1] < 0.5


def test_hessians_in_blocks_are_taken(tiny_checkpoint, tmp_path):
    statistics = write_statistics(tiny_checkpoint, tmp_path / "stats", most_columns=64)
    out = tmp_path / "out"
    arguments = ["--stats", str(statistics), "--gptq", "--head", "bf16", "--only", "attn.w*", "--out", str(out)]
    assert main(["quantize", str(tiny_checkpoint), *arguments]) == 0
    assert set(Overlay.open(out).tensors) <= set(View(Checkpoint.open(tiny_checkpoint)).names)


def test_what_is_fp4_already_is_left_alone(tiny_checkpoint, plain, tmp_path, capsys):
    arguments = [tiny_checkpoint, "--overlay", plain.path, "--out", tmp_path / "again"]
    assert "nothing to quantize" in fails(capsys, *arguments)
    half = tmp_path / "half"
    only = ["--only", "layers.0.*", "--head", "bf16"]
    assert main(["quantize", str(tiny_checkpoint), *only, "--out", str(half)]) == 0
    assert {name.split(".")[1] for name in Overlay.open(half).tensors} == {"0"}
    rest = tmp_path / "rest"
    assert main(["quantize", str(tiny_checkpoint), "--overlay", str(half), "--out", str(rest)]) == 0
    assert not {name for name in Overlay.open(rest).tensors if name.startswith("layers.0.")}
    assert "head.weight" in Overlay.open(rest).tensors


def test_head_alone(tiny_checkpoint, tmp_path):
    out = tmp_path / "head"
    assert main(["quantize", str(tiny_checkpoint), "--dense", "d8", "--out", str(out)]) == 0
    assert set(Overlay.open(out).tensors) == {"head.weight", "head.scale"}


def test_wrong_arguments_are_named(tiny_checkpoint, statistics, tmp_path, capsys):
    ckpt, out = tiny_checkpoint, ["--out", tmp_path / "x"]
    assert "need --stats" in fails(capsys, ckpt, *out, "--gptq")
    assert "--block is the Hadamard block" in fails(capsys, ckpt, *out, "--block", "32")
    assert "--act-order is an order of" in fails(capsys, ckpt, *out, "--act-order")
    assert "leaves nothing to do" in fails(capsys, ckpt, *out, "--dense", "d8", "--head", "bf16")
    assert "--dense d8 leaves every linear" in fails(capsys, ckpt, *out, "--dense", "d8", "--only", "attn.*")
    assert "--only attn.wqa: matches no linear" in fails(capsys, ckpt, *out, "--only", "attn.wqa")
    bare = write_statistics(ckpt, tmp_path / "bare", hessians=False)
    line = fails(capsys, ckpt, *out, "--gptq", "--stats", bare)
    assert "layers.0.attn.wq_a: no Hessian in the statistics; run `observe --hessian" in line


def test_statistics_of_another_checkpoint_are_refused(tiny_checkpoint, statistics, tmp_path, capsys):
    other = tmp_path / "stats"
    other.mkdir()
    for file in statistics.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    raw = json.loads((other / "observe.json").read_text())
    (other / "observe.json").write_text(json.dumps(raw | {"source_sha256": "0" * 64}))
    line = fails(capsys, tiny_checkpoint, "--stats", other, "--out", tmp_path / "out")
    assert "was observed on another checkpoint" in line


def test_nan_in_the_checkpoint_is_named(tiny_checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    info = Checkpoint.open(broken).info("layers.1.attn.wkv.weight")
    data = bytearray(info.file.read_bytes())
    data[info.offset + 7] = 0xFF
    info.file.write_bytes(data)
    assert main(["quantize", str(broken), "--out", str(tmp_path / "out")]) == 3
    assert "layers.1.attn.wkv.weight: holds NaN" in capsys.readouterr().err


def test_the_same_command_again_writes_nothing_new(tiny_checkpoint, plain):
    before = digests(plain.path)
    assert main(["quantize", str(tiny_checkpoint), "--out", str(plain.path)]) == 0
    assert digests(plain.path) == before


def test_another_recipe_is_refused_by_field(tiny_checkpoint, plain, capsys):
    assert "head: fp8 there, bf16 asked" in fails(capsys, tiny_checkpoint, "--head", "bf16", "--out", plain.path)


def test_killed_anywhere_it_ends_with_the_same_bytes(tiny_checkpoint, statistics, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["quantize", str(tiny_checkpoint), "--stats", str(statistics), "--only", "attn.w*", "--gptq", "--out"]
    assert main([*arguments, str(whole)]) == 0
    for pieces in (1, 3):
        process = subprocess.Popen(
            [sys.executable, "-m", "exporter", *arguments, str(killed)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while len(list(killed.glob("*.safetensors"))) < pieces and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (killed / "layer_002.safetensors.partial").write_bytes(b"torn")
    assert main([*arguments, str(killed)]) == 0
    assert digests(killed) | {"layer_002.safetensors.partial": ""} == digests(whole) | {
        "layer_002.safetensors.partial": ""
    }
