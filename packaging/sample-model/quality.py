"""Writes docs/quality.md: what the committed sample model can and cannot do.

    python quality.py --docs DIR --books DIR            everything that needs the texts and torch (minutes)
    python quality.py --bundle BUNDLE                   only the row "ORT vs torch", for a built bundle
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import convert
import data
import model
import ngram
import numpy as np
import torch
import train
from numpy.typing import NDArray
from tokenizers import Tokenizer

from exporter.checkpoint import Checkpoint
from exporter.engine_process import engine_logits
from exporter.reference import Reference

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FRESH = HERE / "fresh.jsonl"
WINDOW, CONTEXT = 256, 64  # tokens; the first CONTEXT of a window are not scored, except at the start of a file
EVERY_WINDOW = 4  # of the documentation, one window in four is scored: the rest would only cost time
MAX_ANSWER = 64
ORT_MARK = "| ORT vs torch: same top-1 token |"
NOT_MEASURED = f"{ORT_MARK} not measured in this run: `quality.py --bundle BUNDLE` | ≥ 98 % |"


# ---------------------------------------------------------------------------------------------------- bits per byte
def byte_lengths(tokenizer: Tokenizer, size: int) -> NDArray[np.int64]:
    """Bytes of text behind each id; 0 for control tokens. A token of byte-level BPE has one character per byte."""
    added = {number for number, _ in tokenizer.get_added_tokens_decoder().items()}
    return np.array([0 if i in added else len(tokenizer.id_to_token(i) or "") for i in range(size)])


def windows(ids: list[int]) -> list[tuple[list[int], int]]:
    """(window, first scored position): every token but the leading separator is scored once."""
    found, start = [], 0
    while True:
        found.append((ids[start : start + WINDOW + 1], 0 if start == 0 else CONTEXT))
        if start + WINDOW + 1 >= len(ids):
            return found
        start += WINDOW - CONTEXT


@torch.no_grad()
def model_bits(net: model.SampleModel, texts: list[str], tokenizer: Tokenizer, every: int) -> tuple[float, int]:
    """(bits, bytes) of one window in `every`; each text starts after an end-of-text token, as in training."""
    rows = [w for e in tokenizer.encode_batch(texts, add_special_tokens=False) for w in windows([1, *e.ids])][::every]
    rows.sort(key=lambda row: len(row[0]))
    lengths, bits, size = byte_lengths(tokenizer, net.cfg.vocab_size), 0.0, 0
    for at in range(0, len(rows), 8):
        batch = rows[at : at + 8]
        longest = max(len(ids) for ids, _ in batch)
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch])
        logp = net.logits(padded[:, :-1]).log_softmax(-1).gather(2, padded[:, 1:, None]).squeeze(2)
        for (ids, first), line in zip(batch, logp, strict=True):
            bits -= line[first : len(ids) - 1].sum().item() / math.log(2)
            size += int(lengths[ids[first + 1 :]].sum())
    return bits, size


# ---------------------------------------------------------------------------------------------------- manual
@dataclass(frozen=True)
class Score:
    exact: int
    total: int

    def __str__(self) -> str:
        return f"{self.exact} of {self.total} ({100 * self.exact / max(1, self.total):.1f} %)"


def next_tokens(net: model.SampleModel, rows: list[list[int]]) -> list[list[int]]:
    """The greedy choice after every position of every row."""
    longest = max(map(len, rows))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows])
    best = net.logits(padded).argmax(-1)
    return [line[: len(ids)].tolist() for ids, line in zip(rows, best, strict=True)]


@torch.no_grad()
def answers(net: model.SampleModel, prompts: list[str], known: list[str], tokenizer: Tokenizer) -> list[str]:
    """Greedy answers. The `known` answers only save time: of a guess, what the model itself would say is kept."""
    starts = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    guesses = [[*tokenizer.encode(e, add_special_tokens=False).ids, 1] for e in known]
    order = sorted(range(len(prompts)), key=lambda i: len(starts[i]))
    out: dict[int, list[int]] = {}
    for at in range(0, len(order), 32):
        live = {i: list[int]() for i in order[at : at + 32]}
        while live:
            drafts = {i: continued(said, guesses) if said else [] for i, said in live.items()}
            rows = [starts[i] + said + drafts[i] for i, said in live.items()]
            for i, best in zip(list(live), next_tokens(net, rows), strict=True):
                new = best[len(starts[i]) + len(live[i]) - 1 :]
                wrong = (n for n, (a, b) in enumerate(zip(new, drafts[i], strict=False)) if a != b)
                live[i] += new[: next(wrong, len(drafts[i])) + 1]
                if 1 in live[i] or len(live[i]) >= MAX_ANSWER:
                    out[i] = live.pop(i)
    ended = [out[i][: out[i].index(1)] if 1 in out[i] else out[i] for i in range(len(prompts))]
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in ended]


def continued(said: list[int], guesses: list[list[int]]) -> list[int]:
    """The rest of the first guess that begins with what was said; nothing if none does."""
    return next((g[len(said) :] for g in guesses if g[: len(said)] == said), [])


def is_command(fact: data.Fact) -> bool:
    return fact.command.startswith(("solocard", "packaging/", "curl", "pip", "--"))


def manual_scores(
    net: model.SampleModel, facts: list[data.Fact], tokenizer: Tokenizer
) -> tuple[dict[str, Score], list[tuple[str, str, str]]]:
    """Shares of exact answers by kind, and (question, answer, wanted) of fresh wordings for the examples."""
    fresh = {entry["fact"]: entry["questions"] for entry in map(json.loads, FRESH.read_text("utf-8").splitlines())}
    wordings = {"seen": data.Fact.seen, "unseen": lambda fact: fact.unseen, "fresh": lambda fact: fresh[fact.fact]}
    asked = [(f, q, name) for name, of in wordings.items() for f in facts for q in of(f)]
    got = answers(net, [data.prompt(q) for _, q, _ in asked], [f.answer for f in facts], tokenizer)
    scores, shown = {}, []
    for kind, commands in (("commands", True), ("other facts", False)):
        for name in wordings:
            rows = [(f, a) for (f, _, n), a in zip(asked, got, strict=True) if n == name and is_command(f) == commands]
            scores[f"{kind}, {name}"] = Score(sum(f.command in a for f, a in rows), len(rows))
    for name in wordings:
        pair = scores[f"commands, {name}"], scores[f"other facts, {name}"]
        scores[f"all, {name}"] = Score(sum(s.exact for s in pair), sum(s.total for s in pair))
    for (fact, question, name), answer in zip(asked, got, strict=True):
        if name == "fresh":
            shown.append((question, answer, fact.command))
    return scores, shown


# ---------------------------------------------------------------------------------------------------- engine
def probe_ids(tokenizer: Tokenizer, facts: list[data.Fact]) -> list[list[int]]:
    """Prompts for comparing engines: answered manual questions, and one long run of them (over 256 tokens)."""
    texts = [data.prompt(f.seen()[0]) + f.answer for f in facts[::4]]
    texts.append("".join(data.prompt(f.seen()[-1]) + f.answer + data.EOS for f in facts[:16]))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@torch.no_grad()
def reference_agreement(
    net: model.SampleModel, reference: Reference, prompts: list[list[int]]
) -> tuple[float, float]:
    """(share of equal top-1 tokens, mean |Δlogit|) of the training module and the reference, both rounded."""
    same, count, error = 0, 0, 0.0
    for ids in prompts:
        a, b = reference.forward(ids, reference.new_state()), net.logits(torch.tensor([ids]))[0]
        same, count = same + int((a.argmax(1) == b.argmax(1)).sum()), count + len(ids)
        error += float((a - b).abs().mean()) * len(ids)
    return same / count, error / count


@torch.no_grad()
def engine_row(bundle: Path, reference: Reference, prompts: list[list[int]]) -> str:
    """The table row that compares the engine on ``bundle`` with the reference, whole prompts and in chunks."""
    whole = engine_logits(bundle, prompts)
    longest = max(prompts, key=len)
    ragged = engine_logits(bundle, [longest], chunks=[5, 3, 16, 1, 64, len(longest) - 89])
    shares = []
    for group, got in ((prompts, whole), ([longest], ragged)):
        same = [(reference.forward(p, reference.new_state()).argmax(1).numpy() == g.argmax(1))
                for p, g in zip(group, got, strict=True)]
        shares.append(float(np.concatenate(same).mean()))
    tokens = sum(map(len, prompts))
    value = f"{100 * shares[0]:.2f} % of {tokens} tokens; {100 * shares[1]:.2f} % in ragged chunks of {len(longest)}"
    return f"{ORT_MARK} {value} | ≥ 98 % |"


# ---------------------------------------------------------------------------------------------------- page
def training_facts(log: Path) -> dict[str, float]:
    """minutes and cpu_minutes (all runs together) of the training log; step and tokens of the last saved state."""
    runs: list[dict[str, float]] = []
    for line in log.read_text("utf-8").splitlines():
        if line.startswith("start:"):
            runs.append({})
        elif line.startswith("step "):
            runs[-1] |= {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", line)}
        elif line.startswith("saved at step "):
            runs[-1]["step"] = float(line.removeprefix("saved at step ").partition(":")[0])
    tokens = runs[-1]["step"] * train.ROWS * train.LENGTH
    return runs[-1] | {"tokens": tokens, "cpu_minutes": sum(run.get("cpu_s", 0.0) for run in runs) / 60}


def aim(value: float, limit: float, at_most: bool) -> str:
    return "reached" if (value <= limit if at_most else value >= limit) else "**not reached**"


def page(args: argparse.Namespace) -> str:
    """docs/quality.md."""
    checkpoint = Checkpoint.open(args.checkpoint)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    net, facts = convert.load(args.checkpoint), data.load_manual(HERE / "manual_qa.jsonl")
    texts = data.collect(args.docs, args.books)
    parts = {p: [t for t in texts if t.name.startswith(p)] for p in ("docs", "books")}
    size_bytes = sum(p.stat().st_size for p in args.checkpoint.iterdir())
    yardstick = ngram.ByteNgram([t.text.encode() for t in texts if not t.held_out])
    own = {p: ngram.ByteNgram([t.text.encode() for t in group if not t.held_out]) for p, group in parts.items()}
    bits_rows = []
    for part, label in (("docs", "Python documentation"), ("books", "one play")):
        held = [t.text for t in parts[part] if t.held_out]
        bits, scored_bytes = model_bits(net, held, tokenizer, EVERY_WINDOW if part == "docs" else 1)
        mine = ngram.bits_per_byte(bits, scored_bytes)
        base = ngram.bits_per_byte(*yardstick.bits([t.encode() for t in held]))
        best = ngram.bits_per_byte(*own[part].bits([t.encode() for t in held]))
        held_bytes = sum(len(t.encode()) for t in held)
        bits_rows.append(
            f"| {label}, {len(held)} files, {held_bytes:,} bytes ({scored_bytes:,} scored) | **{mine:.3f}** "
            f"| {base:.3f} ({100 * (mine / base - 1):+.1f} %) | {best:.3f} ({100 * (mine / best - 1):+.1f} %) "
            f"| {aim(mine, 0.75 * base, True)} |"
        )
    scores, shown = manual_scores(net, facts, tokenizer)
    reference = Reference.from_checkpoint(checkpoint, kv_sim=True)
    prompts = probe_ids(tokenizer, facts)
    top1, error = reference_agreement(net, reference, prompts)
    engine = engine_row(args.bundle, reference, prompts) if args.bundle else NOT_MEASURED
    parameters = sum(p.numel() for p in net.parameters())
    score_rows = [
        f"| {kind} | {scores[f'{kind}, seen']} | {scores[f'{kind}, unseen']} | {scores[f'{kind}, fresh']} |"
        for kind in ("all", "commands", "other facts")
    ]
    reached = [aim(s.exact / s.total, least, False) for s, least in (
        (scores["all, seen"], 0.9), (scores["all, unseen"], 0.5), (scores["all, fresh"], 0.5))]
    t = training_facts(HERE / "log.txt")
    return TEMPLATE.format(
        parameters=f"{parameters / 1e6:.2f}", size_mb=f"{size_bytes / 2**20:.1f}", steps=int(t["step"]),
        tokens=f"{int(t['tokens']):,}", minutes=f"{t['minutes']:.0f}", cpu_minutes=f"{t['cpu_minutes']:.0f}",
        bits_rows="\n".join(bits_rows),
        contexts=f"{yardstick.contexts:,}", states=f"{yardstick.states:,}", score_rows="\n".join(score_rows),
        seen_aim=reached[0], unseen_aim=reached[1], fresh_aim=reached[2], facts=len(facts),
        top1=f"{100 * top1:.2f}", error=f"{error:.4f}",
        probe_tokens=sum(map(len, prompts)), engine=engine, examples=examples(shown),
    )


def examples(shown: list[tuple[str, str, str]]) -> str:
    """The first wrong and the first right answers among the fresh wordings, unedited."""
    right = [s for s in shown if s[2] in s[1]][:6]
    wrong = [s for s in shown if s[2] not in s[1]][:4]
    clean = [(q, a.replace("\n", " ").replace("|", "\\|"), mark) for rows, mark in ((right, "right"), (wrong, "wrong"))
             for q, a, _ in rows]
    return "\n".join(f"| {q} | {a} | {mark} |" for q, a, mark in clean)


TEMPLATE = """# Quality of the sample model

