"""Messages as a client sends them (OpenAI's JSON) → :class:`Message`, checked field by field.

Every complaint is a RequestError that names the field (``messages[3].content``) and never repeats its text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from appliance.errors import RequestError

MAX_MESSAGES = 10_000
MAX_TOOL_CALLS = 128  # per message
Role = Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the assistant made: ``arguments`` is the JSON text it gave."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; which fields mean something depends on ``role``.

    ``task`` is one of the dialect's quick-instruction tokens, ``open_ended`` leaves out the end token after an
    assistant message (``wo_eos`` in the published vectors), ``tools`` (function objects) and ``response_format`` (a
    schema) belong to system and developer messages.
    """

    role: Role
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    response_format: dict[str, Any] | None = None
    task: str | None = None
    open_ended: bool = False


def parse_messages(raw: object) -> list[Message]:
    """The request's ``messages``. Raises RequestError 400 naming the first field that is wrong."""
    if not isinstance(raw, list) or not raw:
        raise _wrong("messages", "must be a list with at least one message")
    if len(raw) > MAX_MESSAGES:
        raise _wrong("messages", f"has {len(raw)} messages, at most {MAX_MESSAGES} are accepted")
    return [_message(item, f"messages[{i}]") for i, item in enumerate(raw)]


def parse_text(raw: object, field: str) -> str:
    """A string, or a list of text parts joined by blank lines; None is empty. Raises RequestError 400."""
    if raw is None:
        return ""
    if isinstance(raw, str):
        return _unicode(raw, field)
    if isinstance(raw, list):
        return "\n\n".join(_part(part, f"{field}[{i}]") for i, part in enumerate(raw))
    raise _wrong(field, "must be a string or a list of text parts")


def parse_tools(raw: Sequence[Any], field: str = "tools") -> tuple[dict[str, Any], ...]:
    """The ``function`` objects of OpenAI tool definitions. Raises RequestError 400."""
    tools = []
    for i, item in enumerate(raw):
        function = item.get("function") if isinstance(item, dict) and item.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"{field}[{i}]", "must be a function with a name")
        _unicode(json.dumps(function, ensure_ascii=False), f"{field}[{i}]")
        tools.append(function)
    return tuple(tools)


def _message(raw: object, field: str) -> Message:
    if not isinstance(raw, dict):
        raise _wrong(field, "must be an object")
    role = raw.get("role")
    if role not in ROLES:
        raise _wrong(f"{field}.role", f"must be one of {', '.join(ROLES)}")
    text = parse_text(raw.get("content"), f"{field}.content")
    if role in ("user", "developer", "latest_reminder", "tool") and raw.get("content") is None:
        raise _wrong(f"{field}.content", f"is missing in a {role} message")
    if role != "assistant":
        call_id = parse_text(raw.get("tool_call_id"), f"{field}.tool_call_id") if role == "tool" else ""
        return Message(cast("Role", role), text, tool_call_id=call_id)
    reasoning = raw.get("reasoning_content", raw.get("reasoning"))
    return Message(
        "assistant", text, parse_text(reasoning, f"{field}.reasoning_content"),
        _tool_calls(raw.get("tool_calls"), f"{field}.tool_calls"),
    )


def _tool_calls(raw: object, field: str) -> tuple[ToolCall, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or len(raw) > MAX_TOOL_CALLS:
        raise _wrong(field, f"must be a list of at most {MAX_TOOL_CALLS} calls")
    return tuple(_tool_call(item, f"{field}[{i}]") for i, item in enumerate(raw))


def _tool_call(raw: object, field: str) -> ToolCall:
    function = raw.get("function") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(function, dict):
        raise _wrong(field, "must be an object with a function")
    name, arguments, call_id = function.get("name"), function.get("arguments", "{}"), raw.get("id", "")
    if not (isinstance(name, str) and name and isinstance(arguments, str) and isinstance(call_id, str)):
        raise _wrong(field, "needs id, function.name and function.arguments as strings")
    _unicode(arguments, f"{field}.function.arguments")
    return ToolCall(call_id, _unicode(name, f"{field}.function.name"), arguments)


def _part(raw: object, field: str) -> str:
    if not isinstance(raw, dict) or raw.get("type") not in ("text", "input_text", "output_text"):
        raise _wrong(field, "is not a text part; this model reads text only")
    if not isinstance(raw.get("text"), str):
        raise _wrong(f"{field}.text", "must be a string")
    return _unicode(raw["text"], f"{field}.text")


def _unicode(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _wrong(field, "holds half of a surrogate pair; send whole Unicode characters") from None
    return text


def _wrong(field: str, what: str) -> RequestError:
    return RequestError(f"{field} {what}", param=field, code="invalid_value")
