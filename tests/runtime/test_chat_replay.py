"""Answers that come back as they were sampled: what is kept, when it is used, and what it may never do."""

import dataclasses
import itertools
import json

import pytest
from serve_support import spell, tokenizer

from runtime.chat.content import Message, ToolCall
from runtime.chat.dsml import parse_calls
from runtime.chat.encoding import DIALECTS, END_THINK, EOS, USER, encode_chat, leading_segments, render
from runtime.chat.replay import Replays, replays_of, replays_of_calls
from runtime.chat.transcript import Transcript
from runtime.tokenizer import Control, Sampled

DIALECT = DIALECTS["dsv4-0731"]
EOS_ID = tokenizer().control_id(EOS)
QUESTION = Message("user", "say it")


def answered(ids: list[int], *, thinking: bool = False, stop: tuple[str, ...] = ()) -> tuple[Message, dict]:
    """The message a client would send back for a sampled answer, and what is kept of it."""
    transcript = Transcript(tokenizer(), thinking=thinking, stop=stop, replayed=True)
    deltas = [delta for token in ids if token != EOS_ID for delta in transcript.push(token)] + transcript.flush()
    said = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("content", "reasoning")}
    return Message("assistant", said["content"], said["reasoning"]), transcript.replays(ids)


def encode(messages: list[Message], kept: dict, *, thinking: bool = False, **options) -> list[int]:
    """A prompt's ids by the two passes of the server."""
    replays = Replays(tokenizer())
    parts = {"thinking": thinking, **options}
    segments = encode_chat(messages, DIALECT, replay=replays.collect, **parts)
    if replays.look_up(lambda names: {name: kept[name] for name in names if name in kept}):
        segments = encode_chat(messages, DIALECT, replay=replays.ids, **parts)
    return tokenizer().encode(segments)


def test_the_tokenizers_own_way_needs_no_keeping() -> None:
    ids = tokenizer().encode_text("the king is in")
    assert answered([*ids, EOS_ID])[1] == {}
    assert answered(ids)[1] == {}
    assert answered([EOS_ID])[1] == {}


@pytest.mark.parametrize("text", ["the thing", "é", "日本 the"])
def test_an_answer_cut_otherwise_comes_back_as_it_was_sampled(text: str) -> None:
    ids = spell(text)  # byte by byte, while the tokenizer would merge
    message, kept = answered([*ids, EOS_ID])
    assert message.text == text
    chat = [QUESTION, message, Message("user", "more")]
    own, replayed = encode(chat, {}), encode(chat, kept)
    start = len(encode([QUESTION], {}))
    if tokenizer().encode_text(text) == ids:
        assert kept == {}
    else:
        assert list(kept.values()) == [ids]
        assert own[start : start + len(ids)] != ids
    assert replayed[: start + len(ids) + 1] == [*encode([QUESTION], {}), *ids, EOS_ID]
    assert tokenizer().decode(replayed) == tokenizer().decode(own)


def test_half_a_character_at_the_end_is_kept_too() -> None:
    ids = [*spell("so"), *spell("é")[:1]]
    message, kept = answered(ids)
    assert message.text == "so\ufffd"
    assert encode([QUESTION, message, QUESTION], kept)[len(encode([QUESTION], {})) :][: len(ids)] == ids


def test_reasoning_that_stays_in_the_prompt_is_kept_with_the_answer() -> None:
    ids = [*spell(f"why the{END_THINK}because the"), EOS_ID]
    message, kept = answered(ids, thinking=True)
    assert (message.reasoning, message.text) == ("why the", "because the")
    tools = [{"name": "f"}]
    chat = [QUESTION, message, Message("user", "more")]
    start = len(encode([QUESTION], {}, thinking=True, tools=tools))
    assert encode(chat, kept, thinking=True, tools=tools)[start : start + len(ids)] == ids
    assert encode(chat, {}, thinking=True, tools=tools)[start : start + len(ids)] != ids
    # without tools the reasoning is dropped before the last user turn: another text, so the tokenizer's way
    assert encode(chat, kept, thinking=True) == encode(chat, {}, thinking=True)


@pytest.mark.parametrize(("sampled", "thinking", "stop"), [
    ("the end. STOP", False, (" STOP",)),  # cut by a stop string: the client saw less
    (f"the{END_THINK}answer", False, ()),  # a stray tag was swallowed
    ("the whole answer was reasoning", True, ()),  # never left reasoning: the history will close it
    (f"a{USER}b", False, ()),  # a control token that is not shown
])  # fmt: skip
def test_what_the_client_did_not_see_whole_is_not_kept(sampled: str, thinking: bool, stop: tuple[str, ...]) -> None:
    assert answered(spell(sampled), thinking=thinking, stop=stop)[1] == {}


def test_kept_ids_are_used_only_for_exactly_their_text() -> None:
    message, kept = answered(spell("the thing"))
    name = next(iter(kept))
    for other in (spell("the thin"), spell(f"the thing{USER}"), [*spell("the thing"), EOS_ID], spell(USER)):
        chat = [QUESTION, message, QUESTION]
        assert encode(chat, {name: other}) == encode(chat, {})
    changed = dataclasses.replace(message, text="the thing!")
    assert encode([QUESTION, changed, QUESTION], kept) == encode([QUESTION, changed, QUESTION], {})


def test_text_that_spells_a_tag_is_not_that_tag() -> None:
    """A client's text must not fetch ids that hold a control token of the same letters."""
    ids = spell(f"x{END_THINK}the")
    typed = Message("assistant", f"x{END_THINK}the")
    kept = replays_of(tokenizer(), ids, reasoning="x", content="the", end_id=EOS_ID)
    assert len(kept) == 1
    chat = [QUESTION, typed, QUESTION]
    assert encode(chat, kept) == encode(chat, {})
    assert encode(chat, dict.fromkeys(_names(chat), ids)) == encode(chat, {})


