"""V4's tool-call markup, read back: only the exact form that a prompt has, anything else is no call.

``<｜DSML｜tool_calls>`` holds ``invoke`` elements with a name, these hold ``parameter`` elements; ``string="true"`` is
raw text, ``"false"`` JSON. There is no escaping, so a value ends at the first closing tag.
"""

from __future__ import annotations

import json
import re
from typing import Any

_MARK = "｜DSML｜"
_OPEN, _CLOSE = f"<{_MARK}tool_calls>", f"</{_MARK}tool_calls>"
_INVOKE = re.compile(f'\\s*<{_MARK}invoke name="([^"\n]*)">(.*?)</{_MARK}invoke>\\s*', re.DOTALL)
_PARAMETER = re.compile(
    f'\\s*<{_MARK}parameter name="([^"\n]*)" string="(true|false)">(.*?)</{_MARK}parameter>\\s*', re.DOTALL
)  # fmt: skip


def parse_calls(text: str) -> tuple[str, list[tuple[str, dict[str, Any]]]] | None:
    """The text before the block, and (name, arguments) of each call; None unless all of it has the exact form."""
    before, opened, rest = text.partition(_OPEN)
    inside, closed, after = rest.rpartition(_CLOSE)
    if not opened or not closed or after.strip() or _MARK in before:
        return None
    calls: list[tuple[str, dict[str, Any]]] = []
    for name, body in _elements(_INVOKE, inside) or [("", "")]:
        arguments = _arguments(body)
        if not name or arguments is None:
            return None
        calls.append((name, arguments))
    return before, calls


def _arguments(body: str) -> dict[str, Any] | None:
    found = _elements(_PARAMETER, body)
    if found is None:
        return None
    arguments: dict[str, Any] = {}
    for key, is_text, value in found:
        if key in arguments:
            return None
        try:
            arguments[key] = value if is_text == "true" else json.loads(value)
        except (ValueError, RecursionError):
            return None
    return arguments


def _elements(pattern: re.Pattern[str], text: str) -> list[tuple[str, ...]] | None:
    """The groups of every element; None when something else stands between them."""
    found: list[tuple[str, ...]] = []
    at = 0
    while at < len(text):
        match = pattern.match(text, at)
        if match is None:
            return None if text[at:].strip() else found
        found.append(match.groups())
        at = match.end()
    return found
