"""`make` as a user runs it, on the tiny checkpoint: observe → rank → plan → heal → quantize → evaluate → build, then
sign → trust → install → verify; the engine's logits of the profile are those of the reference on the student's view."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from e2e_support import appliance, command  # noqa: E402

import exporter  # noqa: E402
from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.engine_process import engine_logits  # noqa: E402
from exporter.evaluate.gates import NAMES  # noqa: E402
from exporter.evaluate.quality import Quality  # noqa: E402
from exporter.overlay import Overlay  # noqa: E402
from exporter.parity import Parity  # noqa: E402
from exporter.plan.plan import Plan  # noqa: E402
from exporter.ranking import Ranking  # noqa: E402
from exporter.reference import Reference  # noqa: E402
from exporter.view import View  # noqa: E402

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
KEEP = 5  # of 8 experts in the layers with a learned router
PROFILE = "bench-4k"


@dataclasses.dataclass(frozen=True)
class Release:
    """What `make` left: the bundle, the folder of its stages, and what it printed the first and the second time."""

    checkpoint: Path
    bundle: Path
    stages: Path
    first: str
    second: str

    def view(self) -> View:
        plan = Plan.read(self.stages / "plan.json")
        view = View(Checkpoint.open(self.checkpoint), ranking=Ranking.read(self.stages / "ranking.json"),
                    experts_kept=plan.experts_kept)  # fmt: skip
        for name in ("heal", "quantized"):
            view = view.over(Overlay.open(self.stages / name))
        return view


@pytest.fixture(scope="module")
def release(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("made")
    draw = np.random.Generator(np.random.PCG64(11))
    vocab = Checkpoint.open(tiny_checkpoint).config.vocab_size
    for name, counts in (("calibration", (90, 60, 70, 80, 50, 40)), ("evaluation", (50, 40))):
        lines = [{"domain": "ab"[at % 2], "ids": draw.integers(2, vocab, n).tolist()} for at, n in enumerate(counts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cards = Path(exporter.__file__).parent / "plan" / "cards"
    card = (cards / "300i-a2-32g.yaml").read_text("utf-8").replace("id: 300i-a2-32g", "id: bench")
    (folder / "bench.yaml").write_text(card)
    make = [
        "exporter", "make", tiny_checkpoint, folder / "bundle", "--card", folder / "bench.yaml", "--context", "4k",
        "--keep", KEEP, "--texts", folder / "calibration.jsonl", "--evaluation", folder / "evaluation.jsonl",
        "--encoding", "dsv4-0731",
    ]  # fmt: skip
    stopped = command(*make, code=1, OMP_NUM_THREADS="1")
    assert "make stopped at evaluate (exit 1); a gate failed" in stopped.stderr
    assert not (folder / "bundle").exists()
    waive = [word for name in NAMES for word in ("--waive", f"{name}=random weights, random texts")]
    done = command(*make, *waive, code=0, OMP_NUM_THREADS="1")
    return Release(tiny_checkpoint, folder / "bundle", folder / "bundle.stages", stopped.stdout, done.stdout)


def test_each_stage_was_shown_and_none_ran_twice(release):
    ran = [line.split()[2] for line in release.first.splitlines() if line.startswith("$ ")]
    assert ran == ["plan", "observe", "rank", "distill", "quantize", "evaluate"]
    assert [line.split()[2] for line in release.second.splitlines() if line.startswith("$ ")] == ["evaluate", "build"]
    assert release.second.count(": done, ") == 5
    assert "gates passed" in release.second
    assert f"made {release.bundle}; report: {release.stages}/quality/report.md" in release.second


def test_the_bundle_carries_the_quality_of_exactly_this_student(release):
    view, quality = release.view(), Quality.read(release.stages / "quality" / "quality.json")
    assert view.experts_kept[-1] == KEEP
    assert quality.recipe_sha256 == view.recipe_sha256
    assert quality.failed_gates == ()
    assert quality.waived_gates
    assert quality.recipe_sha256 in (release.bundle / "quality.json").read_text()
    assert "random weights, random texts" in (release.bundle / "quality.json").read_text()


def test_the_engine_gives_the_students_logits(release):
    ids = np.random.Generator(np.random.PCG64(3)).integers(2, release.view().config.vocab_size, 300).tolist()
    model = Reference.from_view(release.view(), kv_sim=True)
    with torch.no_grad():
        expected = model.forward(ids, model.new_state()).numpy()
    found = Parity.of(expected, engine_logits(release.bundle, [ids], profile=PROFILE)[0])
    assert found.passed("kv-v4"), found
    full = Parity.of(expected, engine_logits(release.bundle, [ids])[0])
    assert full.mean_kl > 100 * found.mean_kl


def test_kept_experts_are_the_checkpoints_bytes(release):
    """Each record of a layer's object begins with the codes of w1, w3, w2 of the expert with that rank."""
    view, objects = release.view(), {}
    for path in (release.bundle / "objects").rglob("*"):
        if path.is_file():
            objects.setdefault(path.stat().st_size, []).append(path.read_bytes())
    for layer, order in enumerate(view.ranking.orders):
        records = []
        for official in order:
            name = f"layers.{layer}.ffn.experts.{official}"
            parts = [view.base.read(f"{name}.{w}.{kind}") for kind in ("weight", "scale") for w in ("w1", "w3", "w2")]
            records.append(b"".join(part.tobytes() for part in parts))
        padded = -(-len(records[0]) // 4096) * 4096
        wanted = b"".join(record.ljust(padded, b"\0") for record in records)
        digests = {hashlib.sha256(data).hexdigest() for data in objects[len(wanted)]}
        assert hashlib.sha256(wanted).hexdigest() in digests, f"layer {layer}"


def test_signed_it_installs_with_its_profile_and_verifies(release, keys, tmp_path):
    command("exporter", "sign", release.bundle, "--keys", keys)
    with appliance(tmp_path / "home") as machine:
        config = machine.home / "config.yaml"
        config.write_text(f"{config.read_text()}engine:\n  profile: {PROFILE}\n")
        machine.solocard("trust", "add", keys / "root.json", "--yes")
        installed = machine.told("install", release.bundle)["bundle_id"]
        machine.solocard("verify")
        assert machine.told("status")["current"] == installed
