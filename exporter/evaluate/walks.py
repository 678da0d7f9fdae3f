"""Teacher and student over the same sequences, one layer in memory at a time: logits compared as they come, and the
streams of some tokens after every layer.

What a model's walk leaves in the work folder is complete or resumable; the teacher's serves every student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from appliance.errors import CheckpointError, EngineError
from exporter.evaluate.metrics import TokenScores, compare, joined
from exporter.forced import forced_rows
from exporter.layer_reference import LayerReference
from exporter.layerwise import Batch, Walk
from exporter.stage import write_atomic
from exporter.view import View

F32 = NDArray[np.float32]
Rows = Iterable[tuple[int, int, F32]]  # sequence, first position, logits [m, V], in order
SAMPLED_TOKENS = 256  # whose streams are kept: 64 KiB a token and layer of the real model, 700 MB in all


@dataclass
class StreamSamples:
    """Streams after each layer at ``positions`` (tokens counted over all sequences), as ``layer_007.npy`` [m, S, D].

    Taken from the inputs of the next layer, which the walk has on disk, while it runs that layer.
    """

    walk: Walk
    folder: Path
    positions: Sequence[int]
    _taken: dict[int, torch.Tensor] = field(default_factory=dict)

    def batch_done(self, layer: int, batch: Batch) -> None:
        if layer > 0:
            self._take(batch, lambda: self.walk.spill.read(layer, batch.index))

    def layer_done(self, layer: int) -> None:
        if layer > 0:
            self._write(layer - 1)

    def finish(self) -> None:
        """The last layer's, which no other layer reads."""
        last = self.walk.layers - 1
        if not sample_path(self.folder, last).is_file():
            for batch, streams in self.walk.streams():
                self._take(batch, lambda held=streams: held)  # type: ignore[misc]
            self._write(last)

    def _take(self, batch: Batch, streams: Callable[[], torch.Tensor]) -> None:
        first = sum(other.tokens for other in self.walk.batches[: batch.index])
        local = [at - first for at in self.positions if first <= at < first + batch.tokens]
        if local:
            self._taken[batch.index] = streams()[local].clone()

    def _write(self, layer: int) -> None:
        rows = torch.cat([self._taken[index] for index in sorted(self._taken)]).numpy()
        self._taken = {}

        def save(partial: Path) -> None:
            with partial.open("wb") as file:
                np.save(file, rows)

        write_atomic(sample_path(self.folder, layer), save)


def sample_path(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:03d}.npy"


def read_sample(folder: Path, layer: int) -> F32:
    """Streams [m, S, D] after ``layer``; CheckpointError names the file."""
    path = sample_path(folder, layer)
    try:
        array: F32 = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove {folder} and start again") from None
    return array


def sampled_positions(tokens: int) -> list[int]:
    """256 of the first ``tokens`` tokens, spread evenly."""
    return sorted({int(at) for at in np.linspace(0, tokens - 1, min(tokens, SAMPLED_TOKENS))})


def run_walk(
    view: View, sequences: Sequence[Sequence[int]], folder: Path, *, text_tokens: int, label: str, device: str
) -> Rows:
    """Every layer of ``view`` over ``sequences``; streams of some of the first ``text_tokens`` tokens are kept.

    Gives the logits in pieces. Started again with the same arguments it goes on after the last whole layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    walk = Walk(LayerReference(view, device=device), sequences, folder / "walk", label=label)
    samples = StreamSamples(walk, folder, sampled_positions(text_tokens))
    walk.run(batch_done=samples.batch_done, layer_done=samples.layer_done)
    samples.finish()
    return forced_rows(view, sequences, work=folder / "walk", device=device, label=label)


def score(teacher: Rows, student: Rows, sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
    """Per sequence, from both models' logits as they come: only one piece of each is held.

    EngineError if the pieces do not match, or hold NaN or infinity.
    """
    parts: list[list[TokenScores]] = [[] for _ in sequences]
    for theirs, ours in zip(teacher, student, strict=True):
        number, start, rows = theirs
        if (number, start, rows.shape) != (*ours[:2], ours[2].shape):
            raise EngineError(
                f"evaluate: teacher's logits are of sequence {number} from {start}, {rows.shape}, the student's of "
                f"{ours[0]} from {ours[1]}, {ours[2].shape}; remove the work folder and start again"
            )
        _check_finite("teacher", theirs)
        _check_finite("student", ours)
        following = [*sequences[number][start + 1 : start + 1 + len(rows)], -1][: len(rows)]
        parts[number].append(compare(rows, ours[2], following))
    return [joined(part) for part in parts]


def _check_finite(role: str, piece: tuple[int, int, F32]) -> None:
    number, start, rows = piece
    if not np.isfinite(rows).all():
        raise EngineError(
            f"evaluate: the {role}'s logits of sequence {number} from token {start} are not all finite numbers; a "
            "tensor of it is broken: run the stage that made it again"
        )
