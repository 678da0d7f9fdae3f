"""The committed texts of the sample model: sizes, domains, and wordings that must stay apart."""

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "packaging" / "sample-model"
QUESTION = re.compile(r"<｜User｜>(.*?)<｜Assistant｜>", re.DOTALL)


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import data
        import wordings
    return data, wordings


@pytest.fixture(scope="module")
def facts(modules):
    return modules[0].load_manual(FOLDER / "manual_qa.jsonl")


def sequences(name):
    lines = (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [(entry["domain"], entry["text"]) for entry in map(json.loads, lines)]


def asked(name):
    return {question for _, text in sequences(name) for question in QUESTION.findall(text)}


def lengths(name):
    tokenizer = Tokenizer.from_file(str(FOLDER / "checkpoint" / "tokenizer.json"))
    return [len(tokenizer.encode(text, add_special_tokens=False).ids) for _, text in sequences(name)]


@pytest.mark.parametrize(
    ("name", "most_bytes", "least_tokens", "most_tokens"),
    [("calibration", 450_000, 90_000, 110_000), ("evaluation", 100_000, 12_000, 16_000)],
)
def test_sizes_and_domains(name, most_bytes, least_tokens, most_tokens):
    assert (FOLDER / f"{name}.jsonl").stat().st_size <= most_bytes
    assert {domain for domain, _ in sequences(name)} == {"docs", "plays", "manual"}
    assert least_tokens <= sum(lengths(name)) <= most_tokens


def test_only_the_evaluation_has_long_sequences():
    assert max(lengths("calibration")) <= 512
    long = [count for count in lengths("evaluation") if count > 512]
    assert len(long) == 4
    assert min(long) >= 1024


def test_calibration_and_evaluation_share_no_wording_and_no_passage():
    assert not asked("calibration") & asked("evaluation")
    lines = {line for _, text in sequences("calibration") for line in text.splitlines() if len(line) > 60}
    shared = [line for _, text in sequences("evaluation") for line in text.splitlines() if line in lines]
    assert [line for line in shared if "<｜User｜>" not in line] == []


def test_unseen_and_fresh_wordings_are_in_no_text(facts):
    fresh = [question for line in (FOLDER / "fresh.jsonl").read_text("utf-8").splitlines()
             for question in json.loads(line)["questions"]]
    kept_out = {question for fact in facts for question in fact.unseen} | set(fresh)
    assert len(fresh) >= len(facts)
    assert not kept_out & (asked("calibration") | asked("evaluation"))
    assert not set(fresh) & {question for fact in facts for question in (*fact.questions, *fact.unseen)}


def test_no_fresh_wording_can_be_drawn(modules):
    patterns = modules[1].read(FOLDER / "wordings.txt")
    for line in (FOLDER / "fresh.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        assert not [question for question in entry["questions"] if patterns[entry["fact"]].may_say(question)]


def test_patterns_that_could_give_an_unseen_wording_are_left_out(modules, facts):
    data, wordings = modules
    kept = data.with_more(facts, FOLDER / "wordings.txt")
    assert all(len(fact.more) >= 3 for fact in kept)
    unseen = [question for fact in facts for question in fact.unseen]
    assert not any(fact.more.may_say(question) for fact in kept for question in unseen)
    everything = wordings.read(FOLDER / "wordings.txt")
    assert sum(map(len, everything.values())) > sum(len(fact.more) for fact in kept)  # some were left out


def test_a_pattern_recognises_all_that_it_says(modules):
    _, wordings = modules
    draw = random.Random(3)
    for some in wordings.read(FOLDER / "wordings.txt").values():
        for _ in range(20):
            question = some.ask(draw)
            assert some.may_say(question), question
    assert not some.may_say("How long is a piece of string?")


def test_a_line_without_a_mark_is_named(modules, tmp_path):
    path = tmp_path / "wordings.txt"
    path.write_text("[fact]\nno mark", "utf-8")
    with pytest.raises(ValueError, match="line 2"):
        modules[1].read(path)
