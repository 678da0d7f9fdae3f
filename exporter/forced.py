"""Logits of given sequences (teacher forcing), one layer of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.layer_reference import LayerReference
from exporter.layerwise import Walk
from exporter.view import View

LOGIT_ROWS = 256  # rows of the head at once: 132 MB of logits for the real vocabulary


def forced_logits(
    view: View, sequences: Sequence[Sequence[int]], *, work: Path, act_sim: bool = False, kv_sim: bool = True,
    device: str = "cpu", label: str = "logits",
) -> Iterator[NDArray[np.float32]]:
    """Logits f32 [n, V] of each sequence, in order; row t predicts token t + 1.

    ``work`` keeps the streams between layers: the same call goes on where a killed one stopped. The caller removes it.
    UsageError for bad ids, for a ``work`` of another call and for a device that is not there.
    """
    held: list[NDArray[np.float32]] = []
    sizes = [len(ids) for ids in sequences]
    for sequence, start, rows in forced_rows(
        view, sequences, work=work, act_sim=act_sim, kv_sim=kv_sim, device=device, label=label
    ):
        held.append(rows)
        if start + len(rows) == sizes[sequence]:
            yield np.concatenate(held)
            held = []


def forced_rows(
    view: View, sequences: Sequence[Sequence[int]], *, work: Path, act_sim: bool = False, kv_sim: bool = True,
    device: str = "cpu", label: str = "logits",
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """As :func:`forced_logits` in pieces that fit any memory: (sequence, first position, logits f32 [≤ 256, V])."""
    reference = LayerReference(view, act_sim=act_sim, kv_sim=kv_sim, device=device)
    walk = Walk(reference, sequences, work, label=label)
    walk.run()
    for batch, streams in walk.streams():
        done = 0
        for piece in batch.pieces:
            for start in range(piece.start, piece.stop, LOGIT_ROWS):
                count = min(LOGIT_ROWS, piece.stop - start)
                yield piece.sequence, start, reference.logits(streams[done : done + count]).numpy()
                done += count
