"""The table of docs/quality.md in three minutes: the same commands on fewer tokens of the sample model, same gates.

Cut to half of the learned layers' experts, attention and shared experts in FP4, 40 steps of recovery; and the student
that was trained for longer and is kept beside the checkpoint, on the whole evaluation.
"""

import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.overlay import Overlay  # noqa: E402
from exporter.ranking import Ranking  # noqa: E402
from exporter.view import View  # noqa: E402
from exporter.view_arguments import learned_cut  # noqa: E402

pytestmark = pytest.mark.torch
SAMPLE = Path(__file__).resolve().parents[2] / "packaging" / "sample-model"
STEPS = 40
MAX_KL, MIN_TOP1, MAX_D4_KL = 0.03, 0.88, 0.012
LONGER_MAX_KL, LONGER_MIN_TOP1 = 0.02, 0.90
NOT_REACHED = (
    "measured: KL .074, top-1 .84 after 40 steps. The cut costs this model three times what it cost the one that the "
    "bounds come from (KL .126 before recovery, there .039)"
)


def load_script():
    """packaging/sample-model/distill.py as a module."""
    spec = importlib.util.spec_from_file_location("sample_model_distill", SAMPLE / "distill.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


distill = load_script()


def every(path: Path, out: Path, step: int) -> Path:
    """One line in ``step``: some of every domain."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[::step]), "utf-8")
    return out


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    work = tmp_path_factory.mktemp("distillation")
    texts = [every(SAMPLE / f"{name}.jsonl", work / f"{name}.jsonl", step)
             for name, step in (("calibration", 6), ("evaluation", 5))]  # fmt: skip
    bench = distill.Bench(work, SAMPLE / "checkpoint", *texts, texts[0], SAMPLE / "recovered")
    bench.observe()
    return bench


@pytest.fixture(scope="module")
def cut_d4(bench):
    """(row before recovery, view arguments, overlay)."""
    view = bench.rank("reap-mean")
    overlay = bench.overlay("cut-d4", ["quantize", *view], "--stats", bench.work / "stats", "--head", "bf16")
    return bench.row("before", "cut-d4", distill.laid(view, overlay), overlay), view, overlay


def test_the_texts_have_every_domain(bench):
    domains = {json.loads(line)["domain"] for line in bench.evaluation.read_text("utf-8").splitlines()}
    assert domains == {json.loads(line)["domain"] for line in bench.calibration.read_text("utf-8").splitlines()}
    assert len(domains) >= 3


def test_reap_cuts_better_than_chance(bench):
    reap, chance = (bench.row(score, score, bench.rank(score)) for score in ("reap-mean", "random"))
    assert reap.kl < chance.kl
    assert reap.top1 > chance.top1


def test_fp4_attention_alone_is_within_its_bound(bench):
    overlay = bench.overlay("d4", ["quantize", bench.checkpoint], "--stats", bench.work / "stats", "--head", "bf16")
    row = bench.row("D4", "d4", distill.laid([bench.checkpoint], overlay), overlay)
    assert 0 < row.kl <= MAX_D4_KL


def test_kept_experts_pass_through_untouched(bench, cut_d4):
    """Names by rank give the checkpoint's bytes of the expert with that rank, read by another library."""
    base, ranking = Checkpoint.open(bench.checkpoint), Ranking.read(bench.work / "reap-mean.json")
    kept = learned_cut(base.config, distill.KEEP)
    view = View(base, ranking=ranking, experts_kept=kept, overlays=[Overlay.open(cut_d4[2])])
    experts = [name for name in view.names if ".ffn.experts." in name]
    assert len(experts) == 6 * sum(kept)
    for name in experts:
        _, layer, _, _, rank, part = name.split(".", 5)
        official = f"layers.{layer}.ffn.experts.{ranking.orders[int(layer)][int(rank)]}.{part}"
        with safe_open(base.info(official).file, "pt") as file:
            raw = file.get_tensor(official).view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(b"".join(view.stream(name))).digest() == hashlib.sha256(raw).digest(), name


@pytest.fixture(scope="module")
def recovered(bench, cut_d4):
    """The row after 40 steps of QAD."""
    view = cut_d4[1]
    train = ["--texts", bench.calibration, "--teacher", bench.teacher(), "--steps", STEPS]
    overlay = bench.overlay("qad", ["distill", "qad", *view], *train)
    return bench.row("after", "qad", distill.laid(view, overlay), overlay)


def test_recovery_takes_back_a_quarter_at_least(cut_d4, recovered):
    """Measured: KL from .126 to .074, less in every domain."""
    before = cut_d4[0]
    assert recovered.kl <= 0.75 * before.kl
    assert recovered.top1 > before.top1
    domains = before.metrics["domains"]
    assert all(recovered.metrics["domains"][name]["kl_mean"] < domain["kl_mean"] for name, domain in domains.items())


@pytest.mark.xfail(strict=True, reason=NOT_REACHED)
def test_recovery_reaches_the_bounds(recovered):
    assert recovered.kl <= MAX_KL
    assert recovered.top1 >= MIN_TOP1


@pytest.fixture(scope="module")
def kept(bench):
    """The student of packaging/sample-model/recovered on every text of the evaluation."""
    whole = dataclasses.replace(bench, evaluation=SAMPLE / "evaluation.jsonl")
    return distill.recovered_row(whole)


def test_the_longer_recovery_reaches_the_bounds(kept):
    assert kept.metrics["total"]["tokens"] == 15_066
    assert kept.kl <= LONGER_MAX_KL
    assert kept.top1 >= LONGER_MIN_TOP1


def test_it_was_trained_as_documented_and_on_none_of_the_evaluation():
    """What is kept was ranked like the table's rows, cut to half, all linears in FP4, on other texts."""
    view, first, second = distill.recovered_view(SAMPLE / "checkpoint", SAMPLE / "recovered")
    assert view[view.index("--keep") + 1] == distill.KEEP
    evaluated = hashlib.sha256((SAMPLE / "evaluation.jsonl").read_bytes()).hexdigest()
    for folder, steps in ((first, 1600), (second, 900)):
        recipe = json.loads((folder / "recipe.json").read_text("utf-8"))
        assert (recipe["steps"], recipe["dense"], recipe["train"]) == (steps, "d4", "all")
        assert recipe["texts_sha256"] != evaluated
    base = View(Checkpoint.open(SAMPLE / "checkpoint"), ranking=Ranking.read(SAMPLE / "recovered" / "ranking.json"),
                experts_kept=learned_cut(Checkpoint.open(SAMPLE / "checkpoint").config, distill.KEEP))  # fmt: skip
    student = base.over(Overlay.open(first)).over(Overlay.open(second))
    experts = [name for name in student.names if ".ffn.experts." in name and name.endswith(".weight")]
    linears = [name for name in student.names if ".attn.w" in name and name.endswith(".weight")]
    assert 0 < len(experts) == 3 * sum(learned_cut(base.config, distill.KEEP))
    assert linears
    assert {student.info(name).dtype for name in (*experts, *linears)} == {"I8"}
