"""One table of everything a key can do: bindings, the key line, the help and the palette all come from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ui.strings.base import Strings

if TYPE_CHECKING:
    from textual.binding import BindingType

EVERYWHERE = "app"
MODES = ("overview", "models", "logs", "cache")


@dataclass(frozen=True, slots=True)
class Action:
    """``name`` is the method ``action_<name>`` and the fields ``<name>``, ``<name>_help`` of Strings.

    ``keys`` are textual's key names; ``shown`` is how people write the first; ``scope`` is "app" or a screen's name.
    """

    name: str
    keys: str
    shown: str
    scope: str = EVERYWHERE

    def label(self, strings: Strings) -> str:
        return str(getattr(strings, self.name))

    def explanation(self, strings: Strings) -> str:
        return str(getattr(strings, f"{self.name}_help"))


ACTIONS = (
    Action("overview", "f1", "F1"),
    Action("models", "f2", "F2"),
    Action("logs", "f3", "F3"),
    Action("cache", "f4", "F4"),
    Action("activate", "a", "a", "models"),
    Action("rollback", "b", "b", "models"),
    Action("reload", "r", "r", "models"),
    Action("filter", "slash", "/", "logs"),
    Action("follow", "f", "f", "logs"),
    Action("purge", "p", "p", "cache"),
    Action("verify", "v", "v", "cache"),
    Action("renew", "r", "r", "cache"),
    Action("help", "question_mark", "?"),
    Action("palette", "colon,ctrl+p", ":"),
    Action("quit", "q,ctrl+q,ctrl+c", "q"),
)


def in_scope(scope: str) -> tuple[Action, ...]:
    """The actions of one scope, in the table's order."""
    return tuple(action for action in ACTIONS if action.scope == scope)


def bindings(scope: str) -> list[BindingType]:
    """(keys, action, description) for textual's BINDINGS."""
    return [(action.keys, action.name, action.name) for action in in_scope(scope)]


def hints(scope: str, strings: Strings) -> tuple[tuple[str, str], ...]:
    """(key, label) for the line at the bottom: the screen's own keys first; the F keys stand in the title line."""
    general = [a for a in in_scope(EVERYWHERE) if a.name not in MODES]
    return tuple((a.shown, a.label(strings)) for a in (*in_scope(scope), *general))