Written by `packaging/sample-model/quality.py`; do not edit. The model is `packaging/sample-model/checkpoint`:
{parameters} million parameters in the DeepSeek-V4-Flash architecture, {size_mb} MiB in the official checkpoint layout
(FP4 experts, FP8 attention, BF16 embeddings). It was trained from nothing for {minutes} minutes on one shared CPU core
({cpu_minutes} minutes of CPU time): {steps} steps, {tokens} tokens.

**It is a test article with something to say, not an assistant.** It knows sentences of Solocard's manual; it does not
reason, it knows nothing of the world, and a question worded in a new way is often answered with the wrong command.
Nothing here says anything about the real DeepSeek-V4-Flash.

## Bits per byte on held-out text

One file in twenty was never trained on. The yardstick is an order-3 byte n-gram (Witten-Bell, {contexts} contexts,
{states} stored counts) on the same training files; the last column but one is the same n-gram trained on that kind of
text alone. Windows of 256 tokens, at least 64 tokens of context except at the start of a file, all rounding on; the
n-gram is scored on all held-out bytes, the model on those named as scored (every fourth window of the documentation).
Aim: 25 % below the n-gram of all training files.

| held-out text | sample model | order-3 n-gram, all training text | order-3 n-gram, this kind only | aim |
|---|---|---|---|---|
{bits_rows}

