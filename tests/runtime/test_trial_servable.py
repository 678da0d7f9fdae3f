"""A bundle that the server would refuse at its start fails its trial: it never becomes current, the old one serves."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from bundle_support import spec

from appliance.bundle import VerifiedBundle
from runtime.__main__ import main
from runtime.chat.encoding import CONTROL_LITERALS, EOS

BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LETTERS = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]


def tokenizer_json(**changes: object) -> str:
    added = [{"id": 1000 + i, "content": text, "special": True} for i, text in enumerate(CONTROL_LITERALS)]
    model = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(LETTERS)}, "merges": []}
    return json.dumps({"added_tokens": added, "model": model, "decoder": BYTE_LEVEL} | changes)


@pytest.fixture
def trial(monkeypatch, tmp_path, capsys):
    """Run ``trial`` on an installed bundle made of ``text`` and model changes; what it answered, and what it said."""

    def run(text: str, **changes: object) -> tuple[int, str]:
        path = tmp_path / "tokenizer.json"
        path.write_text(text)
        model = spec()
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_id=EOS_ID), **changes)
        bundle = SimpleNamespace(bundle_id="b-1-000000000000", tokenizer_path=path, spec=model)
        monkeypatch.setattr(VerifiedBundle, "open_installed", staticmethod(lambda *_: bundle))
        return main(["trial", bundle.bundle_id]), capsys.readouterr().err

    return run


EOS_ID = 1000 + CONTROL_LITERALS.index(EOS)
CASES = {
    "not JSON": ("{", {}, 4, "not JSON"),
    "no bytes": (tokenizer_json(model={"type": "BPE", "vocab": {}}), {}, 4, "lacks 256 of 256 bytes"),
    "no control tokens": (tokenizer_json(added_tokens=[]), {}, 10, f"has no token {CONTROL_LITERALS[0]}"),
    "f32 caches": (tokenizer_json(), {"numerics": "kv-f32"}, 10, "kv-f32"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_served_fails_the_trial(trial, case):
    text, changes, code, words = CASES[case]
    found, said = trial(text, **changes)
    assert (found, words in said) == (code, True), said
    assert said.count("\n") == 1


def test_another_end_token_fails_the_trial(trial, monkeypatch):
    monkeypatch.setitem(globals(), "EOS_ID", 7)
    found, said = trial(tokenizer_json())
    assert found == 2
    assert "disagree" in said
