"""Calibration texts: what is accepted, and the line that names what is not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from appliance.errors import CheckpointError, UsageError
from exporter.calibration import Text, domains, read_texts, texts_sha256
from exporter.checkpoint import Checkpoint
from exporter.view import View


@pytest.fixture
def view(tiny_checkpoint: Path) -> View:
    return View(Checkpoint.open(tiny_checkpoint))


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return path


def test_texts_and_ids(view: View, tmp_path: Path) -> None:
    prose, code = {"domain": "prose", "text": "Hello, world"}, {"domain": "code", "ids": [5]}
    file = written(tmp_path / "t.jsonl", prose, "", code)
    expected = Tokenizer.from_file(str(view.path / "tokenizer.json")).encode("Hello, world").ids
    found = read_texts(file, view)
    assert found == [Text("prose", tuple(expected)), Text("code", (5,))]
    assert domains(found) == ("code", "prose")
    assert texts_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_max_tokens_cuts_the_last_line(view: View, tmp_path: Path) -> None:
    file = written(tmp_path / "t.jsonl", *({"domain": "a", "ids": [n] * 4} for n in range(5)))
    assert [text.ids for text in read_texts(file, view, max_tokens=6)] == [(0,) * 4, (1,) * 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"line 2: not JSON"),
        ([], r"line 2: expected an object with a domain and either a text or ids"),
        ({"domain": "a"}, r"line 2: expected an object"),
        ({"domain": "a", "ids": [1], "text": "x"}, r"line 2: expected an object"),
        ({"ids": [1]}, r"line 2: domain: expected a string"),
        ({"domain": "x" * 65, "ids": [1]}, r"line 2: domain: expected a string of 1 to 64"),
        ({"domain": "a", "text": 3}, r"line 2: text: found a int"),
        ({"domain": "a", "text": ""}, r"line 2: no token"),
        ({"domain": "a", "text": "x\ud800"}, r"line 2: text: holds half of a surrogate pair"),
        ({"domain": "\ud800", "ids": [1]}, r"line 2: domain: holds half of a surrogate pair"),
        ({"domain": "a", "ids": [768]}, r"line 2: ids: found 768, expected 0 to 767"),
        ({"domain": "a", "ids": [True]}, r"line 2: ids: found True"),
        ({"domain": "a", "ids": [1] * 4097}, r"line 2: 4,097 tokens, the model takes at most 4,096"),
    ],
)
def test_refusals(view: View, tmp_path: Path, line: object, words: str) -> None:
    file = written(tmp_path / "t.jsonl", {"domain": "a", "ids": [1]}, line)
    with pytest.raises(UsageError, match=words):
        read_texts(file, view)


def test_files_that_are_no_texts(view: View, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.jsonl: cannot be read"):
        read_texts(tmp_path / "none.jsonl", view)
    with pytest.raises(UsageError, match="no line of text"):
        read_texts(written(tmp_path / "empty.jsonl"), view)
    many = written(tmp_path / "many.jsonl", *({"domain": str(n), "ids": [1]} for n in range(65)))
    with pytest.raises(UsageError, match="65 domains, expected at most 64"):
        read_texts(many, view)


def test_a_text_needs_the_tokenizer(view: View, tmp_path: Path) -> None:
    view.path = tmp_path
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        read_texts(written(tmp_path / "t.jsonl", {"domain": "a", "text": "x"}), view)
    assert read_texts(written(tmp_path / "i.jsonl", {"domain": "a", "ids": [1]}), view) == [Text("a", (1,))]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        read_texts(tmp_path / "t.jsonl", view)
