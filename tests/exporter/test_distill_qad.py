"""distill teacher and qad on a short random model: resumable, exact in what is written, nothing written untouched."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from view_support import random_ranking, short_checkpoint

from appliance.errors import CheckpointError, UsageError
from exporter.__main__ import main
from exporter.checkpoint import Checkpoint
from exporter.distill import cache as cache_module
from exporter.distill.cache import DRAWN, TOP, TeacherCache
from exporter.overlay import Overlay, OverlayWriter
from exporter.stage import StageFolder
from exporter.view import View
from exporter.view_arguments import learned_cut

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
KEPT, STEPS = 5, 3
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoint, ranking, texts and the teacher's cache."""
    path = tmp_path_factory.mktemp("distill")
    base = short_checkpoint(path / "checkpoint")
    random_ranking(base).write(path / "ranking.json")
    rng = np.random.default_rng(12)
    lines = [{"domain": "d", "ids": rng.integers(0, base.config.vocab_size, n).tolist()} for n in (40, 25, 60, 33, 48)]
    (path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert teacher(path, path / "teacher") == 0
    return path


def teacher(folder, out, *options):
    texts = f"{folder}/texts.jsonl"
    return main(["distill", "teacher", f"{folder}/checkpoint", "--texts", texts, "--out", f"{out}", *options])


def arguments(folder, out, *options, stage="qad"):
    return [
        "distill", stage, f"{folder}/checkpoint", "--ranking", f"{folder}/ranking.json", "--keep", f"{KEPT}",
        "--teacher", f"{folder}/teacher", "--texts", f"{folder}/texts.jsonl", "--out", f"{out}",
        "--steps", f"{STEPS}", "--batch", "2", "--lr", "1e-3", *options,
    ]  # fmt: skip


def student(folder):
    base = Checkpoint.open(folder / "checkpoint")
    return View(base, ranking=random_ranking(base), experts_kept=learned_cut(base.config, KEPT))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def trained(folder):
    assert main(arguments(folder, folder / "qad")) == 0
    return Overlay.open(folder / "qad")


def test_the_cache_is_the_references_distribution(folder):
    from exporter.reference import Reference

    base = Checkpoint.open(folder / "checkpoint")
    cache = TeacherCache.open(folder / "teacher")
    ids = json.loads((folder / "texts.jsonl").read_text("utf-8").splitlines()[2])["ids"]
    reference = Reference.from_checkpoint(base, kv_sim=True)
    logp = reference.forward(ids, reference.new_state()).log_softmax(-1).numpy()
    top, half, tail, threshold = cache.targets(2)
    assert cache.lengths == (40, 25, 60, 33, 48)
    near = np.abs(np.take_along_axis(logp, top, 1) - half).max(1)
    assert np.median(near) < 0.01  # single cache codes flip between two engines, so not every row
    assert np.allclose(np.exp(half[:, :TOP].astype(np.float32)).sum(1) + tail, 1, atol=2e-3)
    assert top.shape[1] == TOP + DRAWN
    assert (threshold > 0).all()


def test_layerwise_gives_the_same_cache(folder, tmp_path):
    assert teacher(folder, tmp_path / "layerwise", "--layerwise") == 0
    whole, layered = TeacherCache.open(folder / "teacher"), TeacherCache.open(tmp_path / "layerwise")
    assert not (tmp_path / "layerwise" / "work").exists()
    for sequence in range(5):
        first, second = whole.targets(sequence), layered.targets(sequence)
        assert np.median(np.abs(first[1][:, 0] - second[1][:, 0])) < 0.01
        assert np.mean(first[0][:, 0] == second[0][:, 0]) > 0.9


def test_a_killed_layerwise_cache_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PART_TOKENS", 50)
    assert teacher(folder, tmp_path / "calm", "--layerwise") == 0
    real = StageFolder.write_tensors

    def dying(self, piece, tensors):
        if piece == cache_module.part_name(1):
            raise KeyboardInterrupt
        real(self, piece, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(StageFolder, "write_tensors", dying)
        assert teacher(folder, tmp_path / "killed", "--layerwise") == 130
    assert list(bytes_of(tmp_path / "killed")) == [cache_module.part_name(0)]
    assert teacher(folder, tmp_path / "killed", "--layerwise") == 0
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "calm")


def test_cache_of_other_texts_is_refused(folder, tmp_path, capsys):
    other = tmp_path / "texts.jsonl"
    other.write_text('{"domain": "d", "ids": [1, 2, 3]}\n', "utf-8")
    line = arguments(folder, tmp_path / "out")
    line[line.index(f"{folder}/texts.jsonl")] = f"{other}"
    assert main(line) == UsageError.exit_code
    assert "other texts" in capsys.readouterr().err


def test_a_cache_of_the_format_before_is_refused(folder, tmp_path):
    copy = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", copy)
    closing = json.loads((copy / "teacher.json").read_text("utf-8"))
    (copy / "teacher.json").write_text(json.dumps(closing | {"format": 1}), "utf-8")
    with pytest.raises(CheckpointError, match=r"teacher\.json: not a teacher cache of format 2; run distill teacher"):
        TeacherCache.open(copy)


def test_a_damaged_part_is_named(folder, tmp_path):
    copy = tmp_path / "teacher"
    copy.mkdir()
    for path in (folder / "teacher").iterdir():
        (copy / path.name).write_bytes(path.read_bytes()[: -4 if path.suffix == ".safetensors" else None])
    with pytest.raises(CheckpointError, match="part_00000"):
        TeacherCache.open(copy)


def test_trained_tensors_are_in_their_formats(folder, trained):
    view = student(folder)
    assert trained.stage == "qad"
    assert trained.base_sha256 == view.recipe_sha256
    for name, info in trained.tensors.items():
        dense = ".attn.w" in name or "indexer.wq_b" in name or "shared_experts" in name
        expected = "I8" if dense and name.endswith(".weight") else view.info(name).dtype
        assert info.dtype == expected, name
    assert {"layers.1.attn.wq_b.weight", "layers.2.ffn.experts.0.w1.scale", "head.weight"} <= trained.tensors.keys()
    assert not any(name.startswith("mtp.") or "bias" in name or "tid2eid" in name for name in trained.tensors)
    assert not any(".indexer." in name and "wq_b" not in name for name in trained.tensors)


def test_written_values_are_what_the_module_ends_with(folder, trained, monkeypatch, tmp_path):
    from exporter.distill import qad_run
    from exporter.trainable.loading import load

    ended = {}
    real = qad_run._write

    def keep(view, trainer, *rest):
        ended.update({name: p.detach().clone() for name, p in trainer.parameters.items()})
        return real(view, trainer, *rest)

    monkeypatch.setattr(qad_run, "_write", keep)
    assert main(arguments(folder, tmp_path / "again")) == 0
    loaded = dict(load(student(folder).over(Overlay.open(tmp_path / "again"))).named_parameters())
    assert [name for name in ended if not torch.equal(ended[name], loaded[name])] == []
    assert bytes_of(tmp_path / "again") == bytes_of(folder / "qad")


def test_frozen_experts_stay_the_checkpoints(folder, tmp_path):
    assert main(arguments(folder, tmp_path / "dense", "--train", "dense", "--dense", "d8")) == 0
    overlay = Overlay.open(tmp_path / "dense")
    assert overlay.tensors
    assert not any(".experts." in n or n.startswith(("embed", "head")) or "norm" in n for n in overlay.tensors)
    assert {info.dtype for n, info in overlay.tensors.items() if n.endswith(".weight")} == {"F8_E4M3"}


def test_router_trains_router_rows_and_norms_only(folder, tmp_path):
    assert main(arguments(folder, tmp_path / "router", stage="router")) == 0
    overlay = Overlay.open(tmp_path / "router")
    assert overlay.stage == "router"
    assert any(name.endswith("gate.weight") for name in overlay.tensors)
    assert all(name.endswith(("gate.weight", "norm.weight")) for name in overlay.tensors)


def test_a_killed_run_goes_on_to_the_same_bytes(folder, trained, monkeypatch, tmp_path):
    from exporter.distill.training import Trainer

    real = Trainer.update

    def update(self, *rest):
        if self.step == STEPS - 1:
            raise KeyboardInterrupt
        return real(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        assert main(arguments(folder, tmp_path / "qad", "--save-every", "1")) == 130
    assert (tmp_path / "qad" / "training" / "state.safetensors").is_file()
    assert main(arguments(folder, tmp_path / "qad", "--save-every", "1")) == 0
    assert bytes_of(tmp_path / "qad") == bytes_of(folder / "qad")
    assert not (tmp_path / "qad" / "training").exists()


def test_another_recipe_in_the_same_folder_is_refused(folder, trained, capsys):
    assert main(arguments(folder, folder / "qad", "--seed", "9")) == UsageError.exit_code
    assert "seed" in capsys.readouterr().err


def test_training_lowers_the_divergence(folder, tmp_path):
    assert main(arguments(folder, tmp_path / "long", "--steps", "10", "--batch", "4")) == 0
    losses = json.loads((tmp_path / "long" / "overlay.json").read_text("utf-8"))["notes"]["kl_per_step"]
    assert len(losses) == 10
    assert losses[-1] < 0.9 * losses[0]


def test_nan_stops_naming_step_and_rate(folder, tmp_path, capsys):
    view = student(folder)
    writer = OverlayWriter(tmp_path / "bad", "heal", view.recipe_sha256, {})
    writer.add("head", [("hc_head_base", "F32", np.full(view.info("hc_head_base").shape, np.nan, np.float32))])
    writer.finish()
    assert main(arguments(folder, tmp_path / "out", "--overlay", f"{tmp_path}/bad")) == UsageError.exit_code
    assert "step 1 at lr 1.00e-03" in capsys.readouterr().err


def test_batches_come_once_an_epoch_and_from_the_seed():
    from exporter.distill.batches import Batches, pieces, share

    drawn = [number for step in range(4) for number in Batches(8, 2, 5).of(step)]
    assert sorted(drawn) == list(range(8))
    assert drawn != [number for step in range(4) for number in Batches(8, 2, 6).of(step)]
    lengths = [5, 9, 2, 7, 7]
    shares = [share(range(5), lengths, rank, 2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(5))
    assert pieces([1, 3, 4, 0, 2], lengths, 18) == [[1, 3], [4, 0], [2]]


def two_processes(line):
    """Exit codes of ``line`` run by two processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "exporter", *line], cwd=ROOT,
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    return [process.wait(timeout=240) for process in started]


def test_two_processes_give_what_one_gives(folder, tmp_path):
    line = arguments(folder, tmp_path / "two")
    assert two_processes(line) == [0, 0]
    assert two_processes(line) == [0, 0]  # finished: both say so and end
    assert two_processes([*line, "--seed", "9"]) == [UsageError.exit_code] * 2  # refused: neither waits for the other
    assert main(arguments(folder, tmp_path / "one", "--tokens-at-once", "1")) == 0  # a text at once, as each of the two
    one, two = (bytes_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) > 1
    assert one == two
