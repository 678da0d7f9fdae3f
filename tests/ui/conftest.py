from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ui_support import FakeAdmin, FakeSolocard, admin_server, short_home


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An appliance folder nobody's shell knows of."""
    monkeypatch.delenv("SOLOCARD_HOME", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with short_home() as folder:
        yield folder


@pytest.fixture
def admin(home: Path) -> Iterator[FakeAdmin]:
    with admin_server(home) as server:
        yield server


@pytest.fixture
def solocard(home: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSolocard:
    """A fake ``solocard``, first on PATH."""
    folder = home / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return FakeSolocard(folder)
