"""``evaluate`` on the tiny checkpoint against the whole-model reference and torch's kl_div; killed, it goes on."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from appliance.errors import EngineError, UsageError  # noqa: E402
from exporter.__main__ import main  # noqa: E402
from exporter.calibration import read_texts  # noqa: E402
from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.evaluate import walks  # noqa: E402
from exporter.evaluate.measure import SCORES, Measurement, Question  # noqa: E402
from exporter.evaluate.quality import Quality  # noqa: E402
from exporter.layer_reference import LayerReference  # noqa: E402
from exporter.reference import Reference  # noqa: E402
from exporter.reference_state import Trace  # noqa: E402
from exporter.stage import StageFolder  # noqa: E402
from exporter.view import View  # noqa: E402
from exporter.view_arguments import learned_cut  # noqa: E402

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
QUICK = ["--needles", "1", "--answers", "2", "--answer-tokens", "3"]


@pytest.fixture(scope="module")
def views(tiny_checkpoint: Path) -> tuple[View, View]:
    """The teacher, and a student that lost half its learned experts."""
    base = Checkpoint.open(tiny_checkpoint)
    return View(base), View(base, experts_kept=learned_cut(base.config, base.config.n_routed_experts // 2))


@pytest.fixture(scope="module")
def texts(views, tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.Generator(np.random.PCG64(5))
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"domain": domain, "ids": draw.integers(2, views[0].config.vocab_size, count).tolist()}
             for domain, count in (("a", 70), ("b", 33), ("a", 21))]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluate(views, texts: Path, out: Path, *more: str) -> int:
    teacher, student = views
    cut = ["--keep", str(student.experts_kept[-1])] if student is not teacher else []
    return main(["evaluate", str(teacher.path), *cut, "--texts", str(texts), "--out", str(out), *QUICK, *more])


@pytest.fixture(scope="module")
def evaluated(views, texts, tmp_path_factory) -> tuple[Path, int]:
    out = tmp_path_factory.mktemp("evaluated") / "quality"
    return out, evaluate(views, texts, out, "--needle-lengths", "64", "--by", "R. Engineer")


def whole(view: View, ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits [n, V] and the streams after every layer, by the whole-model reference."""
    model, trace = Reference.from_view(view, kv_sim=True), Trace()
    with torch.no_grad():
        logits = model.forward(list(ids), model.new_state(), trace=trace)
    return logits, [torch.cat(trace.block_outputs[layer]) for layer in sorted(trace.block_outputs)]


