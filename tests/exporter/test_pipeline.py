"""``make``: which commands run in which order, what is skipped the second time, and where it stops."""

import dataclasses
import shlex
from pathlib import Path

import pytest

import exporter.__main__ as program
from exporter.checkpoint import Checkpoint
from exporter.evaluate.gates import default_bounds, judge
from exporter.evaluate.metrics import gate_measurements
from exporter.evaluate.quality import Quality
from exporter.plan.plan import Plan
from exporter.stage import write_json

TRUE_MAIN = program.main
CLOSED_BY = {"observe": "observe.json", "quantize": "overlay.json", "distill": "overlay.json", "build": "manifest.json"}


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """A card on which the tiny model fits whole."""
    path = tmp_path / "bench.yaml"
    source = (Path(program.__file__).parent / "plan" / "cards" / "300i-a2-32g.yaml").read_text("utf-8")
    path.write_text(source.replace("id: 300i-a2-32g", "id: bench"))
    return path


@pytest.fixture
def ran(monkeypatch) -> list[list[str]]:
    """Command lines that ran. All but ``plan`` and ``make`` are played: they leave what closes their folder."""
    lines: list[list[str]] = []

    def played(argv) -> int:
        words = list(argv)
        if words[0] in ("make", "plan"):
            lines.extend([words] if words[0] == "plan" else [])
            return TRUE_MAIN(words)
        lines.append(words)
        play(words)
        return 0

    monkeypatch.setattr(program, "main", played)
    return lines


def play(words: list[str]) -> None:
    out = Path(words[words.index("--out") + 1]) if "--out" in words else Path(words[2])
    if words[0] == "rank":
        write_json(out, {"words": words})
        return
    out.mkdir(exist_ok=True)
    if words[0] == "evaluate":
        bounds = default_bounds(pruned=True)
        gates = judge(bounds, gate_measurements({}), ())
        Quality("r", "s", {}, "x", {}, {}, gates, ()).write(out / "quality.json")
        return
    name = "teacher.json" if words[1] == "teacher" else CLOSED_BY[words[0]]
    write_json(out / name, {"words": words})


def make(tmp_path: Path, checkpoint: Path, card: Path, *more: str) -> int:
    texts = tmp_path / "texts.jsonl"
    if not texts.exists():
        texts.write_text('{"domain": "a", "ids": [1]}\n')
    needed = ["--card", str(card), "--texts", str(texts), "--encoding", "dsv4-0731", "--context", "4k"]
    return program.main(["make", str(checkpoint), str(tmp_path / "bundle"), *needed, *more])


def test_stages_in_order_each_printed_before_it_runs(tmp_path, tiny_checkpoint, card, ran, capsys):
    assert make(tmp_path, tiny_checkpoint, card, "--keep", "6", "--recover", "none", "--quantize", "mr-gptq") == 0
    assert [words[0] for words in ran] == ["plan", "observe", "rank", "quantize", "evaluate", "build"]
    work = tmp_path / "bundle.stages"
    by_name = {words[0]: shlex.join(words) for words in ran}
    view = f"{tiny_checkpoint} --ranking {work}/ranking.json --plan {work}/plan.json"
    assert "--hessian 4096" in by_name["observe"]
    assert f"quantize {view} --stats {work}/stats" in by_name["quantize"]
    assert "--mr-gptq" in by_name["quantize"]
    assert f"evaluate {view} --overlay {work}/quantized --texts" in by_name["evaluate"]
    assert f"--profile {work}/plan.json,{work}/quantized --quality {work}/quality/quality.json" in by_name["build"]
    out = capsys.readouterr().out
    printed = [line.removeprefix("$ solocard-export ") for line in out.splitlines() if line.startswith("$ ")]
    assert printed == [shlex.join(words) for words in ran]
    assert min(Plan.read(work / "plan.json").experts_kept) == 6
    assert "gates passed" in out.splitlines()[-2]


def test_what_is_done_is_skipped_and_what_changed_runs_again(tmp_path, tiny_checkpoint, card, ran, capsys):
    options = ["--keep", "6", "--recover", "none"]
    assert make(tmp_path, tiny_checkpoint, card, *options) == 0
    ran.clear()
    capsys.readouterr()
    assert make(tmp_path, tiny_checkpoint, card, *options) == 0
    assert ran == []
    assert capsys.readouterr().out.count(": done, ") == 6
    assert make(tmp_path, tiny_checkpoint, card, *options, "--waive", "top1=why not") == 0
    assert [words[0] for words in ran] == ["evaluate"]
    ran.clear()
    (tmp_path / "texts.jsonl").write_text('{"domain": "b", "ids": [1]}\n')
    assert make(tmp_path, tiny_checkpoint, card, *options) == 0
    assert [words[0] for words in ran] == ["observe", "evaluate"]
    ran.clear()
    write_json(tmp_path / "bundle.stages" / "quantized" / "overlay.json", {"another": 1})
    assert make(tmp_path, tiny_checkpoint, card, *options) == 0
    assert [words[0] for words in ran] == ["evaluate", "build"]


