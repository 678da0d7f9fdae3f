"""Answers as they were sampled: the ids that come back when a later request repeats an answer in its history.

A tokenizer has one way to cut a text, a sampled answer may be cut in another, and a tool call rendered again from JSON
may even have other spaces. Either would end the stored prefix there. So what the tokenizer would not give back by
itself is kept with the KV cache, under a name that the history repeats: the text of the answer, or the id of its tool
call. It is used only where it says exactly the same: the same text, or the same calls with the same arguments.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from runtime.chat.content import Message
from runtime.chat.dsml import parse_calls
from runtime.chat.encoding import DSML, END_THINK, answer_segments, call_arguments
from runtime.tokenizer import Control, Sampled, Segment, Tokenizer

Find = Callable[[Sequence[str]], Mapping[str, Sequence[int]]]  # names → sampled ids of those that are known


def replays_of(
    tokenizer: Tokenizer, tokens: Sequence[int], *, reasoning: str | None, content: str, end_id: int
) -> dict[str, Sequence[int]]:  # fmt: skip
    """What to keep of an answer of ``tokens`` that a client saw as ``reasoning`` (None: thinking is off) and content.

    Empty when the tokenizer cuts that text the same way, and when the client did not see all that was sampled (a stop
    string, a swallowed tag): then no history can repeat it.
    """
    ids = list(tokens[:-1] if tokens and tokens[-1] == end_id else tokens)
    segments = answer_segments(Message("assistant", content, reasoning or ""), reasoning=reasoning is not None)
    if not ids or tokenizer.segments(ids) != segments or tokenizer.encode(segments) == ids:
        return {}
    return {_text_name(segments): ids}


def replays_of_calls(call_ids: Sequence[str], tokens: Sequence[int], end_id: int) -> dict[str, Sequence[int]]:
    """The same for an answer with tool calls, which the server gave the ids ``call_ids``."""
    ids = list(tokens[:-1] if tokens and tokens[-1] == end_id else tokens)
    return {_call_name(call_id): ids for call_id in call_ids if call_id and ids}


class Replays:
    """The encoder's seam: ``names`` collects what a prompt could use, ``ids`` answers once they were looked up.

    Without ``texts`` only tool calls are: their ids name one sampled answer. A text may be sent back by anyone, and
    what its tokens are would then depend on what the cache still has.
    """

    def __init__(self, tokenizer: Tokenizer, *, texts: bool = True) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._found: Mapping[str, Sequence[int]] = {}
        self.names: list[str] = []

    def look_up(self, find: Find) -> bool:
        """Ask ``find`` for all names at once; False when nothing was known."""
        self._found = find(self.names) if self.names else {}
        return bool(self._found)

    def collect(self, message: Message, segments: Sequence[Segment], reasoning: bool) -> None:
        """First pass: remember the name of an assistant message."""
        name = _name(message, segments) if self._texts or message.tool_calls else ""
        if name:
            self.names.append(name)

    def ids(self, message: Message, segments: Sequence[Segment], reasoning: bool) -> Sampled | None:
        """Second pass: the sampled ids of an assistant message, None where none are known or they say other things."""
        ids = self._found.get(_name(message, segments))
        if not ids:
            return None
        said = self._tokenizer.segments(ids)
        same = _same_calls(message, said, reasoning) if message.tool_calls else said == list(segments)
        return Sampled(tuple(ids)) if same else None


def _name(message: Message, segments: Sequence[Segment]) -> str:
    if message.tool_calls:
        return _call_name(message.tool_calls[0].id) if message.tool_calls[0].id else ""
    return _text_name(segments) if segments else ""


def _call_name(call_id: str) -> str:
    return f"call:{call_id}"


def _text_name(segments: Sequence[Segment]) -> str:
    """Control tokens and text apart, so that no text can pass for a tag."""
    spelled = [[s.literal] if isinstance(s, Control) else s for s in segments]
    return f"answer:{hashlib.sha256(json.dumps(spelled).encode()).hexdigest()}"


def _same_calls(message: Message, said: Sequence[Segment], reasoning: bool) -> bool:
    """Whether sampled segments say what ``message`` says: reasoning where it is shown, text, calls and arguments."""
    tags = [i for i, segment in enumerate(said) if segment == Control(END_THINK)]
    if len(tags) != int(reasoning):
        return False
    thought, rest = (said[: tags[0]], said[tags[0] + 1 :]) if reasoning else ([], said)
    if reasoning and list(thought) != ([message.reasoning] if message.reasoning else []):
        return False
    if any(DSML in s if isinstance(s, str) else s != Control(DSML) for s in rest):
        return False
    parsed = parse_calls("".join(s if isinstance(s, str) else DSML for s in rest))
    if parsed is None or parsed[0].rstrip() != message.text.rstrip():
        return False
    wanted = [(call.name, call_arguments(call)) for call in message.tool_calls]
    return json.dumps(parsed[1], sort_keys=True) == json.dumps(wanted, sort_keys=True)
