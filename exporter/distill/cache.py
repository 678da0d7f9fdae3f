"""The teacher cache: for each token of the texts, the teacher's 64 most likely next tokens and 64 drawn from the rest.

A stage folder: ``part_00000.safetensors`` … of whole sequences, each with ``ids`` I32 [n, 128] (the most likely first),
``logp`` F16 [n, 128], ``tail`` F32 [n], the mass of all but the most likely, and ``threshold`` F32 [n] (776 bytes a
token), and ``teacher.json`` last.

The drawn ones stand for the whole tail. Without them nothing would tell a student how that mass is spread: on the
sample model, whose 64 most likely tokens hold .82 of it, 60 % of the divergence left after training was in there. They
are drawn by priority (Duffield, Lund and Thorup, "Priority sampling for estimation of arbitrary subset sums", J. ACM
54(6), 2007): of u uniform in (0, 1] for each token those with the largest p / u; with τ the largest p / u of those that
stayed behind, the estimate of a token's mass is max(p, τ) where it was drawn and 0 else, which on average is p.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.errors import CheckpointError, UsageError
from exporter.safetensors_file import NUMPY_DTYPES, TensorInfo, read_header
from exporter.stage import digest, read_json

CLOSING = "teacher.json"
FORMAT = 2
TOP = 64
DRAWN = 64
PART_TOKENS = 8192

_NAMES = ("ids", "logp", "tail", "threshold")
# ids [n, k + d], logp [n, k + d], tail [n], threshold [n]
Targets = tuple[NDArray[np.int32], NDArray[np.float16], NDArray[np.float32], NDArray[np.float32]]


def part_name(part: int) -> str:
    return f"part_{part:05d}.safetensors"


def parts_of(lengths: Sequence[int]) -> list[range]:
    """Sequence numbers of each part: whole sequences, at least PART_TOKENS tokens but in the last."""
    parts, first, tokens = [], 0, 0
    for number, length in enumerate(lengths):
        tokens += length
        if tokens >= PART_TOKENS or number == len(lengths) - 1:
            parts.append(range(first, number + 1))
            first, tokens = number + 1, 0
    return parts


def reduced(logits: NDArray[np.float32], sequence: int, start: int = 0) -> Targets:
    """Logits f32 [n, V] of tokens ``start`` … of a sequence → its targets; the same draws whenever it is asked.

    k = min(TOP, V); where the rest has no more than DRAWN tokens it is taken whole, and threshold is 0.
    """
    vocab = logits.shape[1]
    logp = _log_softmax(logits)
    best = _largest(logits, min(TOP, vocab))[0]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(logits, best, 1), 1, kind="stable"), 1)
    mass = np.exp(logp)
    np.put_along_axis(mass, best, np.float32(0), 1)
    tail = mass.sum(1)
    np.divide(mass, _uniform(logits.shape, sequence, start), out=mass)
    np.put_along_axis(mass, best, np.float32(-1), 1)
    others, threshold = _largest(mass, min(DRAWN, vocab - best.shape[1]))
    ids = np.concatenate([best, others], 1)
    return ids.astype(np.int32), np.take_along_axis(logp, ids, 1).astype(np.float16), tail, np.maximum(threshold, 0)


def _largest(values: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Places of the ``count`` largest of each row in no order, and the next largest value (0 where there is none)."""
    places = np.argpartition(-values, min(count, values.shape[1] - 1), axis=1)
    following = np.zeros(len(values), np.float32)
    if count < values.shape[1]:
        following = np.take_along_axis(values, places[:, count : count + 1], 1)[:, 0]
    return places[:, :count], following


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(1, keepdims=True)
    found: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def _uniform(shape: tuple[int, ...], sequence: int, start: int) -> NDArray[np.float32]:
    """In (0, 1], each token's row from a generator of its own: however the rows are cut, a token has the same."""
    found = np.empty(shape, np.float32)
    for i, row in enumerate(found):
        np.random.default_rng((sequence, start + i)).random(out=row, dtype=np.float32)
    return np.subtract(np.float32(1), found, out=found)


def stored(targets: Iterable[Targets]) -> list[tuple[str, str, NDArray[Any]]]:
    """The tensors of one part."""
    arrays = [np.concatenate(arrays) for arrays in zip(*targets, strict=True)]
    return list(zip(_NAMES, ("I32", "F16", "F32", "F32"), arrays, strict=True))


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """A finished cache. ``targets`` reads one sequence's rows through the page cache; nothing is held."""

    path: Path
    sha256: str
    source_sha256: str
    texts_sha256: str
    lengths: tuple[int, ...]
    places: tuple[tuple[int, int], ...]  # per sequence: part, first row
    parts: tuple[dict[str, TensorInfo], ...]

    @staticmethod
    def open(path: Path) -> TeacherCache:
        """CheckpointError names a missing file, a field or a part of the wrong size."""
        raw = read_json(path / CLOSING)
        if raw.get("format") != FORMAT or not isinstance(raw.get("lengths"), list):
            raise CheckpointError(f"{path / CLOSING}: not a teacher cache of format {FORMAT}; run distill teacher anew")
        lengths = tuple(int(n) for n in raw["lengths"])
        places, parts = [], []
        for number, members in enumerate(parts_of(lengths)):
            tensors = {info.name: info for info in read_header(path / part_name(number))}
            rows, first = sum(lengths[m] for m in members), 0
            if set(tensors) != set(_NAMES) or tensors["tail"].shape != (rows,):
                part = path / part_name(number)
                raise CheckpointError(f"{part}: expected {rows} rows of {', '.join(_NAMES)}; make the cache again")
            parts.append(tensors)
            for member in members:
                places.append((number, first))
                first += lengths[member]
        return TeacherCache(
            path, digest(raw), str(raw["source_sha256"]), str(raw["texts_sha256"]), lengths, tuple(places), tuple(parts)
        )

    def check(self, source_sha256: str, texts_sha256: str) -> None:
        """UsageError unless the cache was made from this checkpoint on these texts."""
        if self.source_sha256 != source_sha256:
            raise UsageError(f"{self.path}: the teacher was another checkpoint; run distill teacher on this one")
        if self.texts_sha256 != texts_sha256:
            raise UsageError(f"{self.path}: the teacher saw other texts; run distill teacher with this --texts file")

    def targets(self, sequence: int) -> Targets:
        """What is stored of one sequence."""
        part, first = self.places[sequence]
        rows = slice(first, first + self.lengths[sequence])
        ids, logp, tail, threshold = (np.array(_mapped(self.parts[part][name])[rows]) for name in _NAMES)
        return ids, logp, tail, threshold


def _mapped(info: TensorInfo) -> NDArray[Any]:
    return np.memmap(info.file, NUMPY_DTYPES[info.dtype], "r", info.offset, info.shape)
