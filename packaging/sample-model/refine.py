"""The second stage: a trained checkpoint goes on with many more wordings of the manual's questions.

    PYTHONPATH=. python packaging/sample-model/refine.py --docs DIR --books DIR --work DIR --minutes 35

Starts from the weights of an official checkpoint, rounding on from the first step, and ends where `convert.py` begins.
May be stopped and started again.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import convert
import data
import torch
import train

HERE = Path(__file__).resolve().parent
STEPS_BEFORE, MINUTES_BEFORE = 966, 72.3  # of the first stage, for the log
PEAK_RATE, FLAT_UNTIL, WARMUP_STEPS = 0.6, 0.25, 20


class Refiner(train.Trainer):
    """A trainer whose clock goes on where the first stage ended; its rate warms up again and falls in a line."""

    def __init__(self, net: torch.nn.Module, work: Path, budget_s: float) -> None:
        super().__init__(net, work, budget_s)
        self.elapsed_s, self.steps = 60 * MINUTES_BEFORE, STEPS_BEFORE
        self.tokens = STEPS_BEFORE * train.ROWS * train.LENGTH

    @property
    def progress(self) -> float:
        return min(1.0, (self.elapsed_s - 60 * MINUTES_BEFORE) / self.budget_s)

    @property
    def rounding(self) -> bool:
        return True

    def rate(self) -> float:
        warm = min(1.0, (self.steps - STEPS_BEFORE + 1) / WARMUP_STEPS)
        falling = max(0.0, (self.progress - FLAT_UNTIL) / (1 - FLAT_UNTIL))
        return PEAK_RATE * warm * (1 - (1 - train.LAST_LR) * falling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("docs", "books", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--manual", type=Path, default=HERE / "manual_qa.jsonl")
    parser.add_argument("--wordings", type=Path, default=HERE / "wordings.txt")
    parser.add_argument("--manual-share", type=float, default=0.6, help="share of the rows")
    parser.add_argument("--minutes", type=float, default=35.0, help="of this stage, earlier runs of it included")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")  # BF16 inside matrix products where the CPU has it
    torch.manual_seed(args.seed)
    train.fast_rounding()
    args.work.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.checkpoint / "tokenizer.json", args.work / "tokenizer.json")
    tokenizer, ids, bytes_per_token = train.prepare(args)
    trainer = Refiner(convert.load(args.checkpoint), args.work, args.minutes * 60)
    if (args.work / "state.pt").exists():
        trainer.restore()
    manual = data.with_more(data.load_manual(args.manual), args.wordings)
    seed = args.seed + trainer.steps
    batches = data.Batches(ids["docs"], ids["books"], manual, tokenizer, train.LENGTH, seed)
    patterns = sum(len(fact.more) for fact in manual)
    train.say(args.work, f"start: second stage, {patterns} patterns of questions about {len(manual)} facts, "
              f"manual share {args.manual_share}, step {trainer.steps}")
    train.run(trainer, batches, ids["docs-held"], bytes_per_token, args)


if __name__ == "__main__":
    random.seed(0)
    main()
