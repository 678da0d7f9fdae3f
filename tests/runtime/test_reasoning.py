"""Reasoning, content and stop strings, whatever way the answer is cut into tokens."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_support import spell, tokenizer

from runtime.chat.reasoning import ReasoningSplitter
from runtime.chat.stops import StopScanner, partial_suffix
from runtime.chat.transcript import Transcript


def transcribe(text: str, *, thinking: bool = True, stop: tuple[str, ...] = ()) -> tuple[str, str, Transcript]:
    transcript = Transcript(tokenizer(), thinking=thinking, stop=stop)
    deltas = []
    for token in spell(text):
        deltas += transcript.push(token)
        if transcript.stopped:
            break
    deltas += transcript.flush()
    assert all(delta.text for delta in deltas)
    joined = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("reasoning", "content")}
    return joined["reasoning"], joined["content"], transcript


@pytest.mark.parametrize(("text", "reasoning", "content"), [
    ("why</think>so", "why", "so"),
    ("</think>so", "", "so"),
    ("never ends", "never ends", ""),
    ("a<think>b</think>c</think>d<think>e", "ab", "cde"),
    ("é</think>€😀", "é", "€😀"),
    ("x</think><｜User｜>y<｜end▁of▁sentence｜>", "x", "y"),
    ("x</think><｜DSML｜tool_calls>", "x", "<｜DSML｜tool_calls>"),
])  # fmt: skip
def test_tags_as_control_tokens(text: str, reasoning: str, content: str) -> None:
    assert transcribe(text)[:2] == (reasoning, content)


def test_without_thinking_everything_is_content() -> None:
    assert transcribe("a</think>b", thinking=False)[:2] == ("", "ab")


def test_reasoning_tokens_are_counted_up_to_the_tag() -> None:
    assert transcribe("abc</think>defgh")[2].reasoning_tokens == 4
    assert transcribe("abc", thinking=False)[2].reasoning_tokens == 0


@settings(deadline=None)
@given(st.text("ab</think>", max_size=30), st.lists(st.integers(0, 30), max_size=6))
def test_a_spelled_out_tag_is_found_in_any_cut(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    splitter = ReasoningSplitter(thinking=True)
    deltas = [d for a, b in itertools.pairwise(edges) for d in splitter.text(text[a:b])] + splitter.flush()
    reasoning, tag, content = text.partition("</think>")
    assert "".join(d.text for d in deltas if d.kind == "reasoning") == reasoning
    assert "".join(d.text for d in deltas if d.kind == "content") == content
    assert splitter.kind == ("content" if tag else "reasoning")


def test_the_same_letters_in_content_stay() -> None:
    splitter = ReasoningSplitter(thinking=False)
    assert [d.text for d in splitter.text("write </think> to end")] == ["write </think> to end"]


@settings(deadline=None)
@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 40), max_size=8))  # fmt: skip
def test_stop_strings_cut_in_any_chunking(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    scanner = StopScanner(stops)
    shown = ""
    for a, b in itertools.pairwise(edges):
        shown += scanner.push(text[a:b])
        held = text[len(shown) : b]
        if not scanner.stopped and held:
            assert any(stop.startswith(held) for stop in stops)  # nothing else is held back
    stopped = scanner.stopped
    shown += scanner.flush()
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)


def test_a_stop_string_ends_the_content_and_not_the_reasoning() -> None:
    reasoning, content, transcript = transcribe("so\n\nand</think>one\n\ntwo", stop=("\n\n",))
    assert (reasoning, content) == ("so\n\nand", "one")
    assert transcript.stopped


def test_what_looked_like_a_stop_string_is_shown_in_the_end() -> None:
    assert transcribe("a</think>ST", stop=("STOP",))[1] == "ST"


def test_partial_suffix() -> None:
    assert partial_suffix("xST", ("STOP", "ABC")) == 2
    assert partial_suffix("xSTOP", ("STOP",)) == 0
    assert partial_suffix("", ("STOP",)) == 0
