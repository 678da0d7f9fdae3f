"""Checkpoints and bundles that several test modules share, made once per run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from graph_support import build_bundle

from exporter.sample import write_sample

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background by a script: Ctrl-C is under test too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``tiny`` sample checkpoint."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_sample(path, "tiny", seed=0)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint built as the product builds it, golden tokens and all."""
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    build_bundle(tiny_checkpoint, path)
    return path
