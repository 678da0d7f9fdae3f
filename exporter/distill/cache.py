"""The teacher cache: for each token of the texts, the teacher's 64 most likely next tokens and the mass of the rest.

A stage folder: ``part_00000.safetensors`` … of whole sequences, each with ``ids`` I32 [n, 64], ``logp`` F16 [n, 64]
and ``tail`` F32 [n] (388 bytes a token), and ``teacher.json`` last.
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
TOP = 64
PART_TOKENS = 8192

Targets = tuple[NDArray[np.int32], NDArray[np.float16], NDArray[np.float32]]  # ids [n, k], logp [n, k], tail [n]


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


def reduced(logits: NDArray[np.float32], top: int = TOP) -> Targets:
    """Logits f32 [n, V] to the k = min(top, V) largest log-probabilities, their ids and the mass of the others."""
    count = min(top, logits.shape[1])
    ids = np.argpartition(-logits, count - 1, axis=1)[:, :count]
    ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(logits, ids, 1), 1, kind="stable"), 1)
    shifted = logits - logits.max(1, keepdims=True)
    mass = np.exp(shifted)
    best = np.take_along_axis(shifted, ids, 1)
    np.put_along_axis(mass, ids, np.float32(0), 1)
    tail, total = mass.sum(1), mass.sum(1) + np.exp(best).sum(1)
    logp = best - np.log(total)[:, None]
    return ids.astype(np.int32), logp.astype(np.float16), (tail / total).astype(np.float32)


def stored(targets: Iterable[Targets]) -> list[tuple[str, str, NDArray[Any]]]:
    """The tensors of one part."""
    ids, logp, tail = (np.concatenate(arrays) for arrays in zip(*targets, strict=True))
    return [("ids", "I32", ids), ("logp", "F16", logp), ("tail", "F32", tail)]


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
        if raw.get("format") != 1 or not isinstance(raw.get("lengths"), list):
            raise CheckpointError(f"{path / CLOSING}: not a teacher cache of format 1; run distill teacher")
        lengths = tuple(int(n) for n in raw["lengths"])
        places, parts = [], []
        for number, members in enumerate(parts_of(lengths)):
            tensors = {info.name: info for info in read_header(path / part_name(number))}
            rows, first = sum(lengths[m] for m in members), 0
            if set(tensors) != {"ids", "logp", "tail"} or tensors["tail"].shape != (rows,):
                part = path / part_name(number)
                raise CheckpointError(f"{part}: expected {rows} rows of ids, logp, tail; make the cache again")
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
        """ids [n, k], logp [n, k] and tail [n] of one sequence."""
        part, first = self.places[sequence]
        rows = slice(first, first + self.lengths[sequence])
        ids, logp, tail = (_mapped(self.parts[part][name])[rows] for name in ("ids", "logp", "tail"))
        return np.array(ids), np.array(logp), np.array(tail)


def _mapped(info: TensorInfo) -> NDArray[Any]:
    return np.memmap(info.file, NUMPY_DTYPES[info.dtype], "r", info.offset, info.shape)
