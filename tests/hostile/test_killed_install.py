"""kill -9 at any file operation of an installation: the old model or the new one, never neither, and it can go on."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_support import Desk, Machine

from appliance.bundle import VerifiedBundle
from appliance.journal import Journal
from appliance.trial import child_environment

CHILD = """
import os, signal, sys
from pathlib import Path
from appliance.install import Installer

home, stick, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
count = 0

def step(what):
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)

def hook(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"):
        step(event)

def counted(real):
    def call(*arguments):
        step(real.__name__)
        return real(*arguments)
    return call

installer = Installer(home, lambda progress: None, trial=lambda home, bundle_id, timeout_s: "as recorded")
os.fsync, os.write = counted(os.fsync), counted(os.write)
sys.addaudithook(hook)
installer.install(stick)
print(count)
"""


class Scene:
    """Machines that serve release 1 and a stick with release 2; each kill starts from a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        desk = Desk(folder / "desk")
        self.machine = Machine(folder / "home", desk.root)
        self.old = self.machine.install(desk.release(1)).bundle_id
        self.stick = desk.release(2)

    def copy(self, number: int) -> Machine:
        home = self.folder / f"home-{number}"
        shutil.copytree(self.machine.home, home)
        return Machine(home)

    def run(self, home: Path, kill_at: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", CHILD, str(home), str(self.stick), str(kill_at)]
        return subprocess.run(command, env=child_environment(home), capture_output=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return Scene(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def steps(scene) -> int:
    """File operations of one undisturbed installation."""
    done = scene.run(scene.copy(0).home, 0)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def kill_and_go_on(scene: Scene, at: int) -> bool:
    """Kill at one operation, check what is served, then install again; True when the kill hit."""
    machine = scene.copy(at)
    done = scene.run(machine.home, at)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    state = machine.state
    served = VerifiedBundle.open_current(machine.home, full=True).bundle_id
    assert served == state.current
    assert machine.floors is not None
    if served == scene.old:
        assert machine.floors.release_counter == 1
    outcome = machine.install(scene.stick)
    assert machine.state.current == outcome.bundle_id != scene.old
    assert machine.state.previous == scene.old
    assert machine.state.trial == ""
    assert machine.floors.release_counter == 2
    VerifiedBundle.open_installed(machine.home, outcome.bundle_id, full=True)
    assert list((machine.home / "models").glob("partial/*")) == []
    assert {"install", "switch"} <= {record["event"] for record in Journal(machine.home).read()}
    machine.installer().rollback()
    assert machine.state.current == scene.old
    shutil.rmtree(machine.home)
    return done.returncode == -signal.SIGKILL


def test_killed_at_a_few_seeded_operations(scene, steps):
    assert steps > 100
    points = random.Random(4).sample(range(1, steps + 1), 8)
    assert [kill_and_go_on(scene, at) for at in points] == [True] * 8


@pytest.mark.slow
def test_killed_at_every_operation(scene, steps):
    hits = sum(kill_and_go_on(scene, at) for at in range(1, steps + 1))
    assert hits == steps
