"""The tokens of one answer → deltas a client sees: whole characters, reasoning apart, stop strings cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.chat.encoding import END_THINK, EOS, THINK
from runtime.chat.reasoning import ReasoningSplitter
from runtime.chat.replay import replays_of
from runtime.chat.stops import StopScanner
from runtime.request import Delta, DeltaKind
from runtime.tokenizer import TextStream, Tokenizer


class Transcript:
    """Takes tokens in order. Stop strings are looked for in content only: reasoning is not what a client cut short.

    Control tokens other than the think tags are shown as their literals where the tokenizer does not mark them special
    (the tool markup), and swallowed otherwise.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, thinking: bool, stop: Sequence[str] = (), replayed: bool = False
    ) -> None:  # fmt: skip
        self._tokenizer, self._replayed = tokenizer, replayed
        self._text = TextStream(tokenizer)
        self._splitter = ReasoningSplitter(thinking=thinking)
        self._scanner = StopScanner(stop)
        self._reasoning_tokens = 0
        self._thinking = thinking
        self._said: dict[DeltaKind, list[str]] = {"reasoning": [], "content": []}  # what the client was shown

    @property
    def stopped(self) -> bool:
        """A stop string was found: the answer ends here."""
        return self._scanner.stopped

    @property
    def reasoning_tokens(self) -> int:
        """Tokens up to and with the end of reasoning."""
        return self._reasoning_tokens

    def push(self, token: int) -> list[Delta]:
        """Deltas that this token completes; often none."""
        if self._splitter.kind == "reasoning":
            self._reasoning_tokens += 1
        literal = self._tokenizer.control_literal(token)
        if literal is None:
            return self._shown(self._splitter.text(self._text.push(token)))
        deltas = self._splitter.text(self._text.flush())
        if literal in (THINK, END_THINK) or not self._tokenizer.is_special(token):
            deltas += self._splitter.tag(literal)
        return self._shown(deltas)

    def flush(self) -> list[Delta]:
        """Everything still held back; call once, at the end."""
        deltas = self._shown([*self._splitter.text(self._text.flush()), *self._splitter.flush()])
        rest = self._scanner.flush()
        return [*deltas, *self._noted([Delta("content", rest)] if rest else [])]

    def replays(self, tokens: Sequence[int]) -> Mapping[str, Sequence[int]]:
        """What to keep so that this answer of ``tokens``, sent back as it was shown, gives the same ids again.

        Nothing unless ``replayed``.
        """
        if not self._replayed:
            return {}
        reasoning, content = "".join(self._said["reasoning"]), "".join(self._said["content"])
        return replays_of(
            self._tokenizer, tokens, reasoning=reasoning if self._thinking else None, content=content,
            end_id=self._tokenizer.control_id(EOS),
        )  # fmt: skip

    def _shown(self, deltas: list[Delta]) -> list[Delta]:
        shown = []
        for delta in deltas:
            text = delta.text if delta.kind == "reasoning" else self._scanner.push(delta.text)
            if text:
                shown.append(Delta(delta.kind, text))
        return self._noted(shown)

    def _noted(self, deltas: list[Delta]) -> list[Delta]:
        for delta in deltas:
            self._said[delta.kind].append(delta.text)
        return deltas