def test_metrics_agree_with_torch_on_the_whole_model(views, texts, evaluated):
    metrics = Quality.read(evaluated[0] / "quality.json").metrics
    kls, same, losses, streams = [], [], [], ([], [])
    for text in read_texts(texts, views[0]):
        (teacher, teacher_streams), (student, student_streams) = (whole(view, text.ids) for view in views)
        p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
        kls.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        same.append(teacher.argmax(-1) == student.argmax(-1))
        losses.append(-q[:-1].gather(1, torch.tensor(text.ids)[1:, None]))
        streams[0].append(torch.stack(teacher_streams, 1))
        streams[1].append(torch.stack(student_streams, 1))
    total, (theirs, ours) = metrics["total"], (torch.cat(part).double() for part in streams)
    assert total["kl_mean"] == pytest.approx(float(torch.cat(kls).mean()), rel=1e-3)
    assert total["kl_mean"] > 1e-3
    assert total["top1"] == pytest.approx(float(torch.cat(same).double().mean()), abs=0.02)
    assert total["student_ppl"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    errors = (ours - theirs).transpose(0, 1).flatten(1).norm(dim=1) / theirs.transpose(0, 1).flatten(1).norm(dim=1)
    assert metrics["layer_error"] == pytest.approx(errors.tolist(), rel=1e-3, abs=1e-6)
    assert metrics["layer_error"][-1] > 0.01


def test_quality_names_what_was_measured(views, evaluated):
    out, code = evaluated
    quality = Quality.read(out / "quality.json")
    teacher, student = views
    assert code == 1
    assert quality.failed_gates
    assert quality.recipe_sha256 == student.recipe_sha256
    assert quality.source_sha256 == teacher.source_sha256
    assert quality.teacher["recipe_sha256"] == teacher.recipe_sha256
    assert quality.metrics["student"]["experts_kept"] == list(student.experts_kept)
    assert len(quality.code["exporter_sha256"]) == 64
    assert {row["tokens"] for row in quality.metrics["needles"]} == {64}
    assert quality.metrics["generation"]["answers"] == 2
    assert quality.metrics["not_measured"] == {"lengths": "no text has 256 tokens"}
    assert not (out / "work").exists()
    assert f"FAILED: {', '.join(quality.failed_gates)}" in (out / "report.md").read_text()


def test_judging_again_measures_nothing_again(views, texts, evaluated, monkeypatch, capsys):
    out, _ = evaluated
    monkeypatch.setattr(walks, "run_walk", None)
    failed = Quality.read(out / "quality.json").failed_gates
    waive = [word for name in failed for word in ("--waive", f"{name}=a test of {name}")]
    options = ["--needle-lengths", "64", "--by", "R. Engineer"]
    assert evaluate(views, texts, out, *options, *waive) == 0
    assert Quality.read(out / "quality.json").waived_gates == failed
    assert f"a test of {failed[0]}" in (out / "report.md").read_text()
    assert evaluate(views, texts, out, *options, "--gate", "top1=0", *waive[2:]) == 1
    capsys.readouterr()
    assert evaluate(views, texts, out, "--needle-lengths", "66") == 2
    assert "was made by another recipe (needles:" in capsys.readouterr().err


def test_a_model_against_itself_loses_nothing(views, texts, tmp_path):
    gates = [word for name in ("needle_loss", "length_ppl_increase") for word in ("--waive", f"{name}=not measured")]
    assert evaluate((views[0], views[0]), texts, tmp_path / "same", "--needles", "0", *gates) == 0
    metrics = Quality.read(tmp_path / "same" / "quality.json").metrics
    assert metrics["total"]["kl_max"] == 0
    assert metrics["total"]["top1"] == 1
    assert set(metrics["layer_error"]) == {0.0}
    assert metrics["generation"]["greedy_agreement"] == 1


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_killed_it_goes_on_to_the_same_numbers(views, texts, tmp_path, monkeypatch, calls):
    question = Question(*views, read_texts(texts, views[0]), [], [], 0, 1)
    whole_run = Measurement(question, StageFolder(tmp_path / "whole", {"a": 1}), tmp_path / "work-whole").metrics()
    true, left = LayerReference.experts_rows, [calls]

    def killed(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return true(self, *arguments)

    def cut() -> Measurement:
        return Measurement(question, StageFolder(tmp_path / "cut", {"a": 1}), tmp_path / "work-cut")

    monkeypatch.setattr(LayerReference, "experts_rows", killed)
    with pytest.raises(KilledError):
        cut().metrics()
    left[0] = 10**6
    assert cut().metrics() == whole_run
    layers = views[0].config.num_hidden_layers
    assert 10**6 - left[0] == 2 * layers - calls
    scores = [(tmp_path / name / SCORES).read_bytes() for name in ("whole", "cut")]
    assert scores[0] == scores[1]


def test_the_teachers_part_serves_the_next_student(views, texts, tmp_path, monkeypatch):
    work = tmp_path / "work"
    assert evaluate(views, texts, tmp_path / "one", "--work", str(work)) == 1
    assert [path.name.partition("-")[0] for path in work.iterdir()] == ["teacher"]
    walked, true = [], LayerReference.experts_rows

    def counted(self, layer, *arguments):
        walked.append(self.view.recipe_sha256)
        return true(self, layer, *arguments)

    monkeypatch.setattr(LayerReference, "experts_rows", counted)
    other = View(views[0].base, experts_kept=learned_cut(views[0].config, views[1].experts_kept[-1] + 1))
    assert evaluate((views[0], other), texts, tmp_path / "two", "--work", str(work)) == 1
    assert set(walked) == {other.recipe_sha256}


def test_logits_that_are_no_numbers_are_named():
    good = np.zeros((2, 3), np.float32)
    bad = good.copy()
    bad[1, 1] = np.nan
    with pytest.raises(EngineError, match="student's logits of sequence 0 from token 0 are not all finite"):
        walks.score([(0, 0, good)], [(0, 0, bad)], [[1, 2]])
    with pytest.raises(EngineError, match="remove the work folder"):
        walks.score([(0, 0, good)], [(0, 1, good)], [[1, 2]])


@pytest.mark.parametrize(("option", "message"), [
    (["--gate", "kl=1"], "gate 'kl' is not known"), (["--waive", "top1="], "say why"),
    (["--waive", "top1=a", "--waive", "top1=b"], "named twice"), (["--needles", "-1"], "--needles -1"),
    (["--needle-lengths", "1k"], "--needle-lengths 1k"), (["--answer-tokens", "0"], "--answer-tokens 0"),
])  # fmt: skip
def test_wrong_options_are_one_line(views, texts, tmp_path, capsys, option, message):
    assert evaluate(views, texts, tmp_path / "out", *option) == UsageError.exit_code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_waiver_without_a_known_user_asks_for_by(views, texts, tmp_path, capsys, monkeypatch):
    def nobody():
        raise KeyError("getpwuid(): uid not found: 4242")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert evaluate(views, texts, tmp_path / "out", "--waive", "top1=a") == UsageError.exit_code
    assert "give --by NAME" in capsys.readouterr().err
