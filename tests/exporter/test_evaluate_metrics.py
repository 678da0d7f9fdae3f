"""Metrics against sums written out by hand, gates at and beyond their bounds, waivers, quality.json."""

import argparse
import json
import math

import numpy as np
import pytest

from appliance.errors import CheckpointError, UsageError
from exporter.evaluate import gates, metrics
from exporter.evaluate.command import add_commands
from exporter.evaluate.quality import Quality


def random_logits(rows: int, vocab: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.Generator(np.random.PCG64(seed))
    teacher = draw.normal(0, 3, (rows, vocab)).astype(np.float32)
    return teacher, teacher + draw.normal(0, 0.5, (rows, vocab)).astype(np.float32)


def by_hand(teacher: np.ndarray, student: np.ndarray, following: list[int]) -> list[tuple[float, bool, float, float]]:
    """(KL, same top-1, both losses) of each row with Python's own floats."""
    found = []
    for p_row, q_row, target in zip(teacher.tolist(), student.tolist(), following, strict=True):
        p_sum, q_sum = (math.fsum(math.exp(x) for x in row) for row in (p_row, q_row))
        p, q = [math.exp(x) / p_sum for x in p_row], [math.exp(x) / q_sum for x in q_row]
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        same = p_row.index(max(p_row)) == q_row.index(max(q_row))
        losses = (-math.log(p[target]), -math.log(q[target])) if target >= 0 else (math.nan, math.nan)
        found.append((kl, same, *losses))
    return found


@pytest.mark.parametrize("chunk_numbers", [1, 40, 1 << 22])
def test_token_scores_are_the_formulas(monkeypatch, chunk_numbers):
    monkeypatch.setattr(metrics, "MAX_CHUNK_NUMBERS", chunk_numbers)
    teacher, student = random_logits(9, 13, seed=1)
    following = [3, 0, 12, 5, 5, 1, 7, 2, -1]
    scores = metrics.compare(teacher, student, following)
    for at, (kl, same, teacher_nll, student_nll) in enumerate(by_hand(teacher, student, following)):
        assert scores.kl[at] == pytest.approx(kl, rel=1e-5)
        assert scores.same_top1[at] == same
        assert scores.teacher_nll[at] == pytest.approx(teacher_nll, rel=1e-5, nan_ok=True)
        assert scores.student_nll[at] == pytest.approx(student_nll, rel=1e-5, nan_ok=True)
    assert scores.teacher_hit.tolist() == [int(row.argmax()) == t for row, t in zip(teacher, following, strict=True)]


def test_summary_and_domains():
    teacher, student = random_logits(400, 11, seed=2)
    ids = [int(i) for i in np.random.Generator(np.random.PCG64(3)).integers(0, 11, 400)]
    following = [*ids[1:], -1]
    hand = by_hand(teacher, student, following)
    total = metrics.summary(metrics.compare(teacher, student, following))
    kls = sorted(row[0] for row in hand)
    assert total["tokens"] == 400
    assert total["kl_mean"] == pytest.approx(math.fsum(kls) / 400, rel=1e-5)
    assert kls[394] <= total["kl_p99"] <= kls[396]
    assert total["top1"] == sum(row[1] for row in hand) / 400
    expected = [math.exp(math.fsum(row[column] for row in hand[:-1]) / 399) for column in (2, 3)]
    assert [total["teacher_ppl"], total["student_ppl"]] == pytest.approx(expected, rel=1e-5)
    assert total["ppl_increase"] == pytest.approx(expected[1] / expected[0] - 1, abs=1e-5)
    halves = [metrics.compare(teacher[:200], student[:200], following[:200]),
              metrics.compare(teacher[200:], student[200:], following[200:])]
    domains = metrics.by_domain([("b", halves[0]), ("a", halves[1])])
    assert list(domains) == ["b", "a"]
    assert (domains["b"]["kl_mean"] + domains["a"]["kl_mean"]) / 2 == pytest.approx(total["kl_mean"], rel=1e-5)


def constant_scores(tokens: int, teacher_nll: float, student_nll: float) -> metrics.TokenScores:
    none = np.zeros(tokens, bool)
    losses = [np.full(tokens, loss, np.float32) for loss in (teacher_nll, student_nll)]
    for loss in losses:
        loss[-1] = np.nan
    return metrics.TokenScores(np.zeros(tokens, np.float32), ~none, *losses, none, none)


def test_growing_lengths_take_the_same_texts():
    far = constant_scores(1100, 1.0, 1.0)
    far.student_nll[300:] = 2.0  # lost beyond token 300
    rows = metrics.by_length([far, constant_scores(600, 9.0, 9.0)])
    assert [row["tokens"] for row in rows] == [256, 512, 1024]
    assert {row["texts"] for row in rows} == {1}
    assert [row["teacher_ppl"] for row in rows] == pytest.approx([math.e] * 3)
    assert rows[0]["ppl_increase"] == pytest.approx(0)
    assert rows[2]["student_ppl"] == pytest.approx(math.exp((300 + 2 * 723) / 1023))
    assert metrics.by_length([constant_scores(255, 1, 1)]) == []


def test_relative_error_and_repeats():
    teacher = np.array([[3.0, 4.0]], np.float32)
    assert metrics.relative_error(teacher, teacher + np.array([[0.0, 0.5]], np.float32)) == pytest.approx(0.1)
    assert metrics.relative_error(teacher * 0, teacher * 0) == 0
    assert metrics.repeat_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert metrics.repeat_share([7] * 40) == pytest.approx(36 / 37)
    assert metrics.repeat_share([1, 2, 3]) == 0


def all_measured(**changed: float | None) -> dict[str, float | None]:
    """What passes every default bound, but for ``changed``."""
    good = {kind.name: 0.0 if kind.side == "at most" else 1.0 for kind in gates.KINDS}
    return good | changed


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("kind", gates.KINDS, ids=lambda kind: kind.name)
def test_each_gate_fails_when_it_should(kind, pruned):
    bounds = gates.default_bounds(pruned=pruned)
    beyond = 1e-9 if kind.side == "at most" else -1e-9
    failing = [bounds[kind.name] + beyond, None, math.nan, math.inf if kind.side == "at most" else -math.inf]
    for value in failing:
        judged = gates.judge(bounds, all_measured(**{kind.name: value}))
        assert [gate.name for gate in judged if not gate.passed] == [kind.name], value
    assert all(gate.passed for gate in gates.judge(bounds, all_measured(**{kind.name: bounds[kind.name]})))


def test_bounds_of_plan_and_command_line():
    found = gates.bounds(pruned=True, plan={"kl_mean": 0.04, "top1": 0.9}, asked={"top1": 0.95})
    assert (found["kl_mean"], found["top1"], found["kl_p99"]) == (0.04, 0.95, 0.75)
    with pytest.raises(UsageError, match=r"gate 'kl' is not known; expected one of kl_mean"):
        gates.bounds(pruned=True, plan={"kl": 1}, asked={})
    with pytest.raises(UsageError, match=r"plan.json: gates: top1: found '0.9'"):
        gates.bounds(pruned=True, plan={"top1": "0.9"}, asked={})
    assert gates.parse_bound("needle_loss=0.1") == ("needle_loss", 0.1)
    for text in ("top1", "top1=high", "top1=nan"):
        with pytest.raises(UsageError, match="--gate top1"):
            gates.parse_bound(text)


def test_what_was_not_measured_is_none():
    measured = metrics.gate_measurements({"total": {"kl_mean": 0.1}, "domains": {"a": {"ppl_increase": None}}})
    assert measured["kl_mean"] == 0.1
    assert {name for name, value in measured.items() if value is None} == set(gates.NAMES) - {"kl_mean"}
    assert set(measured) == set(gates.NAMES)


def test_worst_domain_length_layer_and_needle_are_gated():
    cells = [(256, 2, 1), (256, 2, 2), (512, 1, 2), (512, 2, 0)]
    needles = [{"tokens": n, "needles": 2, "teacher_found": t, "student_found": s} for n, t, s in cells]
    measured = metrics.gate_measurements({
        "domains": {"a": {"ppl_increase": 0.01}, "b": {"ppl_increase": 0.3}}, "layer_error": [0.1, 0.7, 0.2],
        "lengths": [{"ppl_increase": 0.5}, {"ppl_increase": -0.1}], "needles": needles,
    })  # fmt: skip
    assert measured["ppl_increase"] == 0.3
    assert measured["layer_error"] == 0.7
    assert measured["length_ppl_increase"] == 0.5
    assert measured["needle_loss"] == 0.25  # 256: 1 of 4 lost; 512: 1 of 4 lost, one gained does not hide two


def a_quality(waivers=(), **changed) -> Quality:
    judged = gates.judge(gates.default_bounds(pruned=True), all_measured(**changed), waivers)
    return Quality("r" * 64, "s" * 64, {"recipe_sha256": "t" * 64}, "x" * 64, {"version": "1"}, {}, judged, waivers)


def test_a_waiver_is_recorded_and_counts_for_its_gate_alone(tmp_path):
    waiver = gates.parse_waiver("kl_mean=the customer took it = knowingly", "R. Engineer")
    quality = a_quality((waiver,), kl_mean=0.2, top1=0.5)
    quality.write(tmp_path / "quality.json")
    again = Quality.read(tmp_path / "quality.json")
    assert again == quality
    assert again.failed_gates == ("top1",)
    assert again.waived_gates == ("kl_mean",)
    assert again.waivers[0].reason == "the customer took it = knowingly"
    passing = a_quality((waiver,))
    assert passing.waived_gates == ()


@pytest.mark.parametrize("text", ["kl_mean", "kl_mean=", "kl_mean=  ", "kl_mean=" + "x" * 3000])
def test_a_waiver_needs_a_reason(text):
    with pytest.raises(UsageError, match="--waive kl_mean: say why"):
        gates.parse_waiver(text, "me")
    with pytest.raises(UsageError, match="'everything' is not known"):
        gates.parse_waiver("everything=no", "me")


def edited(path, change) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(("change", "message"), [
    (lambda raw: raw["gates"][0].update(passed=True), "gates: kl_mean: says passed True, waived False"),
    (lambda raw: raw["gates"][0].update(waived=True), "says passed False, waived True"),
    (lambda raw: raw["gates"].pop(), "expected each of kl_mean"),
    (lambda raw: raw["gates"].append(raw["gates"][0]), "expected each of kl_mean"),
    (lambda raw: raw["gates"][0].update(measured="low"), "bound and measured must be numbers"),
    (lambda raw: raw.update(format=2), "format 2, expected 1"),
    (lambda raw: raw.pop("waivers"), "waivers: found 'None', expected a list"),
    (lambda raw: raw.update(waivers=[{"gate": "kl_mean", "by": "me"}]), "expected {gate, reason, by}"),
])  # fmt: skip
def test_a_quality_file_that_lies_is_refused(tmp_path, change, message):
    path = tmp_path / "quality.json"
    a_quality(kl_mean=0.2).write(path)
    edited(path, change)
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}"):
        Quality.read(path)


def test_help_names_every_gate():
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    text = " ".join(parser._subparsers._group_actions[0].choices["evaluate"].format_help().split())
    assert all(name in text for name in gates.NAMES)
