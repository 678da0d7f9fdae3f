"""Which part of an answer is reasoning and which is content, while it streams.

In thinking mode the answer starts inside reasoning and ``</think>`` ends it, as a control token or spelled out (small
models do that). Afterwards, and without thinking from the start, everything is content: think tags that arrive as
control tokens there are stray and swallowed, while the same letters as text stay, so that a model can write about them.
"""

from __future__ import annotations

from runtime.chat.encoding import END_THINK, THINK
from runtime.chat.stops import partial_suffix
from runtime.request import Delta, DeltaKind


class ReasoningSplitter:
    """Text and tags in, deltas out. What may be the beginning of a spelled-out ``</think>`` is held back."""

    def __init__(self, *, thinking: bool) -> None:
        self._kind: DeltaKind = "reasoning" if thinking else "content"
        self._held = ""

    @property
    def kind(self) -> DeltaKind:
        """Where the next text goes."""
        return self._kind

    def text(self, text: str) -> list[Delta]:
        """Deltas for a piece of text; empty pieces give none."""
        if self._kind == "content":
            return _deltas("content", text)
        pending = self._held + text
        before, tag, after = pending.partition(END_THINK)
        if tag:
            self._held = ""
            self._kind = "content"
            return [*_deltas("reasoning", before), *_deltas("content", after)]
        held = partial_suffix(pending, (END_THINK,))
        self._held = pending[len(pending) - held :]
        return _deltas("reasoning", pending[: len(pending) - held])

    def tag(self, literal: str) -> list[Delta]:
        """Deltas for a control token: ``</think>`` ends reasoning, any other think tag is swallowed."""
        if literal not in (THINK, END_THINK):
            return self.text(literal)
        if self._kind == "content" or literal == THINK:
            return []
        deltas = self.flush()
        self._kind = "content"
        return deltas

    def flush(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return _deltas(self._kind, held)


def _deltas(kind: DeltaKind, text: str) -> list[Delta]:
    return [Delta(kind, text)] if text else []
