"""A conversation → prompt segments, in V4's two published dialects.

Dialects differ in their effort prefixes only, and those are data below (V4 prompt format: ``dsv4-0424`` is the April
preview, ``dsv4-0731`` the July checkpoint). A prompt is a list of control tokens and text, never one string: what a
client wrote only ever lands in text, and text cannot become a control token (runtime.tokenizer).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.errors import RequestError, UsageError
from runtime.chat.content import Message, ToolCall
from runtime.tokenizer import Control, Sampled, Segment

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK, DSML = "<think>", "</think>", "｜DSML｜"
TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
CONTROL_LITERALS = (BOS, EOS, USER, ASSISTANT, REMINDER, THINK, END_THINK, DSML, *TASKS.values())

_ABSOLUTE_MAXIMUM = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND_MAXIMUM = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose "
    "the problem into its most fundamental components, trace every causal chain to its root, and resolve the "
    "underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
_TOOLS_BEFORE = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_AFTER = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)
_RESPONSE_FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
# An assistant message, its segments without the end token, whether reasoning is among them → what was sampled.
Replay = Callable[[Message, Sequence[Segment], bool], Sampled | None]
_TEMPLATE_CONTROL = re.compile(f"({THINK}|{END_THINK}|{DSML})")


@dataclass(frozen=True, slots=True)
class Dialect:
    """A prompt dialect: effort name → text before the first message of a prompt in thinking mode."""

    name: str
    efforts: dict[str, str]
    default_effort: str = "high"

    def check_effort(self, effort: str) -> str:
        """``effort`` itself; raises RequestError 400 naming the efforts of this dialect."""
        if effort not in self.efforts:
            allowed = ", ".join(("none", *self.efforts))
            raise RequestError(
                f"reasoning_effort must be one of {allowed} for this model ({self.name})",
                param="reasoning_effort", code="invalid_value",
            )
        return effort


DIALECTS = {
    "dsv4-0424": Dialect("dsv4-0424", {"high": "", "max": _ABSOLUTE_MAXIMUM}),
    "dsv4-0731": Dialect("dsv4-0731", {"low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM}),
}


def dialect(name: str) -> Dialect:
    """The dialect a bundle names; raises UsageError for one this version does not know."""
    try:
        return DIALECTS[name]
    except KeyError:
        raise UsageError(f"encoding {name!r} is not known; this Solocard speaks {', '.join(DIALECTS)}") from None


class _Prompt:
    """Segments under construction; neighbouring text is one segment, so merges run across message joints."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def control(self, literal: str) -> None:
        self.segments.append(Control(literal))

    def text(self, text: str) -> None:
        if not text:
            return
        if self.segments and isinstance(self.segments[-1], str):
            self.segments[-1] += text
        else:
            self.segments.append(text)

    def add(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            if isinstance(segment, str):
                self.text(segment)
            else:
                self.segments.append(segment)

    def template(self, template: str) -> None:
        """Text of our own, in which control tokens are spelled out."""
        for i, piece in enumerate(_TEMPLATE_CONTROL.split(template)):
            self.control(piece) if i % 2 else self.text(piece)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message after merging: user turns hold blocks, each plain text or a tool result."""

    message: Message
    blocks: tuple[Message, ...] = ()

    @property
    def role(self) -> str:
        return self.message.role


def encode_chat(
    messages: Sequence[Message], dialect: Dialect, *, thinking: bool, effort: str | None = None,
    tools: Sequence[dict[str, Any]] = (), drop_thinking: bool = True, replay: Replay | None = None,
) -> list[Segment]:
    """Segments of the prompt, from the begin token to the point where the assistant goes on.

    ``effort`` None is the dialect's default. ``tools`` (function objects) go to the first system message, an empty one
    is put in front where there is none. ``drop_thinking`` forgets reasoning before the last user turn, unless tools
    are there. ``replay`` may put the ids that were sampled in an assistant message's place. Raises RequestError 400 for
    an effort that the dialect lacks or an unknown task.
    """
    prefix = dialect.efforts[dialect.check_effort(dialect.default_effort if effort is None else effort)]
    turns = _sorted_results(_merged(_with_tools(messages, tools)))
    dropping = drop_thinking and not any(turn.message.tools for turn in turns)
    if thinking and dropping:
        turns = _without_reasoning(turns)
    prompt = _Prompt()
    prompt.control(BOS)
    if thinking:
        prompt.text(prefix)
    last_user = _last_user(turns)
    for index, turn in enumerate(turns):
        think_here = thinking and (not dropping or index >= last_user)
        after_task = index > 0 and turns[index - 1].message.task is not None
        _write_turn(prompt, turn, reasoning=think_here and not after_task, replay=replay)
        last = index + 1 == len(turns)
        if last or turns[index + 1].role in ("assistant", "latest_reminder"):
            _write_handover(prompt, turn, last=last, thinking=thinking, think_here=think_here)
    return prompt.segments


def leading_segments(segments: Sequence[Segment]) -> int:
    """How many segments come before the first turn: the begin token, the effort's text, system message and tools."""
    ends = (USER, ASSISTANT, REMINDER, EOS, *TASKS.values())
    found = (i for i, segment in enumerate(segments) if isinstance(segment, Control) and segment.literal in ends)
    return next(found, len(segments))


def render(segments: Iterable[Segment]) -> str:
    """One string, for comparison with published vectors only: a string no longer knows what was control."""
    return "".join(s.literal if isinstance(s, Control) else s for s in segments if not isinstance(s, Sampled))


def _with_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    result = list(messages)
    if not tools:
        return result
    at = next((i for i, message in enumerate(result) if message.role == "system"), None)
    if at is None:
        return [Message("system", tools=tuple(tools)), *result]
    result[at] = dataclasses.replace(result[at], tools=(*result[at].tools, *tools))
    return result


def _merged(messages: Sequence[Message]) -> list[_Turn]:
    """There is no tool role in V4: neighbouring tool results and user texts become one user turn."""
    turns: list[_Turn] = []
    for message in messages:
        if message.role not in ("user", "tool"):
            turns.append(_Turn(message))
        elif turns and turns[-1].role == "user" and turns[-1].message.task is None:
            turns[-1] = _Turn(dataclasses.replace(turns[-1].message, task=message.task), (*turns[-1].blocks, message))
        else:
            turns.append(_Turn(Message("user", task=message.task), (message,)))
    return turns


def _sorted_results(turns: Sequence[_Turn]) -> list[_Turn]:
    """Tool results in the order of the calls before them; text blocks keep their places."""
    result: list[_Turn] = []
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.tool_calls:
            order = {call.id: i for i, call in enumerate(turn.message.tool_calls)}
        answers = [block for block in turn.blocks if block.role == "tool"]
        answers.sort(key=lambda block: order.get(block.tool_call_id, 0))
        ordered = iter(answers)
        result.append(_Turn(turn.message, tuple(next(ordered) if b.role == "tool" else b for b in turn.blocks)))
    return result


def _last_user(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _without_reasoning(turns: Sequence[_Turn]) -> list[_Turn]:
    """Before the last user turn: no reasoning, and no developer messages at all."""
    last = _last_user(turns)
    return [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]


def _write_turn(prompt: _Prompt, turn: _Turn, *, reasoning: bool, replay: Replay | None) -> None:
    message = turn.message
    if message.role == "assistant":
        _write_assistant(prompt, message, reasoning=reasoning, replay=replay)
    elif message.role == "latest_reminder":
        prompt.control(REMINDER)
        prompt.text(message.text)
    elif message.role == "user":
        prompt.control(USER)
        prompt.text("\n\n".join(_block(block) for block in turn.blocks))
    else:
        if message.role == "developer":
            prompt.control(USER)
        prompt.text(message.text)
        _write_instructions(prompt, message)


def _block(block: Message) -> str:
    return f"<tool_result>{block.text}</tool_result>" if block.role == "tool" else block.text


def _write_instructions(prompt: _Prompt, message: Message) -> None:
    if message.tools:
        prompt.text("\n\n")
        prompt.template(_TOOLS_BEFORE)
        prompt.text("\n".join(_json(tool) for tool in message.tools))
        prompt.template(_TOOLS_AFTER)
    if message.response_format:
        prompt.text(_RESPONSE_FORMAT + _json(message.response_format))


def _write_assistant(prompt: _Prompt, message: Message, *, reasoning: bool, replay: Replay | None) -> None:
    segments = answer_segments(message, reasoning=reasoning)
    joined = bool(prompt.segments) and isinstance(prompt.segments[-1], str)  # both are one text to the tokenizer
    sampled = None if replay is None or joined else replay(message, segments, reasoning)
    prompt.add(segments if sampled is None else [sampled])
    if not message.open_ended:
        prompt.control(EOS)


def answer_segments(message: Message, *, reasoning: bool) -> list[Segment]:
    """What the assistant wrote, from where the prompt handed over to it up to its end token, without that."""
    prompt = _Prompt()
    if reasoning:
        prompt.text(message.reasoning)
        prompt.control(END_THINK)
    prompt.text(message.text)
    if message.tool_calls:
        prompt.template(f"\n\n<{DSML}tool_calls>\n")
        for i, call in enumerate(message.tool_calls):
            prompt.text("\n" if i else "")
            _write_call(prompt, call)
        prompt.template(f"\n</{DSML}tool_calls>")
    return prompt.segments


def _write_call(prompt: _Prompt, call: ToolCall) -> None:
    prompt.template(f"<{DSML}invoke name=\"")
    prompt.text(f'{call.name}">\n')
    for i, (key, value) in enumerate(call_arguments(call).items()):
        prompt.text("\n" if i else "")
        prompt.template(f"<{DSML}parameter name=\"")
        is_text = isinstance(value, str)
        prompt.text(f'{key}" string="{str(is_text).lower()}">{value if is_text else _json(value)}</')
        prompt.template(f"{DSML}parameter>")
    prompt.template(f"\n</{DSML}invoke>")


def call_arguments(call: ToolCall) -> dict[str, Any]:
    """The call's arguments; what is no JSON object goes in whole, as one parameter named ``arguments``."""
    try:
        parsed = json.loads(call.arguments)
        _json(parsed).encode()  # an escape may spell half of a surrogate pair, which is no text
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": call.arguments}


def _write_handover(prompt: _Prompt, turn: _Turn, *, last: bool, thinking: bool, think_here: bool) -> None:
    """What stands between a turn and the assistant's words (or a task token's answer).

    A system message hands over only at the very end, where some clients put a reminder: the published encoder would
    leave the prompt without an assistant there.
    """
    task = turn.message.task
    if task is not None and task not in TASKS:
        raise RequestError(f"task must be one of {', '.join(TASKS)}", param="messages", code="invalid_value")
    if task is not None and task != "action":
        prompt.control(TASKS[task])
    elif task is not None or turn.role in ("user", "developer") or (last and turn.role == "system"):
        prompt.control(ASSISTANT)
        prompt.control(THINK if (thinking if task else think_here) else END_THINK)
        if task is not None:
            prompt.control(TASKS[task])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # Python's separators are part of the format
