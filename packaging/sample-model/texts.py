"""Writes calibration.jsonl and evaluation.jsonl: what the export pipeline observes and is judged on, on this model.

    PYTHONPATH=. python packaging/sample-model/texts.py --docs DIR --books DIR
    PYTHONPATH=. python packaging/sample-model/texts.py --docs DIR --books DIR --training FILE

With --training only that file is written: more text of the calibration's sources, other windows of them, to train on.

One line is one sequence, {"domain", "text"}; control tokens stand in the text as the tokenizer reads them. Calibration
prose comes from training files only, evaluation prose from held-out files only. Wordings of the manual are split by a
hash: the model was trained on all of them, but no wording in one file is in the other. Same inputs, same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import data
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
LINE_TOKENS = 512  # at most, in one sequence that is not one of the long ones
LONG_TOKENS = 1024  # at least, in a long one
SHORTEST_TOKENS = 64
EVALUATION_WORDING_ONE_IN = 8
CALIBRATION_TOKENS = {"docs": 58_000, "plays": 18_000, "manual": 25_000}
EVALUATION_TOKENS = {"docs": 5_000, "plays": 2_000, "manual": 3_000}
LONG_SEQUENCES = {"docs": 3, "plays": 1}
HOSTS = re.compile(r"\bpypi\.[a-z]+")  # the package index: this repository names no such host
NOT_THE_TEXT = ("gutenberg", "etext", "copyright")  # notices around the plays


class Windows:
    """Whole lines of one file at a time, as many as fit."""

    def __init__(self, texts: list[data.Text], tokenizer: Tokenizer, draw: random.Random) -> None:
        self.texts, self.tokenizer, self.draw = texts, tokenizer, draw

    def tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def window(self, most_tokens: int) -> str:
        """Lines of a file picked by its size, from a line picked by chance; "" where a notice is in the way."""
        source = self.draw.choices(self.texts, [len(t.text) for t in self.texts])[0].text
        start = source.find("\n", self.draw.randrange(len(source))) + 1
        lines = source[start : start + 6 * most_tokens].splitlines(keepends=True)
        while lines and self.tokens("".join(lines)) > most_tokens:
            lines = lines[: max(0, len(lines) - max(1, len(lines) // 40))]
        found = "".join(lines)
        return "" if any(word in found.lower() for word in NOT_THE_TEXT) else found

    def take(self, total_tokens: int, most_tokens: int = LINE_TOKENS, least_tokens: int = SHORTEST_TOKENS
             ) -> Iterator[str]:
        """Windows until they hold `total_tokens`; those under `least_tokens` are skipped."""
        taken = 0
        while taken < total_tokens:
            text = self.window(most_tokens)
            count = self.tokens(text)
            if count >= least_tokens:
                taken += count
                yield text


def for_evaluation(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[2] % EVALUATION_WORDING_ONE_IN == 0


def wordings(facts: list[data.Fact], evaluation: bool) -> list[tuple[data.Fact, str]]:
    """Every training wording of every fact that belongs to this file, in the order of the manual."""
    found = []
    for fact in facts:
        asked = [*fact.questions, *(way.format(doing) for doing in fact.doing for way in data.WAYS_TO_ASK)]
        found += [(fact, question) for question in dict.fromkeys(asked) if for_evaluation(question) == evaluation]
    return found


def conversations(asked: list[tuple[data.Fact, str]], total_tokens: int, windows: Windows) -> Iterator[str]:
    """Chats one after the other, as a training row holds them, cut only between chats."""
    draw, taken = windows.draw, 0
    while taken < total_tokens:
        text = ""
        while True:
            fact, question = asked[draw.randrange(len(asked))]
            longer = f"{text}{data.prompt(question)}{fact.answer}{data.EOS}"
            if windows.tokens(longer) > LINE_TOKENS:
                break
            text = longer
        taken += windows.tokens(text)
        yield text


def lines(
    args: argparse.Namespace, name: str, budget: dict[str, int], evaluation: bool = False
) -> Iterator[tuple[str, str]]:
    """(domain, text) of one file; ``name`` begins the draw. Held-out sources for ``evaluation``, else the others."""
    tokenizer = Tokenizer.from_file(str(HERE / "checkpoint" / "tokenizer.json"))
    draw = random.Random(name)
    texts = [t for t in data.collect(args.docs, args.books) if t.held_out == evaluation]
    for domain, folder in (("docs", "docs/"), ("plays", "books/")):
        windows = Windows([t for t in texts if t.name.startswith(folder)], tokenizer, draw)
        yield from ((domain, text) for text in windows.take(budget[domain]))
        if evaluation:
            size = LONG_TOKENS * LONG_SEQUENCES[domain]
            yield from ((domain, text) for text in windows.take(size, LONG_TOKENS + 128, LONG_TOKENS))
    asked = wordings(data.load_manual(HERE / "manual_qa.jsonl"), evaluation)
    chats = conversations(asked, budget["manual"], Windows([], tokenizer, draw))
    yield from (("manual", text) for text in chats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="folder with the .rst.txt files")
    parser.add_argument("--books", type=Path, required=True, help="folder with the *_gut.txt files")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--training", type=Path, metavar="FILE", help="write this one instead of the two")
    parser.add_argument("--tokens", type=int, nargs=3, default=[1_500_000, 500_000, 200_000],
                        metavar=("DOCS", "PLAYS", "MANUAL"), help="how much of each domain in FILE")  # fmt: skip
    parser.add_argument("--draw", default="training", help="another name draws other windows (default: training)")
    args = parser.parse_args()
    if args.training:
        write(args.training, lines(args, args.draw, dict(zip(CALIBRATION_TOKENS, args.tokens, strict=True))))
        return
    write(args.out / "calibration.jsonl", lines(args, "calibration", CALIBRATION_TOKENS))
    write(args.out / "evaluation.jsonl", lines(args, "evaluation", EVALUATION_TOKENS, True))


def write(path: Path, found: Iterator[tuple[str, str]]) -> None:
    rows = [json.dumps({"domain": domain, "text": HOSTS.sub("example.org", text)}, ensure_ascii=False)
            for domain, text in found]  # fmt: skip
    path.write_text("\n".join(rows) + "\n", "utf-8")
    print(f"{path.name}: {len(rows)} sequences, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
