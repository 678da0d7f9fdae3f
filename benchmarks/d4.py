"""D4 alone, nothing cut: a checkpoint's attention and shared experts in FP4, several ways, against itself in FP8.

    solocard-export observe CKPT --texts calibration.jsonl --hessian 4096 --out STATS
    python benchmarks/d4.py CKPT --stats STATS --texts evaluation.jsonl [--tokens 4096]

Prints mean and 99th-percentile KL(FP8 ‖ FP4) in nats and equal top-1 tokens over the texts (every text cut to the same
share). The head stays BF16 but for the last row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from exporter.calibration import read_texts  # noqa: E402
from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.forced import forced_logits  # noqa: E402
from exporter.quantize.dense import Method  # noqa: E402
from exporter.quantize.run import Options, quantize  # noqa: E402
from exporter.view import View  # noqa: E402

Ids = Sequence[Sequence[int]]
ROWS = {
    "plain": ("best of 3 scales", Method(), False, False),
    "weighted": ("weighted by activations", Method(), True, False),
    "gptq": ("GPTQ", Method("gptq"), True, False),
    "gptq-act": ("GPTQ, act-order", Method("gptq", act_order=True), True, False),
    "mr-32": ("MR-GPTQ, block 32", Method("mr-gptq", 32), True, False),
    "mr-64": ("MR-GPTQ, block 64", Method("mr-gptq", 64), True, False),
    "gptq-head": ("GPTQ, head FP8", Method("gptq"), True, True),
}


def log_probabilities(view: View, ids: Ids, work: Path) -> list[np.ndarray]:
    return [torch.from_numpy(rows).log_softmax(-1).numpy() for rows in forced_logits(view, ids, work=work)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--stats", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--linears", action="append", default=[], help="glob of linears, as quantize --only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    view = View(Checkpoint.open(args.checkpoint))
    texts = read_texts(args.texts, view)
    share = min(1.0, args.tokens / sum(len(text.ids) for text in texts))
    ids = [text.ids[: max(2, round(len(text.ids) * share))] for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        teacher = log_probabilities(view, ids, work / "teacher")
        print(f"{sum(map(len, ids)):,} tokens of {len(ids)} texts\n\n| D4 | KL | p99 KL | top-1 | CPU-s |")
        print("|---|---|---|---|---|", flush=True)
        for key in args.only:
            label, method, observed, head = ROWS[key]
            started = time.process_time()
            options = Options(True, head, method, tuple(args.linears), args.stats if observed else None)
            student = view.over(quantize(view, options, work / key))
            spent_s = time.process_time() - started
            kl, same = [], []
            for p, q in zip(teacher, log_probabilities(student, ids, work / f"{key}.work"), strict=True):
                kl.append((np.exp(p) * (p - q)).sum(-1))
                same.append(p.argmax(-1) == q.argmax(-1))
            every = np.concatenate(kl)
            top1 = np.concatenate(same).mean()
            print(f"| {label} | {every.mean():.4f} | {np.quantile(every, 0.99):.3f} | {top1:.3f} | {spent_s:.1f} |",
                  flush=True)


if __name__ == "__main__":
    main()