def test_it_stops_where_a_stage_fails_and_goes_on_there(tmp_path, tiny_checkpoint, card, ran, monkeypatch, capsys):
    played, codes = program.main, {"quantize": 7, "evaluate": 1}

    def failing(argv) -> int:
        code = codes.pop(argv[0], None)
        return played(argv) if code is None else code

    monkeypatch.setattr(program, "main", failing)
    options = ["--keep", "6", "--recover", "none"]
    assert make(tmp_path, tiny_checkpoint, card, *options) == 7
    assert [words[0] for words in ran] == ["plan", "observe", "rank"]
    assert "make stopped at quantized (exit 7); mend that and run the same make again" in capsys.readouterr().err
    assert make(tmp_path, tiny_checkpoint, card, *options) == 1
    assert [words[0] for words in ran] == ["plan", "observe", "rank", "quantize"]
    assert "a gate failed: keep more experts" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    assert make(tmp_path, tiny_checkpoint, card, *options) == 0
    assert [words[0] for words in ran] == ["plan", "observe", "rank", "quantize", "evaluate", "build"]


def test_a_model_that_fits_whole_is_not_healed(tmp_path, tiny_checkpoint, card, ran):
    assert make(tmp_path, tiny_checkpoint, card) == 0
    assert [words[0] for words in ran] == ["plan", "observe", "rank", "quantize", "evaluate", "build"]
    kept = Plan.read(tmp_path / "bundle.stages" / "plan.json").experts_kept
    assert set(kept) == {Checkpoint.open(tiny_checkpoint).config.n_routed_experts}


def test_dense_formats_as_they_are_need_no_quantize(tmp_path, tiny_checkpoint, card, ran):
    assert make(tmp_path, tiny_checkpoint, card, "--dense", "d8", "--head", "bf16") == 0
    assert [words[0] for words in ran] == ["plan", "observe", "rank", "evaluate", "build"]
    assert ran[-1][ran[-1].index("--profile") + 1] == str(tmp_path / "bundle.stages" / "plan.json")


def test_cut_hash_layers_bring_their_overlay(tmp_path, tiny_checkpoint, card, ran, monkeypatch):
    true_read = Plan.read
    monkeypatch.setattr(Plan, "read", lambda path: dataclasses.replace(true_read(path), hash_layers="cut"))
    assert make(tmp_path, tiny_checkpoint, card, "--keep", "6", "--recover", "none") == 0
    work, by_name = tmp_path / "bundle.stages", {words[0]: shlex.join(words) for words in ran}
    assert f"--overlay-out {work}/hash --plan {work}/plan.json" in by_name["rank"]
    assert f"--overlay {work}/hash --stats" in by_name["quantize"]
    assert f"--profile {work}/plan.json,{work}/hash,{work}/quantized" in by_name["build"]


@pytest.mark.parametrize(("recover", "order"), [
    ("heal", ["heal", "quantized"]), ("router", ["quantized", "router"]), ("qad", ["qad", "quantized"]),
])  # fmt: skip
def test_recovery_lies_where_it_belongs(tmp_path, tiny_checkpoint, card, ran, recover, order):
    options = ["--keep", "6", "--recover", recover, *(["--steps", "7"] if recover != "heal" else [])]
    assert make(tmp_path, tiny_checkpoint, card, *options) == 0
    work = tmp_path / "bundle.stages"
    profile = ran[-1][ran[-1].index("--profile") + 1]
    assert profile.split(",") == [str(work / name) for name in ("plan.json", *order)]
    trained = next(words for words in ran if words[:2] == ["distill", recover])
    laid = [trained[at + 1] for at, word in enumerate(trained) if word == "--overlay"]
    assert laid == [str(work / name) for name in order[: order.index(recover)]]
    if recover != "heal":
        assert trained[trained.index("--teacher") + 1] == str(work / "teacher")
        assert trained[trained.index("--steps") + 1] == "7"
    quantize = next(words for words in ran if words[0] == "quantize")
    assert quantize[quantize.index("--dense") + 1] == ("d8" if recover == "qad" else "d4")