def _names(chat: list[Message]) -> list[str]:
    replays = Replays(tokenizer())
    encode_chat(chat, DIALECT, thinking=False, replay=replays.collect)
    return replays.names


def test_after_a_system_text_the_assistant_has_no_segment_of_its_own() -> None:
    message, kept = answered(spell("the thing"))
    chat = [Message("system", "be brief"), message, QUESTION]
    assert encode(chat, kept) == encode(chat, {})


def test_sampled_ids_stand_for_themselves() -> None:
    tok = tokenizer()
    mixed = tok.encode(["a", Sampled((7, 8, 9)), Control(USER)])
    assert mixed == [*tok.encode_text("a"), 7, 8, 9, tok.control_id(USER)]
    assert tok.least_tokens([Sampled((7, 8, 9))]) == 3
    assert tok.segments(spell(f"a{USER}bé")) == ["a", Control(USER), "bé"]
    assert tok.segments([]) == []


# -- tool calls, by their ids

CALL = ToolCall("call_1", "find", '{"q": "the moon", "n": 3}')
CALLED = Message("assistant", "Let me look.", "", (CALL,))


def dsml(q: str = "the moon", n: str = "3", before: str = "Let me look.\n\n", name: str = "find") -> str:
    mark = "｜DSML｜"
    return (
        f'{before}<{mark}tool_calls>\n<{mark}invoke name="{name}">\n'
        f'<{mark}parameter name="q" string="true">{q}</{mark}parameter>\n'
        f'<{mark}parameter name="n" string="false">{n}</{mark}parameter>\n</{mark}invoke>\n</{mark}tool_calls>'
    )


def test_a_tool_call_rendered_again_is_replayed_by_its_id() -> None:
    sampled = spell(dsml(n=" 3"))  # the model wrote a space that no JSON keeps
    kept = replays_of_calls([CALL.id], [*sampled, EOS_ID], EOS_ID)
    chat = [QUESTION, CALLED, Message("tool", "full", tool_call_id="call_1")]
    start = len(encode([QUESTION], {}))
    ids = encode(chat, kept)
    assert ids[start : start + len(sampled) + 1] == [*sampled, EOS_ID]
    assert encode(chat, {})[start : start + len(sampled)] != sampled
    assert encode(chat, {})[: start + 5] == ids[: start + 5]


@pytest.mark.parametrize("sampled", [
    dsml(q="the sun"), dsml(n="4"), dsml(n="3.0"), dsml(n="true"), dsml(before="Let me think.\n\n"), dsml(name="seek"),
    "Let me look.", dsml() + "more", dsml() + USER, dsml() + dsml(), f"hm{END_THINK}" + dsml(), dsml(n="{"),
    dsml().replace("</｜DSML｜invoke>", ""), dsml().replace('string="true"', ""),
])  # fmt: skip
def test_sampled_calls_that_say_something_else_are_not_used(sampled: str) -> None:
    chat = [QUESTION, CALLED, Message("tool", "full", tool_call_id="call_1")]
    assert encode(chat, replays_of_calls(["call_1"], spell(sampled), EOS_ID)) == encode(chat, {})


def test_reasoning_before_a_call_must_be_the_same_too() -> None:
    sampled = spell(f"hm the{END_THINK}{dsml()}")
    kept = replays_of_calls(["call_1"], sampled, EOS_ID)
    result = Message("tool", "full", tool_call_id="call_1")
    same, other = (dataclasses.replace(CALLED, reasoning=text) for text in ("hm the", "hm"))
    tools = [{"name": "find"}]
    start = len(encode([QUESTION], {}, thinking=True, tools=tools))
    assert encode([QUESTION, same, result], kept, thinking=True, tools=tools)[start:][: len(sampled)] == sampled
    chat = [QUESTION, other, result]
    assert encode(chat, kept, thinking=True, tools=tools) == encode(chat, {}, thinking=True, tools=tools)


def test_a_call_without_an_id_has_no_replay() -> None:
    nameless = dataclasses.replace(CALLED, tool_calls=(dataclasses.replace(CALL, id=""),))
    assert _names([QUESTION, nameless, QUESTION]) == []
    assert replays_of_calls([""], spell(dsml()), EOS_ID) == {}


def test_calls_are_read_back_as_the_template_writes_them() -> None:
    calls = tuple(
        ToolCall(str(i), f"f{i}", json.dumps(arguments))
        for i, arguments in enumerate([{}, {"a": "x\ny"}, {"a": [1, {"b": None}], "c": "é", "d": 1.5, "e": True}])
    )
    for count in range(1, 4):
        for picked in itertools.permutations(calls, count):
            segments = encode_chat([QUESTION, Message("assistant", "so", "", picked)], DIALECT, thinking=False)
            text = render(segments).split("</think>")[-1].removesuffix(EOS)
            assert parse_calls(text) == ("so\n\n", [(c.name, json.loads(c.arguments)) for c in picked])


# -- the leading part


def test_the_leading_part_is_what_stands_before_the_first_turn() -> None:
    tools = [{"name": "f"}]
    for thinking in (True, False):
        with_system = encode_chat([Message("system", "be brief"), QUESTION], DIALECT, thinking=thinking, tools=tools)
        leading = render(with_system[: leading_segments(with_system)])
        assert leading.endswith("to invoke tool calls.\n")
        assert "be brief" in leading
        assert with_system[leading_segments(with_system)] == Control(USER)
    assert leading_segments(encode_chat([QUESTION], DIALECT, thinking=False)) == 1
    alone = encode_chat([Message("system", "be brief")], DIALECT, thinking=False)
    assert render(alone[: leading_segments(alone)]).endswith("be brief")
