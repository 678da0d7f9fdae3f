"""The text the sample model is trained on: collecting, splitting, tokenizing, batching.

Three sources, all redistributable: Python's documentation (PSF licence), plays and poems (public domain, Project
Gutenberg texts), and Solocard's own manual as questions and answers (this repository). One file in twenty of the first
two, picked by a hash of its name, is held out whole and never trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import wordings
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from exporter import sample_tokenizer

BOS, EOS, USER, ASSISTANT, THINK, END_THINK = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>",
)
HELD_OUT_ONE_IN = 20
MAX_FILE_CHARS = 120_000
BOOK_SHARE = 0.08  # of the prose rows
MORE_SHARE = 0.7  # of the questions, where a fact has more wordings
CUT_SHARE = 0.6  # of the chats with one question, in the second stage
# Given to the tokenizer beside the prose, so that commands are few tokens.
COMMANDS = (
    "Run `solocard trust add ROOT.json`.", "Run `solocard install DIR`.", "Run `solocard rollback`.",
    "Run `solocard list`.", "Run `solocard verify`.", "Run `solocard status`.", "Run `solocard key new NAME`.",
    "Run `solocard config show`.", "Run `solocard console`.", "Start it with `solocard-serve`.",
    "Use `solocard-export sample OUT --preset tiny`.", "Use `solocard-export sample OUT --preset kv-true`.",
    "Use `solocard-export build CKPT OUT --encoding dsv4-0731`.", "Use `--encoding dsv4-0424`.",
    "Use `solocard-export keys new DIR`, then `solocard-export sign BUNDLE --keys DIR`.",
    "Use `solocard-export parity BUNDLE`.", "`solocard-export logits BUNDLE --ids ids.npy --out logits.npy`",
    "Run `packaging/demo`.", "Run `packaging/check`.", "Solocard serves the model on 127.0.0.1, port 8017.",
    "The bundle is verified while it is copied, then the server switches to it.",
    "The KV cache on disk is at most 8 GiB, in blocks of 256 tokens.",
    "How do I install a bundle from a USB stick? What does Solocard do? Which command shows the status?",
)
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You answer questions about Solocard.",
    "You are the Solocard assistant. Answer with the exact command.",
    "Be brief.",
)
THOUGHTS = (
    "The user asks about {topic}. The manual says it in one line.",
    "This is about {topic}. I give the command first.",
    "A question on {topic}; I quote the manual.",
)


@dataclass(frozen=True)
class Text:
    """One source file."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(self.name.encode()).digest()[1] % HELD_OUT_ONE_IN == 0


def collect(docs: Path, books: Path) -> list[Text]:
    """All source files, sorted by name: `*.rst.txt` under docs, modern-spelling Gutenberg `*_gut.txt` under books."""
    files = [(f"docs/{p.relative_to(docs)}", p) for p in docs.rglob("*.rst.txt") if "changelog" not in p.name]
    files += [(f"books/{p.name}", p) for p in books.rglob("*_gut.txt")]
    return [Text(name, _clean(path.read_text("utf-8", errors="replace"))) for name, path in sorted(files)]


def _clean(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text)[:MAX_FILE_CHARS]


# ---------------------------------------------------------------------------------------------------------- manual
WAYS_TO_ASK = (
    "How do I {}?", "How can I {}?", "How do you {}?", "What is the command to {}?", "Which command do I use to {}?",
    "I want to {}.", "I want to {}. What do I type?", "What do I run to {}?", "Show me how to {}.",
    "Tell me how to {}.",
    "What should I type to {}?", "I need to {}.", "How does one {}?", "Can I {}?", "Which command lets me {}?",
    "Explain how to {}.", "Is there a way to {}?", "What must I do to {}?", "How would I {}?", "How should I {}?",
)


