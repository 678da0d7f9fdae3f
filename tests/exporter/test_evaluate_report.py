"""Needles in constructed logits, loops, plots that parse, and a report that names what failed."""

import argparse
import json
from xml.etree import ElementTree

import numpy as np
import pytest

from appliance.errors import CheckpointError, UsageError
from exporter.evaluate import gates, generation, svg
from exporter.evaluate.command import add_commands
from exporter.evaluate.metrics import compare, gate_measurements
from exporter.evaluate.needle import DEPTHS, Needle, build_needles, recall
from exporter.evaluate.quality import Quality
from exporter.evaluate.report import write_report

VOCAB = 300


def copying_logits(ids: tuple[int, ...], reach: int) -> np.ndarray:
    """A "model" that says what followed the last equal four ids within ``reach`` tokens, else id 0."""
    rows = np.zeros((len(ids), VOCAB), np.float32)
    rows[:, 0] = 1.0
    last: dict[tuple[int, ...], int] = {}
    for at in range(3, len(ids)):
        context = ids[at - 3 : at + 1]
        if at - last.get(context, -reach) < reach:
            rows[at] = 0.0
            rows[at, ids[last[context] + 1]] = 5.0
        last[context] = at
    return rows


def needle_scores(needle: Needle, teacher_reach: int, student_reach: int):
    both = [copying_logits(needle.ids, reach) for reach in (teacher_reach, student_reach)]
    return compare(*both, [*needle.ids[1:], -1])


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_needles_are_found_where_the_model_can_see(with_tokenizer):
    encode = (lambda text: [3 + byte for byte in text.encode()]) if with_tokenizer else None
    haystack = [int(i) for i in np.random.Generator(np.random.PCG64(0)).integers(270, VOCAB, 5000)]
    needles = build_needles(haystack, [128, 512], 3, vocab_size=270, encode=encode)
    rows = recall(needles, [needle_scores(needle, 10_000, 200) for needle in needles])
    assert [(row["tokens"], row["depth"]) for row in rows] == [(n, d) for n in (128, 512) for d in DEPTHS]
    assert all(row["teacher_found"] == row["needles"] == 3 for row in rows)
    seen = {(row["tokens"], row["depth"]): row["student_found"] for row in rows}
    assert {seen[128, depth] for depth in DEPTHS} == {3}
    assert [seen[512, depth] for depth in DEPTHS] == [0, 0, 0, 3, 3]
    assert gate_measurements({"needles": rows})["needle_loss"] == 0.6
    lost = [row for row in rows if row["student_found"] == 0]
    assert all(row["student_logprob"] < row["teacher_logprob"] - 1 for row in lost)


def test_a_needle_lies_at_its_depth_and_ends_the_sequence():
    needles = build_needles([1], [100], 1, vocab_size=270, encode=None)
    for needle in needles:
        key_and_value = needle.ids[-7:]
        first = next(at for at in range(94) if needle.ids[at : at + 7] == key_and_value)
        assert len(needle.ids) == 100
        assert first == round(needle.depth * (100 - 14))
        assert needle.value_tokens == 3
    assert needles == build_needles([1], [100], 1, vocab_size=270, encode=None)
    with pytest.raises(UsageError, match="--needle-lengths 10: no room for a needle of 14 tokens"):
        build_needles([1], [10], 1, vocab_size=270, encode=None)


class Cycle:
    """Says (last + step) mod 50 for ever; ``late`` of it forgets after so many tokens."""

    def __init__(self, step: int, late: int = 10_000) -> None:
        self.step, self.late = step, late

    def new_state(self):
        return []

    def forward(self, ids, state):
        rows = np.zeros((len(ids), 50), np.float32)
        for row, token in zip(rows, ids, strict=True):
            state.append(token)
            row[(token + (self.step if len(state) < self.late else 0)) % 50] = 4.0
        return _Rows(rows)


class _Rows(np.ndarray):
    """An array with torch's ``numpy()``."""

    def __new__(cls, array):
        return np.asarray(array).view(cls)

    def numpy(self):
        return np.asarray(self)


def test_answers_are_compared_up_to_the_first_difference():
    beginnings = generation.prompts([tuple(range(at, at + 40)) for at in range(5)], 3)
    assert beginnings == [tuple(range(at, at + 32)) for at in (0, 2, 4)]
    found = generation.measured({"teacher": Cycle(1), "student": Cycle(1, late=32 + 8)}, beginnings, 64, eos=-1)
    assert found["answers"] == 3
    assert found["greedy_agreement"] == 8 / 32
    assert (found["teacher_loops"], found["student_loops"], found["loop_increase"]) == (0.0, 1.0, 1.0)
    equal = np.log(np.exp(4) + 49) - 4
    assert found["teacher_nll"] == pytest.approx(equal, rel=1e-5)
    assert found["student_nll"] == pytest.approx((8 * equal + 24 * (equal + 4)) / 32, rel=1e-5)
    assert found["continuation_nll_increase"] == pytest.approx(3.0, rel=1e-5)


def test_an_answer_ends_with_the_end_token():
    assert generation.greedy(Cycle(1), [5], 10, eos=8) == [6, 7, 8]


