"""The streams between two layers on disk: one folder a layer, complete or absent, so that a killed walk goes on.

``streams_007/batch_00000.npy`` holds the inputs of layer 7, f32 [n, S, D], or BF16 bits where the walk rounds to BF16
anyway. The next layer's folder is written beside it, renamed when whole, and only then is the old one removed: at most
two layers' streams lie on disk (64 KiB a token and layer for the real model in f32).
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from appliance.bundle_writer import sync_directory
from appliance.errors import CheckpointError, SpaceError
from exporter import codec

_FOLDER = re.compile(r"streams_(\d{3,})")


class StreamSpill:
    """Streams of ``batches`` batches under ``folder``; ``half`` stores BF16 bits."""

    def __init__(self, folder: Path, batches: int, *, half: bool) -> None:
        self._folder, self._batches, self._half = folder, batches, half

    @property
    def layer(self) -> int:
        """The layer whose inputs are there in full; −1 for none. What a kill left beside them is removed."""
        found = [int(m[1]) for path in self._folder.iterdir() if (m := _FOLDER.fullmatch(path.name))]
        newest = max(found, default=-1)
        for layer in found:
            if layer != newest:
                shutil.rmtree(self._path(layer))
        return newest

    def read(self, layer: int, batch: int) -> torch.Tensor:
        """Streams f32 [n, S, D], a copy the caller may change."""
        path = self._path(layer) / _name(batch)
        try:
            array = np.load(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); remove {self._folder} and start again") from None
        return torch.from_numpy(codec.bf16_decode(array) if self._half else array)

    def write(self, layer: int, batch: int, streams: torch.Tensor) -> None:
        """One batch of the inputs of ``layer``; counts only after :meth:`close`."""
        partial = self._path(layer).with_suffix(".partial")
        try:
            if batch == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            array = streams.numpy()
            with (partial / _name(batch)).open("wb") as file:
                np.save(file, codec.bf16_encode(array) if self._half else array)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SpaceError(f"{partial}: writing failed ({error.strerror}); free space and start again") from None

    def close(self, layer: int) -> None:
        """All batches of ``layer`` are written: they replace those of the layer before."""
        partial = self._path(layer).with_suffix(".partial")
        sync_directory(partial)
        shutil.rmtree(self._path(layer), ignore_errors=True)
        partial.replace(self._path(layer))
        sync_directory(self._folder)
        shutil.rmtree(self._path(layer - 1), ignore_errors=True)

    def restart(self) -> None:
        """Forget everything."""
        for path in self._folder.glob("streams_*"):
            shutil.rmtree(path)

    def _path(self, layer: int) -> Path:
        return self._folder / f"streams_{layer:03d}"


def _name(batch: int) -> str:
    return f"batch_{batch:05d}.npy"
