"""Only an installed, verified bundle is served or tried; an unsigned one gives logits and touches nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from e2e_support import Appliance, build_release, command, environment
from trace_support import NETWORK, calls, strace

from appliance.state import State

FILES = ("openat", "open", "mkdir", "mkdirat", "rename", "renameat2", "creat")


@pytest.fixture(scope="module")
def machine(new_appliance: Callable[[], Appliance]) -> Appliance:
    return new_appliance()


@pytest.fixture(scope="module")
def unsigned(release_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Release 1 as `build` left it: its manifest bare, no metadata."""
    out = tmp_path_factory.mktemp("e2e") / "unsigned"
    shutil.copytree(release_1, out)
    shutil.rmtree(out / "metadata")
    [manifest] = (out / "targets").iterdir()
    manifest.rename(out / "manifest.json")
    (out / "targets").rmdir()
    return out


def runtime(machine: Appliance, *arguments: object, code: int) -> str:
    return command("runtime", *arguments, code=code, SOLOCARD_HOME=str(machine.home)).stderr


def test_trial_takes_no_path(machine: Appliance, unsigned: Path, release_1: Path) -> None:
    for path in (unsigned, release_1):
        said = runtime(machine, "trial", path, code=6)
        assert said.startswith(f"solocard: no bundle '{path}' is installed in {machine.home}; ")
        assert "`solocard list`" in said


def test_trial_takes_no_bundle_that_merely_lies_among_the_installed(machine: Appliance, unsigned: Path) -> None:
    """The files of a bundle put where installed ones lie, without signatures, are not installed."""
    name = "sneaked-1-0123456789ab"
    for file in ("model.onnx", "model.json", "tokenizer.json", "manifest.json"):
        shutil.copy(unsigned / file, machine.home / "models" / f"{name}.{file}")
    assert f"no bundle '{name}' is installed" in runtime(machine, "trial", name, code=6)


def test_serve_takes_no_argument(machine: Appliance, unsigned: Path) -> None:
    said = runtime(machine, "serve", unsigned, code=2)
    assert f"unrecognized arguments: {unsigned}" in said


def test_serve_refuses_a_home_where_nothing_is_installed(tmp_path: Path) -> None:
    said = command("runtime", "serve", code=6, SOLOCARD_HOME=str(tmp_path / "none")).stderr
    assert said == f"solocard: no model is installed in {tmp_path / 'none'}; run `solocard install DIRECTORY`\n"


def test_install_refuses_an_unsigned_bundle(machine: Appliance, unsigned: Path) -> None:
    assert "is not signed" in machine.solocard("install", unsigned, code=5).stderr


def test_trial_takes_what_is_installed(machine: Appliance, installed) -> None:
    done = command("runtime", "trial", installed.bundle_id, SOLOCARD_HOME=str(machine.home))
    assert f"{installed.bundle_id}, profile full: checked 16 golden tokens of 16 prompts" in done.stdout


def test_logits_take_an_unsigned_bundle_and_touch_neither_network_nor_home(unsigned: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    np.save(tmp_path / "ids.npy", np.arange(2, 42))
    prefix = strace(tmp_path / "trace.txt", "socket", "listen", *NETWORK, *FILES)
    arguments = ["logits", str(unsigned), "--ids", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "out.npy")]
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "runtime", *arguments], env=environment(SOLOCARD_HOME=str(home)), cwd="/",
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ": unsigned\n" in done.stderr
    logits = np.load(tmp_path / "out.npy")
    assert logits.shape == (40, 768)
    assert np.isfinite(logits).all()
    trace = (tmp_path / "trace.txt").read_text()
    assert calls(trace, "openat")
    assert calls(trace, "socket", "listen", *NETWORK) == []
    assert [line for line in trace.splitlines() if str(home) in line or "sqlite" in line or ".kvs" in line] == []
    assert list(home.iterdir()) == []


def test_f32_caches_are_neither_installed_nor_served(keys: Path, tmp_path: Path) -> None:
    """Signed and whole, such a bundle is still for parity checks only; serve asks again, should it ever be current."""
    bundle = build_release(tmp_path, keys, numerics="kv-f32", name="parity-only")
    machine = Appliance(tmp_path / "home")
    machine.solocard("trust", "add", keys / "root.json", "--yes")
    assert "kv-f32" in machine.solocard("install", bundle, code=9).stderr.splitlines()[-1]
    assert machine.told("status")["current"] == ""
    [listed] = machine.told("list")["bundles"]
    State(current=listed["bundle_id"]).write(machine.home)
    said = runtime(machine, "serve", code=10)
    assert said.startswith(f"solocard: {listed['bundle_id']} keeps f32 caches (kv-f32)")
    assert "--numerics kv-v4" in said
    assert not (machine.home / "run" / "serve.pid").exists()