@pytest.mark.parametrize("text", [
    svg.bars("<b> & \"q\"", ["a<b", "c&d"], {"x": [0.1, 0.0], "y": [-2.0, 3e-9]}, y_label="nats"),
    svg.bars("one", ["only"], {"x": [0.0]}, y_label=""),
    svg.lines("line", [256, 512, 1024], {"a": [5, 4.5, 4], "b": [5, 6, 1e7]}, x_label="tokens", y_label="ppl",
              log_x=True, from_zero=False),
    svg.lines("flat", [0], {"a": [2.0]}, x_label="", y_label=""),
    svg.lines("many", range(43), {"a": [0.01 * at for at in range(43)]}, x_label="layer", y_label="error"),
])  # fmt: skip
def test_plots_are_well_formed_and_inside_their_page(text):
    page = ElementTree.fromstring(text)  # noqa: S314
    space = "{http://www.w3.org/2000/svg}"
    assert page.tag == f"{space}svg"
    assert "prefers-color-scheme: dark" in text
    for bar in page.iter(f"{space}rect"):
        assert float(bar.get("height")) >= 0
        top = float(bar.get("y", 0))
        assert 0 <= top <= top + float(bar.get("height")) <= svg.HEIGHT + 1
    for line in page.iter(f"{space}polyline"):
        points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        assert all(0 <= x <= svg.WIDTH and 0 <= y <= svg.HEIGHT for x, y in points)


def test_bar_heights_follow_the_values():
    page = ElementTree.fromstring(svg.bars("t", ["a", "b"], {"x": [1.0, 4.0]}, y_label=""))  # noqa: S314
    heights = [float(r.get("height")) for r in page.iter("{http://www.w3.org/2000/svg}rect")
               if r.get("class", "").startswith("bar s0")]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.5)


def domain(kl: float, increase: float) -> dict[str, float]:
    ppl = {"teacher_ppl": 10.0, "student_ppl": 10.0 * (1 + increase), "ppl_increase": increase}
    return {"tokens": 100, "kl_mean": kl, "kl_p50": kl / 2, "kl_p99": 9 * kl, "top1": 0.9, **ppl}


def quality_of(waivers=(), **bounds) -> Quality:
    found = {
        "total": domain(0.1, 0.05), "domains": {"code": domain(0.05, 0.01), "p|rose": domain(0.15, 0.09)},
        "layer_error": [0.0, 0.1, 0.4], "lengths": [], "needles": [], "generation": None,
        "not_measured": {"lengths": "too short", "needles": "none asked", "generation": "too large"},
        "student": {"experts_kept": [16, 8, 8], "overlays": ["quantize abc"]},
    }  # fmt: skip
    judged = gates.judge(gates.default_bounds(pruned=True) | bounds, gate_measurements(found), waivers)
    return Quality("r" * 64, "s" * 64, {}, "x" * 64, {"version": "1"}, found, judged, waivers)


def test_the_report_names_what_failed_what_was_lost_and_who_waived(tmp_path):
    waiver = gates.Waiver("kl_mean", "customer | agreed", "R. Engineer")
    quality = quality_of((waiver,))
    quality.write(tmp_path / "quality.json")
    (tmp_path / "lengths.svg").write_text("old")
    text = write_report(tmp_path).read_text()
    assert quality.failed_gates
    for name in quality.failed_gates:
        assert name in text.splitlines()[2]
        assert any(f"`{name}`" in line and ("FAILED" in line or "NOT MEASURED" in line) for line in text.splitlines())
    assert "| `kl_mean` | yes | R. Engineer | customer \\| agreed |" in text
    assert "1 waived (kl_mean)" in text
    assert "Most was lost in `p|rose` (KL 0.15" in text
    assert "at layer 2 (relative error +0.3)" in text
    assert "Not measured: too large." in text
    assert "16 in 1 layer, 8 in 2 layers" in text
    assert not (tmp_path / "lengths.svg").exists()
    plots = {path.name for path in tmp_path.glob("*.svg")}
    assert plots == {"kl_by_domain.svg", "perplexity.svg", "layers.svg"}
    assert all(f"]({name})" in text for name in plots)
    for name in plots:
        ElementTree.parse(tmp_path / name)  # noqa: S314


def run_report(folder, capsys) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(["report", str(folder)])
    code = args.func(args)
    return code, *capsys.readouterr()


def test_report_command_ends_with_1_while_a_gate_fails(tmp_path, capsys):
    quality_of().write(tmp_path / "quality.json")
    code, out, err = run_report(tmp_path, capsys)
    assert code == 1
    assert "FAILED        kl_mean" in out
    assert "--waive kl_mean=" in err
    waivers = tuple(gates.Waiver(name, "a test", "me") for name in gates.NAMES)
    quality_of(waivers).write(tmp_path / "quality.json")
    code, out, err = run_report(tmp_path, capsys)
    assert (code, err) == (0, "")
    assert "failed, waived" in out
    (tmp_path / "quality.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match="recipe_sha256"):
        run_report(tmp_path, capsys)
