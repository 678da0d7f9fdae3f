"""Engines that several contract tests share, loaded once per run."""

from __future__ import annotations

from pathlib import Path

import pytest
from kv_restore_support import MINI, SHALLOW, make_engine

from exporter.presets import KV_TRUE
from runtime.engine import Engine


@pytest.fixture(scope="session")
def mini_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``mini_engine`` has its checkpoint and bundle."""
    return tmp_path_factory.mktemp("mini")


@pytest.fixture(scope="session")
def mini_engine(mini_folder: Path) -> Engine:
    """Four layers (S, C, H, C), window 32; up to 8,448 tokens."""
    return make_engine(MINI, mini_folder, 8448)


@pytest.fixture(scope="session")
def shallow_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Four layers of the real cache geometry."""
    return make_engine(SHALLOW, tmp_path_factory.mktemp("shallow"), 2048)


@pytest.fixture(scope="session")
def true_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """kv-true: all 43 layers of the real cache geometry. Slow to load and to run."""
    return make_engine(KV_TRUE, tmp_path_factory.mktemp("kv-true"), 8192)