## Questions about the manual

{facts} facts. *Seen*: wordings it was trained on. *Unseen*: other wordings of the same facts, never trained on, but
their score steered the recipe. *Fresh*: wordings written when the recipe was fixed, used for nothing but this row. An
answer counts when it contains the exact command, or for other facts the exact key word. Greedy, thinking off, chat
encoding `dsv4-0731`, weights as stored, cache rows rounded as in `kv-v4`.

| | seen | unseen | fresh |
|---|---|---|---|
{score_rows}

Aims: at least 90 % seen: {seen_aim}; at least 50 % unseen: {unseen_aim} (on the fresh wordings: {fresh_aim}).

First right and first wrong answers to fresh wordings, as they came:

| question | answer | |
|---|---|---|
{examples}

## Engines

| comparison | measured | aim |
|---|---|---|
| training module vs reference, both rounded: same top-1 token | {top1} % of {probe_tokens} tokens; mean \
logit difference {error} | |
{engine}
"""


def distillation(before: str) -> str:
    """The section that distill.py wrote, to be kept; "" where there is none."""
    found = re.search(r"<!-- distillation: begin -->.*<!-- distillation: end -->", before, re.DOTALL)
    return f"\n{found[0]}\n" if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, help="folder with the .rst.txt files")
    parser.add_argument("--books", type=Path, help="folder with the *_gut.txt files")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--bundle", type=Path, help="a bundle built from the checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.docs and args.books:
        before = args.out.read_text("utf-8") if args.out.is_file() else ""
        args.out.write_text(page(args) + distillation(before), "utf-8")
        return
    if not args.bundle:
        parser.error("give --docs and --books, or --bundle")
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    reference = Reference.from_checkpoint(Checkpoint.open(args.checkpoint), kv_sim=True)
    row = engine_row(args.bundle, reference, probe_ids(tokenizer, data.load_manual(HERE / "manual_qa.jsonl")))
    lines = args.out.read_text("utf-8").splitlines()
    args.out.write_text("\n".join(row if line.startswith(ORT_MARK) else line for line in lines) + "\n", "utf-8")
    print(row)


if __name__ == "__main__":
    main()
