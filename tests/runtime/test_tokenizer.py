"""Text can never become a control token, and half a character is never shown."""

import copy
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_support import spell, tokenizer, tokenizer_json

from appliance.errors import BundleError, EngineError
from runtime.chat.content import Message, ToolCall
from runtime.chat.encoding import CONTROL_LITERALS, DIALECTS, encode_chat
from runtime.tokenizer import Control, TextStream, Tokenizer

HOSTILE = Tokenizer(tokenizer_json(spelling=True), "hostile")
PIECES = st.one_of(st.sampled_from(CONTROL_LITERALS), st.text(max_size=12), st.sampled_from(["<", "<th", "ink>", "｜"]))
TEXTS = st.lists(PIECES, max_size=6).map("".join)


@settings(deadline=None)
@given(TEXTS)
def test_text_never_becomes_a_control_token(text: str) -> None:
    for tok in (tokenizer(), HOSTILE):
        ids = tok.encode_text(text)
        assert not tok.control_ids & set(ids)
        assert tok.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.booleans())
def test_whatever_clients_write_a_prompt_has_the_template_s_control_tokens(
    system: str, user: str, tool: str, thinking: bool
) -> None:
    def messages(system: str, user: str, tool: str) -> list[Message]:
        return [
            Message("system", system, tools=({"name": tool, "description": user},), response_format={"x": tool}),
            Message("developer", user + "."), Message("user", user),
            Message("assistant", user, reasoning=tool, tool_calls=(ToolCall("1", tool, json.dumps({"k": tool})),)),
            Message("tool", tool, tool_call_id="1"), Message("user", system),
        ]  # fmt: skip

    def controls(*texts: str) -> list[int]:
        segments = encode_chat(messages(*texts), DIALECTS["dsv4-0731"], thinking=thinking)
        return [token for token in tokenizer().encode(segments) if token in tokenizer().control_ids]

    assert controls(system, user, tool) == controls("s", "u", "t")


@pytest.mark.parametrize("literal", CONTROL_LITERALS)
def test_every_literal_is_one_id_as_control_and_bytes_as_text(literal: str) -> None:
    tok = tokenizer()
    assert tok.encode([Control(literal)]) == [tok.control_id(literal)]
    assert len(tok.encode_text(literal)) > 1
    assert tok.control_id(literal) not in tok.encode([f"a{literal}b"])


def test_the_plain_library_would_have_let_it_through() -> None:
    """The check above has teeth: the same file without our cut turns the literal into the control token."""
    from tokenizers import Tokenizer as Backend

    ids = Backend.from_str(json.dumps(tokenizer_json())).encode("a</think>b").ids
    assert tokenizer().control_id("</think>") in ids


def test_a_spelled_control_token_is_cut_out_of_the_merges() -> None:
    ids = HOSTILE.encode_text("<think>")
    assert HOSTILE.control_id("<think>") not in ids
    assert HOSTILE.decode(ids) == "<think>"


def test_merges_still_work() -> None:
    assert len(tokenizer().encode_text("the thing")) < len("the thing")


def test_half_characters_are_held_back() -> None:
    stream = TextStream(tokenizer())
    shown = [stream.push(token) for token in spell("aé€😀b")]
    assert "".join(shown) == "aé€😀b"
    assert shown[1] == ""
    assert "\ufffd" not in "".join(shown)


def test_broken_utf8_ends_as_replacement_characters() -> None:
    stream = TextStream(tokenizer())
    assert stream.push(2 + 0xE2) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(2 + 0x41) == "A"


def test_an_unknown_id_is_nothing() -> None:
    assert tokenizer().token_bytes(10**9) == b""


def test_a_missing_control_token_is_named() -> None:
    with pytest.raises(EngineError, match="<｜System｜>"):
        tokenizer().encode([Control("<｜System｜>")])


def test_hub_access_is_switched_off() -> None:
    tokenizer()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def damaged(change: str) -> object:
    raw = copy.deepcopy(tokenizer_json())
    if change == "word level":
        raw["model"]["type"] = "WordLevel"
    elif change == "no bytes":
        del raw["model"]["vocab"]["Ġ"]
        raw["model"]["merges"] = []
    elif change == "no decoder":
        raw["decoder"] = None
    elif change == "added tokens":
        raw["added_tokens"] = [{"id": 3}]
    elif change == "shared id":
        raw["added_tokens"][0]["id"] = 70
    elif change == "list":
        return [1]
    else:
        raw["model"]["merges"] = [["Q", "nothing"]]
    return raw


@pytest.mark.parametrize(
    "change", ["word level", "no bytes", "no decoder", "added tokens", "shared id", "list", "bad merge"]
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, change: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(damaged(change)))
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)


def test_a_missing_or_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.json"):
        Tokenizer.from_file(tmp_path / "none.json")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        Tokenizer.from_file(tmp_path / "t.json")


def test_the_lower_bound_of_a_prompt_s_tokens_holds():
    ours = tokenizer()
    text = "solocard install DIR " * 50 + "ünï¢öde"
    segments = [text, "tail"]
    assert 0 < ours.least_tokens(segments) <= len(ours.encode(segments))