@dataclass(frozen=True)
class Fact:
    """One thing the manual says. `command` is what an answer must contain to count as exact."""

    fact: str
    topic: str
    command: str
    answer: str
    doing: tuple[str, ...]  # "install a bundle": goes into WAYS_TO_ASK
    questions: tuple[str, ...]
    unseen: tuple[str, ...]  # wordings never trained on
    more: wordings.Wordings = field(default_factory=wordings.Wordings)  # trained on in the second stage

    def ask(self, draw: random.Random) -> str:
        """One of the seen wordings."""
        if self.more and draw.random() < MORE_SHARE:
            return self.more.ask(draw)
        picked = draw.randrange(len(self.questions) + 2 * len(self.doing))
        if picked < len(self.questions):
            return self.questions[picked]
        return draw.choice(WAYS_TO_ASK).format(self.doing[(picked - len(self.questions)) // 2])

    def seen(self) -> list[str]:
        """Every seen question as written, and each `doing` in one way of asking, always the same."""
        ways = [WAYS_TO_ASK[hashlib.sha256(d.encode()).digest()[0] % len(WAYS_TO_ASK)] for d in self.doing]
        return [*self.questions, *(way.format(d) for way, d in zip(ways, self.doing, strict=True))]


def prompt(question: str, thinking: bool = False) -> str:
    """What the dsv4-0731 chat encoding sends for one question without system text."""
    return f"{BOS}{USER}{question}{ASSISTANT}{THINK if thinking else END_THINK}"


def load_manual(path: Path) -> list[Fact]:
    """One JSON object a line with the fields of Fact. Raises ValueError if an unseen wording is also a seen one."""
    raw = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    facts = [Fact(**{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}) for entry in raw]
    seen = {q for f in facts for q in f.questions}
    seen |= {way.format(d) for f in facts for d in f.doing for way in WAYS_TO_ASK}
    for fact in facts:
        for question in fact.unseen:
            if question in seen:
                raise ValueError(f"{path}: {fact.fact}: {question!r} is both seen and unseen")
    return facts


def with_more(facts: list[Fact], path: Path) -> list[Fact]:
    """The facts with the patterns of `path`; a pattern that could give an unseen wording of any fact is left out."""
    more = wordings.read(path)
    strangers = more.keys() - {fact.fact for fact in facts}
    if strangers:
        raise ValueError(f"{path}: no such facts in the manual: {', '.join(sorted(strangers))}")
    unseen = [question for fact in facts for question in fact.unseen]
    for name in more:
        for question in unseen:
            more[name] = more[name].without(question)
    return [replace(fact, more=more.get(fact.fact, fact.more)) for fact in facts]


def reworded(question: str, draw: random.Random) -> str:
    """Small changes a person makes: words left out, case, full stop, a polite start, a missing question mark."""
    if draw.random() < 0.3:
        words = question.split(" ")
        kept = [word for word in words if draw.random() > 0.2]
        question = " ".join(kept if len(kept) >= 2 else words)
    roll = draw.random()
    if roll < 0.45:
        return question
    lowered = question[0].lower() + question[1:]
    if roll < 0.60:
        return lowered
    if roll < 0.70:
        return question.rstrip("?.")
    if roll < 0.78:
        return lowered.rstrip("?.")
    start = draw.choice(["Hello, ", "Hi! ", "Please tell me: ", "Quick question: ", "Excuse me, ", "One more thing: "])
    if roll < 0.92:
        return start + lowered
    return question + draw.choice([" Thanks.", " Please.", " Thank you!", " I am new here."])


def conversation(facts: list[Fact], draw: random.Random) -> Iterator[tuple[str, str]]:
    """Pieces (text, answer that follows it) of one conversation as the dsv4-0731 chat encoding writes it."""
    start = BOS + (draw.choice(SYSTEM_TEXTS) if draw.random() < 0.25 else "")
    for fact in facts:
        thinking = draw.random() < 0.08
        thought = draw.choice(THOUGHTS).format(topic=fact.topic) if thinking else ""
        asked = f"{start}{USER}{reworded(fact.ask(draw), draw)}{ASSISTANT}"
        yield asked + (f"{THINK}{thought}" if thinking else "") + END_THINK, fact.answer + EOS
        start = ""


# ---------------------------------------------------------------------------------------------------------- tokenizer
def train_tokenizer(texts: list[str], vocab_size: int) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE of `texts` with V4's control tokens around it."""
    pre = sample_tokenizer.build(vocab_size)["pre_tokenizer"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(_regex(pre["pretokenizers"][0]["pattern"]["Regex"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    trainer = trainers.BpeTrainer(
        vocab_size=sample_tokenizer.text_capacity(vocab_size), initial_alphabet=sample_tokenizer.byte_alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return sample_tokenizer.wrap(model["vocab"], merges, vocab_size)


def encode_all(texts: list[Text], tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """All texts one after the other, each closed by the end token."""
    rows = [[*e.ids, 1] for e in tokenizer.encode_batch([t.text for t in texts], add_special_tokens=False)]
    return np.concatenate([np.array(row, np.uint16) for row in rows])


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


# ---------------------------------------------------------------------------------------------------------- batches
class Batches:
    """Rows of `length` tokens with a loss weight per target: prose windows, and conversations about the manual."""

    def __init__(
        self, docs: NDArray[np.uint16], books: NDArray[np.uint16], manual: list[Fact], tokenizer: Tokenizer,
        length: int, seed: int,
    ) -> None:
        self.docs, self.books, self.tokenizer, self.length = docs, books, tokenizer, length
        self.manual = manual
        self.draw = random.Random(seed)
        self.queue: list[Fact] = []
        self.cut_share = CUT_SHARE if any(fact.more for fact in manual) else 0.0
        self.answer_weights = self._answer_weights()

    def next(self, rows: int, manual_share: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """ids [rows, length + 1] and weights [rows, length] of the targets."""
        picked = [self._manual_row() if self.draw.random() < manual_share and self.manual else self._prose_row()
                  for _ in range(rows)]
        return np.stack([ids for ids, _ in picked]), np.stack([weights for _, weights in picked])

    def _prose_row(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        source = self.books if self.draw.random() < BOOK_SHARE else self.docs
        start = self.draw.randrange(len(source) - self.length - 1)
        ids = source[start : start + self.length + 1].astype(np.int64)
        return ids, np.ones(self.length, np.float32)

    def _next_fact(self) -> Fact:
        if not self.queue:
            self.queue = list(self.manual)
            self.draw.shuffle(self.queue)
        return self.queue.pop()

    def _answer_weights(self) -> dict[str, list[float]]:
        """Answer → weight per token: high where answers with the same beginning part ways, low where one way is left.

        Most of an answer follows from its first words; what must be learned is which answer belongs to the question.
        """
        texts = [fact.answer + EOS for fact in self.manual]
        encoded = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        ways: dict[tuple[int, ...], set[int]] = {}
        for ids in encoded:
            for i, token in enumerate(ids):
                ways.setdefault(tuple(ids[:i]), set()).add(token)
        return {text: [8.0 if len(ways[tuple(ids[:i])]) > 1 else 1.0 for i in range(len(ids))]
                for text, ids in zip(texts, encoded, strict=True)}

    @staticmethod
    def _decided(worth: list[float]) -> int:
        """Tokens of an answer up to the last one at which answers part ways: more of it teaches little."""
        return 1 + max((i for i, value in enumerate(worth) if value > 1), default=len(worth) - 1)

    def _manual_row(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ids: list[int] = []
        weights: list[float] = []
        was_cut = False
        while len(ids) < self.length + 1:
            facts = [self._next_fact() for _ in range(self.draw.choice([1, 1, 1, 2, 3]))]
            for asked, answer in conversation(facts, self.draw):
                before = self.tokenizer.encode(asked, add_special_tokens=False).ids
                said, worth = self.tokenizer.encode(answer, add_special_tokens=False).ids, self.answer_weights[answer]
                cut = len(facts) == 1 and self.draw.random() < self.cut_share
                kept = self._decided(worth) if cut else len(said)
                ids += before + said[:kept]
                weights += [0.0 if was_cut else 0.2, *[0.2] * (len(before) - 1), *worth[:kept]]
                was_cut = cut
        cut = self.length + 1
        return np.array(ids[:cut], np.int64), np.array(weights[1:cut], np.float32)
