"""Made once for all end-to-end tests: signing keys, a signed release, and a machine that has it installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_support import Appliance, build_release, command


@dataclass(frozen=True, slots=True)
class Installed:
    """A home with release 1 installed and never served; ``outcome`` is what ``install --json`` said."""

    home: Path
    user_home: Path
    bundle_id: str
    outcome: dict[str, Any]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("e2e") / "keys"
    command("exporter", "keys", "new", path)
    return path


@pytest.fixture(scope="session")
def release_1(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_release(tmp_path_factory.mktemp("e2e"), keys, seed=0, counter=1)


@pytest.fixture(scope="session")
def installed(keys: Path, release_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """export → sign → trust → install, by the commands."""
    machine = Appliance(tmp_path_factory.mktemp("e2e") / "home")
    machine.solocard("trust", "add", keys / "root.json", "--yes")
    outcome = machine.told("install", release_1)
    return Installed(machine.home, machine.user_home, outcome["bundle_id"], outcome)


@pytest.fixture(scope="module")
def new_appliance(
    installed: Installed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Appliance]]:  # fmt: skip
    """Machines with release 1 installed, each a copy of its own; whatever they started is gone after the module."""
    made: list[Appliance] = []

    def copy() -> Appliance:
        home = tmp_path_factory.mktemp("e2e") / "home"
        shutil.copytree(installed.home, home)
        made.append(Appliance(home))
        return made[-1]

    yield copy
    for machine in made:
        machine.close()
