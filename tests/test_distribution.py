"""What `pip install` gives: the wheel's files, entry points, pins."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("appliance", "exporter", "runtime", "ui")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel as the build backend makes it."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path)


def test_it_holds_the_four_packages_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {*PACKAGES, f"solocard-{PROJECT['project']['version']}.dist-info"}


def test_it_holds_every_file_of_the_packages(wheel):
    tracked = {
        str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }  # fmt: skip
    assert tracked - set(wheel.namelist()) == set()


def test_its_metadata_says_what_pyproject_says(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "solocard"
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.15"}
    assert set(metadata.get_all("Provides-Extra")) == {"serve", "console", "export", "distill", "ascend"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert metadata.get_payload().startswith("# Solocard")


def test_every_entry_point_is_a_function():
    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert set(PROJECT["project"]["scripts"]) == {"solocard", "solocard-export", "solocard-serve", "solocard-console"}


def pins() -> list[str]:
    project = PROJECT["project"]
    extras = [pin for extra in project["optional-dependencies"].values() for pin in extra]
    groups = [pin for group in PROJECT["dependency-groups"].values() for pin in group]
    return [*project["dependencies"], *extras, *groups, *PROJECT["build-system"]["requires"]]


def test_every_dependency_is_pinned_to_one_version_everywhere():
    versions: dict[str, set[str]] = {}
    for pin in pins():
        name, _, version = pin.partition("==")
        versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    stubs = {"types-pyyaml"}  # follow the library they describe
    assert [name for name, found in versions.items() if name not in stubs and (len(found) > 1 or found == {""})] == []


def test_every_dependency_has_its_reason_written_down():
    reasons = (ROOT / "docs" / "adr" / "0001-dependencies.md").read_text("utf-8")
    names = {pin.partition("==")[0] for pin in pins()}
    assert {name for name in names if f"`{name}`" not in reasons} == set()


def test_base_serve_and_export_need_no_torch():
    project = PROJECT["project"]
    extras = [project["optional-dependencies"][name] for name in ("serve", "console", "export")]
    light = [pin for group in (project["dependencies"], *extras) for pin in group]
    assert len(light) > 10
    assert not [pin for pin in light if pin.startswith(("torch", "transformers", "onnxscript"))]
