"""``solocard-export distill teacher``: what the teacher says after each token of the texts, cached once."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from appliance.errors import UsageError
from exporter.calibration import Text, read_texts, texts_sha256
from exporter.distill import cache
from exporter.progress import Progress
from exporter.stage import StageFolder, code_version
from exporter.view import View
from exporter.view_arguments import add_view_arguments, open_view

BATCH_TOKENS = 2048  # padded tokens the model sees at once


def add_command(subparsers: Any) -> None:
    """Add ``teacher CKPT --texts FILE --out CACHE [--layerwise]``; its ``func`` returns the exit code."""
    parser = subparsers.add_parser("teacher", help="cache the teacher's next-token probabilities on the texts")
    add_view_arguments(parser)
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE", help="JSON lines: domain and text or ids")
    parser.add_argument("--out", type=Path, required=True, metavar="CACHE", help="folder of the cache")
    parser.add_argument("--layerwise", action="store_true", help="one layer in memory, for models that do not fit")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens of the file")
    parser.add_argument("--device", choices=("cpu", "cuda", "npu"), default="cpu", help="where to compute")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens}: expected at least 1")
    view = open_view(args)
    texts = read_texts(args.texts, view, max_tokens=args.max_tokens)
    tokens = write_cache(view, texts, args.out, texts_sha256(args.texts), layerwise=args.layerwise, device=args.device)
    print(f"wrote {args.out}: {tokens:,} tokens of {len(texts):,} texts")
    return 0


def write_cache(
    view: View, texts: Sequence[Text], out: Path, texts_digest: str, *, layerwise: bool = False, device: str = "cpu"
) -> int:
    """Write the cache of ``view`` on ``texts``; returns its tokens. Parts that are there from a killed run are kept."""
    lengths = [len(text.ids) for text in texts]
    folder = StageFolder(out, {
        "stage": "teacher", "model": view.recipe_sha256, "texts_sha256": texts_digest, "tokens": sum(lengths),
        "format": cache.FORMAT, "top": cache.TOP, "drawn": cache.DRAWN, "layerwise": layerwise,
    })  # fmt: skip
    parts = cache.parts_of(lengths)
    if not folder.has(cache.CLOSING):
        missing = [p for p in range(len(parts)) if not folder.has(cache.part_name(p))]
        progress = Progress("teacher", sum(lengths), "tokens")
        progress.resume(sum(lengths[m] for p in range(len(parts)) if p not in missing for m in parts[p]))
        source = _layerwise if layerwise else _whole
        work = out / "work"
        if missing:
            targets = source(view, texts, [parts[p] for p in missing], work, device)
            _write_parts(folder, parts, missing, targets, progress)
        shutil.rmtree(work, ignore_errors=True)
        folder.finish(cache.CLOSING, {
            "format": cache.FORMAT, "source_sha256": view.source_sha256, "model_sha256": view.recipe_sha256,
            "texts_sha256": texts_digest, "vocab_size": view.config.vocab_size, "lengths": lengths,
            "code": code_version(),
        })  # fmt: skip
    return sum(lengths)


def _write_parts(
    folder: StageFolder, parts: Sequence[range], missing: Sequence[int], targets: Iterator[cache.Targets],
    progress: Progress,
) -> None:
    for part in missing:
        rows = [next(targets) for _ in parts[part]]
        folder.write_tensors(cache.part_name(part), cache.stored(rows))
        progress.add(cache.part_name(part), sum(len(row[0]) for row in rows))


def _whole(
    view: View, texts: Sequence[Text], parts: Sequence[range], work: Path, device: str
) -> Iterator[cache.Targets]:
    """Targets of each sequence of ``parts`` from the trainable model, all of it in memory, f32 products."""
    import torch

    from exporter.distill.batches import padded, pieces
    from exporter.trainable.device import open_device
    from exporter.trainable.loading import load

    place = open_device(device)
    torch.set_float32_matmul_precision("highest")
    net = load(view, place)
    lengths = [len(text.ids) for text in texts]
    for members in parts:
        found: dict[int, cache.Targets] = {}
        for piece in pieces(sorted(members, key=lambda m: (-lengths[m], m)), lengths, BATCH_TOKENS):
            ids, real = (torch.from_numpy(a).to(place) for a in padded([texts[m].ids for m in piece]))
            with torch.no_grad():
                logits = net.head(net(ids)[0].index_select(0, real)).cpu().numpy()
            for member, rows in zip(piece, np.split(logits, np.cumsum([lengths[m] for m in piece])[:-1]), strict=True):
                found[member] = cache.reduced(rows, member)
        yield from (found[member] for member in members)


def _layerwise(
    view: View, texts: Sequence[Text], parts: Sequence[range], work: Path, device: str
) -> Iterator[cache.Targets]:
    """The same with one layer in memory. ``work`` holds the streams between layers, of all texts whatever is missing:
    so that what a killed run left there serves."""
    from exporter.forced import forced_rows

    sequences, wanted = [text.ids for text in texts], {member for members in parts for member in members}
    rows: list[cache.Targets] = []
    for sequence, start, logits in forced_rows(view, sequences, work=work, device=device, label="teacher"):
        if sequence not in wanted:
            continue
        rows.append(cache.reduced(logits, sequence, start))
        if start + len(logits) == len(sequences[sequence]):
            ids, logp, tail, threshold = (np.concatenate(part) for part in zip(*rows, strict=True))
            yield ids, logp, tail, threshold
            rows = []
