"""What the console knows of the server: one frozen object, replaced at every answer. No textual here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from appliance.wire import Status

HISTORY_LENGTH = 240  # rates kept for the sparklines: four minutes at one look per second


@dataclass(frozen=True, slots=True)
class ServerView:
    """The last answer, or why there is none. ``link`` is asking | up | down | unreadable."""

    link: str = "asking"
    status: Status | None = None  # kept only while the server answers
    problem: str = ""
    prefill_history: tuple[float, ...] = ()  # tokens/s, oldest first
    decode_history: tuple[float, ...] = ()

    def answered(self, status: Status) -> ServerView:
        """The view after ``status`` arrived."""
        return ServerView(
            link="up",
            status=status,
            prefill_history=(*self.prefill_history, status.prefill_tokens_per_s)[-HISTORY_LENGTH:],
            decode_history=(*self.decode_history, status.decode_tokens_per_s)[-HISTORY_LENGTH:],
        )

    def lost(self, problem: str, *, down: bool) -> ServerView:
        """The view after a look failed: the server is down, or its answer could not be read.

        The histories go on with zeros, so that a gap is seen as a gap.
        """
        return dataclasses.replace(
            self,
            link="down" if down else "unreadable",
            status=None,
            problem=problem,
            prefill_history=(*self.prefill_history, 0.0)[-HISTORY_LENGTH:] if self.prefill_history else (),
            decode_history=(*self.decode_history, 0.0)[-HISTORY_LENGTH:] if self.decode_history else (),
        )

    @property
    def state(self) -> str:
        """starting | ready | draining as the server says, else asking | down | unreadable."""
        return self.status.state if self.status is not None else self.link
