"""Any number of sequences through a model one layer at a time: one layer in memory, the streams on disk.

Killed anywhere, the same call goes on after the last whole layer and ends with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from appliance.errors import UsageError
from appliance.model import ModelConfig
from exporter.layer_reference import LayerReference
from exporter.progress import Progress
from exporter.reference_state import LayerState
from exporter.spill import StreamSpill
from exporter.stage import StageFolder, digest

STREAM_BATCH_BYTES = 1 << 28  # streams of one batch: 4,096 tokens of the real model
MAX_BATCH_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start`` … ``stop`` − 1 of one sequence."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens that go through the experts together. ``ids`` i64 [n], ``sequence_of`` i64 [n]."""

    index: int
    pieces: tuple[Piece, ...]
    ids: torch.Tensor
    sequence_of: torch.Tensor

    @property
    def tokens(self) -> int:
        return len(self.ids)


def default_batch_tokens(config: ModelConfig) -> int:
    """Tokens whose streams take 256 MiB, at most 16,384."""
    return max(1, min(MAX_BATCH_TOKENS, STREAM_BATCH_BYTES // (4 * config.hc_mult * config.hidden_size)))


def split(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[Batch]:
    """Batches of ``batch_tokens`` tokens in order (the last may be smaller); a sequence may go on in the next."""
    groups: list[list[Piece]] = [[]]
    room = batch_tokens
    for number, ids in enumerate(sequences):
        start = 0
        while start < len(ids):
            if room == 0:
                groups.append([])
                room = batch_tokens
            stop = min(len(ids), start + room)
            groups[-1].append(Piece(number, start, stop))
            room -= stop - start
            start = stop
    return [_batch(index, pieces, sequences) for index, pieces in enumerate(groups)]


def _batch(index: int, pieces: Sequence[Piece], sequences: Sequence[Sequence[int]]) -> Batch:
    ids = [token for p in pieces for token in sequences[p.sequence][p.start : p.stop]]
    owners = [p.sequence for p in pieces for _ in range(p.stop - p.start)]
    return Batch(index, tuple(pieces), torch.tensor(ids), torch.tensor(owners))


class Walk:
    """``sequences`` through the model of ``reference``, its state under ``work`` (removed by :meth:`discard`)."""

    def __init__(
        self, reference: LayerReference, sequences: Sequence[Sequence[int]], work: Path, *,
        batch_tokens: int | None = None, label: str = "layers",
    ) -> None:
        """UsageError for ids outside the vocabulary, and if ``work`` holds another walk."""
        config = reference.config
        _check(sequences, config)
        tokens = batch_tokens or default_batch_tokens(config)
        self.reference, self.work, self.layers = reference, work, config.num_hidden_layers
        self.batches = split(sequences, tokens)
        StageFolder(work, {
            "stage": "walk", "label": label, "model": reference.view.recipe_sha256, "batch_tokens": tokens,
            "sequences": digest([list(ids) for ids in sequences]), "act_sim": reference.act_sim,
            "kv_sim": reference.kv_sim, "device": str(reference.device),
        })
        self.spill = StreamSpill(work, len(self.batches), half=reference.act_sim)
        self.progress = Progress(label, sum(map(len, sequences)) * self.layers, "tokens × layers")

    def start(self) -> int:
        """The next layer to run; embeds the tokens if nothing is there yet."""
        layer = self.spill.layer
        if layer < 0:
            for batch in self.batches:
                self.spill.write(0, batch.index, self.reference.embed_rows(batch.ids))
            self.spill.close(0)
            self.reference.release()
            layer = 0
        self.progress.resume(layer * sum(batch.tokens for batch in self.batches))
        return layer

    def run(
        self, *, batch_done: Callable[[int, Batch], None] | None = None,
        layer_done: Callable[[int], None] | None = None, keep_last: bool = True,
    ) -> None:
        """Every layer that is left; ``keep_last`` False spares the last layer's streams.

        ``layer_done`` comes before the layer counts as done: it may be called again.
        """
        for layer in range(self.start(), self.layers):
            kept = keep_last or layer + 1 < self.layers
            for batch, streams in self.attended(layer):
                self.reference.begin_batch(batch.sequence_of)
                self.reference.experts_rows(layer, streams, batch.ids)
                if kept:
                    self.spill.write(layer + 1, batch.index, streams)
                self.progress.add(f"layer {layer}", batch.tokens)
                if batch_done is not None:
                    batch_done(layer, batch)
            if layer_done is not None:
                layer_done(layer)
            self.reference.release()
            if kept:
                self.spill.close(layer + 1)

    def attended(self, layer: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Each batch with its streams f32 [n, S, D] after the attention of ``layer``."""
        state: LayerState | None = None
        for batch in self.batches:
            streams, done = self.spill.read(layer, batch.index), 0
            for piece in batch.pieces:
                if piece.start == 0 or state is None:
                    state = self.reference.new_layer_state(layer)
                count = piece.stop - piece.start
                self.reference.attention_rows(layer, streams[done : done + count], state, piece.start)
                done += count
            yield batch, streams

    def streams(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Each batch with its streams f32 [n, S, D] after the last layer (after :meth:`run`)."""
        for batch in self.batches:
            yield batch, self.spill.read(self.layers, batch.index)

    def discard(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.work, ignore_errors=True)


def _check(sequences: Sequence[Sequence[int]], config: ModelConfig) -> None:
    if not sequences:
        raise UsageError("no sequence to run through the model")
    for number, ids in enumerate(sequences):
        if not ids or min(ids) < 0 or max(ids) >= config.vocab_size:
            raise UsageError(
                f"sequence {number}: expected at least one token id, all from 0 to {config.vocab_size - 1}"
            )
