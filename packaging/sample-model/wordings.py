"""The many ways to ask about a fact: `wordings.txt`, patterns with alternatives, drawn at random while training.

A line under `[fact]` is "- question" or "+ phrase"; a phrase is put into one of WAYS. `(a|b|)` picks one alternative,
which may be empty; alternatives do not nest.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from pathlib import Path

GROUP = re.compile(r"\(([^()]*\|[^()]*)\)")
WAYS = (
    "How do I {}?", "How can I {}?", "What is the command to {}?", "Which command do I use to {}?", "I want to {}.",
    "What do I run to {}?", "Show me how to {}.", "Tell me how to {}.", "What should I type to {}?", "I need to {}.",
    "Can I {}?", "Is there a way to {}?", "What must I do to {}?", "How should I {}?", "I would like to {}.",
    "Help me {}.", "What is the best way to {}?", "I have to {}.", "Please {}.", "How to {}?", "{}", "{} command",
    "I am trying to {}.", "Is it possible to {}?", "My boss wants me to {}.", "We must {}. How?",
    "Someone asked me to {}. How?", "Could you tell me how to {}?", "Give me the command to {}.", "Steps to {}?",
    "What do I enter to {}?", "Which tool do I need to {}?", "It is time to {}. What do I type?", "We want to {}.",
    "How does an admin {}?", "Before I go home I must {}.", "Do you know how to {}?", "What lets me {}?",
)


@dataclass(frozen=True)
class Wordings:
    """Patterns of one fact."""

    phrases: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.phrases) + len(self.questions)

    def ask(self, draw: random.Random) -> str:
        """One wording; a phrase, with its many ways of asking, is picked twice as often as a question."""
        picked = draw.randrange(2 * len(self.phrases) + len(self.questions))
        if picked >= 2 * len(self.phrases):
            return one_of(self.questions[picked - 2 * len(self.phrases)], draw)
        asked = draw.choice(WAYS).format(one_of(self.phrases[picked // 2], draw))
        return asked[0].upper() + asked[1:]

    def may_say(self, question: str) -> bool:
        """Whether `question` is one of these wordings, but for case and for spaces."""
        return len(self.without(question)) < len(self)

    def without(self, question: str) -> Wordings:
        """The patterns that cannot give `question`."""
        phrases = [found[1] for found in (way.fullmatch(question.strip()) for way in asked_ways()) if found]
        return Wordings(
            tuple(p for p in self.phrases if not any(compiled(p).fullmatch(phrase) for phrase in phrases)),
            tuple(q for q in self.questions if not compiled(q).fullmatch(question.strip())),
        )


def one_of(pattern: str, draw: random.Random) -> str:
    """The pattern with each group of alternatives replaced by one of them."""
    said = GROUP.sub(lambda group: draw.choice(group[1].split("|")), pattern)
    return " ".join(said.split())


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """What the pattern can say, in any case and with any spaces."""
    parts = GROUP.split(pattern)  # text, alternatives, text, …
    glued = [
        "(?:" + "|".join(map(re.escape, part.split("|"))) + ")" if i % 2 else re.escape(part)
        for i, part in enumerate(parts)
    ]
    return re.compile("".join(glued).replace(r"\ ", r"\s*"), re.IGNORECASE)


@functools.cache
def asked_ways() -> tuple[re.Pattern[str], ...]:
    """Each way of asking, with its phrase as the group."""
    return tuple(re.compile(re.escape(way).replace(r"\{\}", "(.+)"), re.IGNORECASE) for way in WAYS)


def read(path: Path) -> dict[str, Wordings]:
    """Fact name → its wordings. Raises ValueError for a line that is neither a heading, a pattern nor a comment."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("[") and line.endswith("]"):
            phrases, questions = found.setdefault(line[1:-1], ([], []))
        elif line.startswith("+ ") and found:
            phrases.append(line[2:])
        elif line.startswith("- ") and found:
            questions.append(line[2:])
        elif line and not line.startswith("#"):
            raise ValueError(f"{path}: line {number}: expected [fact], '+ phrase' or '- question', found {line!r}")
    return {fact: Wordings(tuple(p), tuple(q)) for fact, (p, q) in found.items()}
