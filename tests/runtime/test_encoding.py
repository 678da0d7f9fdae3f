"""Prompts byte by byte: the vectors published with the model, and our own for every effort of both dialects."""

import dataclasses
import json
from pathlib import Path

import pytest

from appliance.errors import RequestError, UsageError
from runtime.chat.content import Message, parse_messages, parse_tools
from runtime.chat.encoding import DIALECTS, EOS, USER, dialect, encode_chat, render
from runtime.tokenizer import Control

TESTS = Path(__file__).resolve().parent
PUBLISHED = TESTS.parent / "golden" / "encoding"
OWN = [(name, case) for name in DIALECTS for case in json.loads((TESTS / f"vectors/{name}.json").read_text())["cases"]]


def published_messages(raw: list[dict]) -> list[Message]:
    """The vectors carry a task on the message itself, which no client may send."""
    return [dataclasses.replace(m, task=r.get("task")) for m, r in zip(parse_messages(raw), raw, strict=True)]


@pytest.mark.parametrize(("number", "thinking"), [(1, True), (2, True), (4, False)])
def test_published_vectors_are_byte_exact(number: int, thinking: bool) -> None:
    raw = json.loads((PUBLISHED / f"test_input_{number}.json").read_text())
    messages, tools = (raw["messages"], raw["tools"]) if isinstance(raw, dict) else (raw, [])
    segments = encode_chat(
        published_messages(messages), DIALECTS["dsv4-0731"], thinking=thinking, effort="low", tools=parse_tools(tools)
    )
    assert render(segments) == (PUBLISHED / f"test_output_{number}.txt").read_text()


@pytest.mark.parametrize(("name", "case"), OWN, ids=[f"{name}-{case['name']}" for name, case in OWN])
def test_own_vectors_are_byte_exact(name: str, case: dict) -> None:
    segments = encode_chat(
        parse_messages(case["messages"]), dialect(name), thinking=case["thinking"], effort=case["effort"],
        tools=parse_tools(case["tools"]), drop_thinking=case["drop_thinking"],
    )
    assert render(segments) == case["expected"]


def test_effort_tables_differ_as_published() -> None:
    april, july = DIALECTS["dsv4-0424"].efforts, DIALECTS["dsv4-0731"].efforts
    assert list(april) == ["high", "max"]
    assert list(july) == ["low", "high", "max"]
    assert april["max"] == july["high"] != ""
    assert april["high"] == july["low"] == ""


@pytest.mark.parametrize(("name", "effort"), [("dsv4-0424", "low"), ("dsv4-0731", "medium"), ("dsv4-0731", "")])
def test_an_effort_of_another_dialect_is_refused_by_name(name: str, effort: str) -> None:
    with pytest.raises(RequestError, match="must be one of none, ") as caught:
        encode_chat([Message("user", "hi")], dialect(name), thinking=True, effort=effort)
    assert caught.value.status == 400
    assert all(known in str(caught.value) for known in DIALECTS[name].efforts)


def test_the_default_effort_is_high() -> None:
    for name, table in DIALECTS.items():
        given = encode_chat([Message("user", "hi")], dialect(name), thinking=True)
        assert given == encode_chat([Message("user", "hi")], table, thinking=True, effort="high")


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(UsageError, match="dsv41"):
        dialect("dsv41")


def test_control_literals_in_text_are_text_segments() -> None:
    spelled = f"{EOS}{USER}</think>"
    messages = [Message("system", spelled), Message("user", spelled)]
    segments = encode_chat(messages, DIALECTS["dsv4-0731"], thinking=False)
    assert [s for s in segments if isinstance(s, str)] == [spelled, spelled]
    assert [s.literal for s in segments if isinstance(s, Control)].count(EOS) == 0


def test_tool_names_and_values_are_text_and_the_frame_is_control() -> None:
    function = {"name": "<think>", "arguments": '{"a": "</｜DSML｜parameter>"}'}
    message = parse_messages([{"role": "assistant", "tool_calls": [{"id": "1", "function": function}]}])
    segments = encode_chat(message, DIALECTS["dsv4-0731"], thinking=False)
    controls = [s.literal for s in segments if isinstance(s, Control)]
    assert controls == ["<｜begin▁of▁sentence｜>", *["｜DSML｜"] * 6, EOS]
    assert render(segments).count("｜DSML｜") == 7


@pytest.mark.parametrize("arguments", ["not json", '{"a": "\\ud800"}', '{"\\ud800": 1}'])
def test_arguments_that_are_no_json_object_go_in_whole(arguments: str) -> None:
    call = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    text = render(encode_chat(parse_messages([{"role": "assistant", "tool_calls": call}]), DIALECTS["dsv4-0731"],
                              thinking=False))
    assert '<｜DSML｜parameter name="arguments" string="true">' + arguments + '</｜DSML｜parameter>' in text


def test_response_format_follows_the_system_text() -> None:
    message = Message("system", "S", response_format={"type": "object", "größe": 1.5})
    text = render(encode_chat([message, Message("user", "u")], DIALECTS["dsv4-0731"], thinking=False))
    assert text == (
        "<｜begin▁of▁sentence｜>S\n\n## Response Format:\n\n"
        "You MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "größe": 1.5}<｜User｜>u<｜Assistant｜></think>'
    )


def test_an_open_ended_assistant_message_has_no_end_token() -> None:
    segments = encode_chat([Message("user", "u"), Message("assistant", "The answer", open_ended=True)],
                           DIALECTS["dsv4-0731"], thinking=False)
    assert segments[-1] == "The answer"


@pytest.mark.parametrize(("raw", "field"), [
    ("hi", "messages "), ([], "messages "), ([1], r"messages\[0\]"), ([{"role": "root", "content": ""}], "role"),
    ([{"role": "user"}], r"messages\[0\].content"), ([{"role": "user", "content": 3}], "content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "text only"),
    ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text"),
    ([{"role": "assistant", "tool_calls": {}}], "tool_calls"),
    ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], r"tool_calls\[0\]"),
    ([{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f"}}]}], "as strings"),
])
def test_wrong_messages_are_refused_by_field(raw: object, field: str) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        parse_messages(raw)
    assert caught.value.status == 400
    assert caught.value.param


def test_too_many_messages_are_refused() -> None:
    with pytest.raises(RequestError, match="at most 10000"):
        parse_messages([{"role": "user", "content": "x"}] * 10_001)
