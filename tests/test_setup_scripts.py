"""packaging/demo and packaging/check before anything is installed: what they find, refuse, keep and name."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGING = Path(__file__).resolve().parents[1] / "packaging"
STEPS = PACKAGING / "steps"
MODULES = ("progress", "environment", "question", "server", "appliance_steps", "check", "demo")
FIND = '. "{steps}/find_python.sh"; find_python packaging/demo "{checkout}"; echo "$python"'
TOOLS = ("uname", "sed", "tr")


@pytest.fixture
def steps(monkeypatch):
    """Imports a module of packaging/steps; all of them are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(STEPS))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


# ----------------------------------------------------------------------------------------------- finding an interpreter
@pytest.fixture
def path(tmp_path):
    """A PATH folder with the few tools the script needs and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (folder / tool).symlink_to(found)
    (tmp_path / "os-release").write_text('NAME="Debian"\nID=debian\n')
    return folder


def fake_python(folder: Path, name: str, probe_code: int, prints: str = "") -> None:
    """An interpreter whose probe ends with a code, and which prints something when asked for its version."""
    script = folder / name
    script.write_text(f'#!/bin/sh\ncase "$3" in *ensurepip*) exit {probe_code} ;; esac\necho "{prints}"\n')
    script.chmod(0o755)


def find_python(path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(path), "SOLOCARD_OS_RELEASE": str(path.parent / "os-release"), **more}
    return subprocess.run(
        ["/bin/sh", "-euc", FIND.format(steps=STEPS, checkout=path.parent)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_newest_good_interpreter_is_taken(path):
    fake_python(path, "python3.14", 127)  # a version manager's shim for a version that is not there
    fake_python(path, "python3.13", 11)
    fake_python(path, "python3.12", 0)
    fake_python(path, "python3.11", 0)
    found = find_python(path)
    assert (found.returncode, found.stdout.strip()) == (0, str(path / "python3.12"))


def test_an_environment_that_is_there_is_kept(path):
    (path.parent / ".venv" / "bin").mkdir(parents=True)
    fake_python(path.parent / ".venv" / "bin", "python", 0)
    fake_python(path, "python3.14", 0)
    assert find_python(path).stdout.strip() == str(path.parent / ".venv" / "bin" / "python")


def test_the_interpreter_can_be_named(path):
    fake_python(path, "python3.14", 0)
    fake_python(path, "my-python", 0)
    assert find_python(path, SOLOCARD_PYTHON="my-python").stdout.strip() == str(path / "my-python")


def test_no_interpreter_is_named_with_its_package(path):
    found = find_python(path)
    assert found.returncode == 3
    assert "no Python from 3.11 to 3.14 was found" in found.stderr
    assert "no python3 at all" in found.stderr
    assert "apt-get install python3 python3-venv" in found.stderr


def test_an_old_interpreter_is_named_with_its_version(path):
    fake_python(path, "python3", 10, "3.9.2")
    found = find_python(path)
    assert found.returncode == 3
    assert "(found: python3 is 3.9.2)" in found.stderr


@pytest.mark.parametrize(
    ("release", "package"),
    [
        ("ID=debian\n", "apt-get install python3.12-venv"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "apt-get install python3.12-venv"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf install python3.12"),
        ('ID="openEuler"\n', "dnf install python3"),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', "zypper install python312"),
        ("ID=other\n", "the venv module of Python 3.12"),
    ],
)
def test_a_missing_venv_module_is_named_with_its_package(path, release, package):
    (path.parent / "os-release").write_text(release)
    fake_python(path, "python3.12", 11, "3.12")
    found = find_python(path)
    assert found.returncode == 3
    assert f"{path / 'python3.12'} cannot make a virtual environment" in found.stderr
    assert f"install it: {package}" in found.stderr


def test_another_system_is_refused(path):
    (path / "uname").unlink()
    fake_python(path, "uname", 0, "Darwin")
    found = find_python(path)
    assert found.returncode == 3
    assert "Solocard runs on Linux on x86_64 or aarch64" in found.stderr


def test_the_real_interpreter_passes_the_probe():
    (probe,) = re.findall(r"^probe='(.*?)'$", (STEPS / "find_python.sh").read_text(), re.MULTILINE | re.DOTALL)
    assert subprocess.run([sys.executable, "-I", "-c", probe], check=False).returncode == 0


# ----------------------------------------------------------------------------------------------------- the machine
def test_this_machine_is_good_enough(steps):
    assert steps("environment").check_machine() is None


@pytest.mark.parametrize("version", ["glibc 2.17", "musl 1.2", None])
def test_an_old_c_library_is_named(steps, monkeypatch, version):
    environment = steps("environment")
    monkeypatch.setattr(os, "confstr", lambda _: version)
    with pytest.raises(environment.SetupError, match=r"glibc 2\.28 or newer is needed"):
        environment.check_machine()


def test_a_full_disk_is_named(steps, monkeypatch, tmp_path):
    environment = steps("environment")
    monkeypatch.setattr(environment, "STAMPS", tmp_path / "none")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 999_999_999))
    with pytest.raises(environment.SetupError, match=r"1 GB free is needed, .* 1000\.0 MB free"):
        environment.check_machine()


def test_a_folder_that_cannot_be_written_is_named(steps, monkeypatch, tmp_path):
    environment = steps("environment")
    monkeypatch.setattr(environment, "ROOT", tmp_path / "gone")
    with pytest.raises(environment.SetupError, match="gone cannot be written"):
        environment.check_machine()


# ------------------------------------------------------------------------------------------------------ environment
@pytest.fixture
def environment(steps, monkeypatch, tmp_path):
    """The environment module, whose .venv is this interpreter's and whose pip only writes down what it is asked."""
    module = steps("environment")
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(module, "STAMPS", tmp_path / "solocard.json")
    monkeypatch.setattr(module, "_make_venv", lambda: None)
    module.asked = []
    monkeypatch.setattr(module, "_pip", module.asked.append)
    return module


def test_what_is_installed_is_not_installed_again(environment, monkeypatch):
    environment.ensure_product()
    environment.ensure_group("check")
    environment.ensure_product()
    environment.ensure_group("check")
    assert environment.asked[0] == ["--editable", ".[serve,console,export]"]
    assert any(pin.startswith("pytest==") for pin in environment.asked[1])
    assert len(environment.asked) == 2


def test_a_changed_pin_and_a_moved_checkout_install_again(environment, monkeypatch, tmp_path):
    environment.ensure_product()
    changed = environment.project()
    changed["project"]["dependencies"].append("tuf==9")
    with monkeypatch.context() as patch:
        patch.setattr(environment, "project", lambda: changed)
        environment.ensure_product()
    assert len(environment.asked) == 2
    environment.ensure_product()
    project = environment.project()
    monkeypatch.setattr(environment, "project", lambda: project)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    environment.ensure_product()
    assert len(environment.asked) == 4


def test_an_install_that_failed_is_tried_again(environment, monkeypatch):
    def fail(arguments):
        environment.asked.append(arguments)
        raise environment.SetupError("no network")

    monkeypatch.setattr(environment, "_pip", fail)
    for _ in range(2):
        with pytest.raises(environment.SetupError, match="no network"):
            environment.ensure_product()
    assert len(environment.asked) == 2


def test_pip_failing_shows_its_last_words_and_where_its_settings_are(steps, monkeypatch, capsys, tmp_path):
    environment = steps("environment")
    monkeypatch.setattr(environment, "VENV", tmp_path)
    monkeypatch.setattr(environment, "PYTHON", Path(sys.executable))
    with pytest.raises(environment.SetupError, match=r"(?s)No matching distribution.*PIP_FIND_LINKS"):
        environment._pip(["--no-index", "no-such-distribution-of-solocard==1"])
    assert "http" not in capsys.readouterr().out


def test_the_scripts_name_no_index_of_packages():
    sources = "".join(p.read_text("utf-8") for p in [*STEPS.glob("*.*"), PACKAGING / "demo", PACKAGING / "check"])
    assert set(re.findall(r"https?://([\w.-]*)", sources)) <= {"127.0.0.1", ""}
    assert "pypi" not in sources.lower()


# ------------------------------------------------------------------------------------------------------- demo's steps
def test_a_digest_follows_every_byte_and_name(steps, monkeypatch, tmp_path):
    module = steps("appliance_steps")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    folder = tmp_path / "exporter"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "a.py").write_text("1")
    seen = [module.digest_of(folder)]
    (folder / "__pycache__" / "a.pyc").write_text("x")
    assert module.digest_of(folder) == seen[0]
    (folder / "a.py").write_text("2")
    seen.append(module.digest_of(folder))
    (folder / "a.py").rename(folder / "b.py")
    seen.append(module.digest_of(folder))
    assert len(set(seen)) == 3


def test_a_taken_port_is_passed_over(steps, monkeypatch):
    server = steps("server")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "FIRST_PORT", port)
        assert port < server.free_port() < port + server.PORTS


def test_a_server_that_does_not_come_up_is_told_with_its_last_words(steps, monkeypatch, tmp_path):
    server = steps("server")
    program = tmp_path / "bin" / "solocard-serve"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no model is installed >&2\nexit 6\n")
    program.chmod(0o755)
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(server, "VENV", tmp_path)
    with pytest.raises(server.SetupError, match=r"(?s)did not come up on port \d+.*no model is installed"):
        server.Server.start(tmp_path / "home")
    assert server.Server.running(tmp_path / "home") is None


def test_random_answers_cannot_drive_the_terminal(steps):
    question = steps("question")
    assert question.printable("ok\n\x1b[2J\x07é") == "ok\n·[2J·é"


def test_an_event_stream_is_read_up_to_its_end(steps):
    question = steps("question")
    lines = [b": keep-alive\n", b"\n", b'data: {"a": 1}\n', b"\n", b"data: [DONE]\n", b'data: {"a": 2}\n']
    assert list(question.events(lines)) == [{"a": 1}]


# ------------------------------------------------------------------------------------------------------------- check
def test_torch_tests_are_counted_without_torch(steps, tmp_path):
    (tmp_path / "test_whole.py").write_text(
        "import pytest\npytestmark = [pytest.mark.torch]\n"
        "def test_a(): ...\nclass TestB:\n    async def test_c(self): ...\n"
    )
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.torch\ndef test_a(): ...\ndef test_b(): ...\ndef helper(): ...\n"
    )
    assert steps("check").count_torch_tests(tmp_path) == 3


def test_torch_missing_is_told_and_not_fetched(steps, monkeypatch):
    check, environment = steps("check"), steps("environment")
    fetched = []
    monkeypatch.setattr(environment, "has_pin", lambda pin: not pin.startswith("torch=="))
    monkeypatch.setattr(environment, "ensure_group", fetched.append)
    with pytest.raises(environment.SetupError, match=r"--torch needs torch==.* in \.venv .*--yes fetches them"):
        check._ensure_torch(yes=False)
    assert fetched == []
    check._ensure_torch(yes=True)
    assert fetched == ["torch-check"]


def test_a_pin_is_there_only_in_its_version(steps, monkeypatch):
    environment = steps("environment")
    monkeypatch.setattr(environment, "PYTHON", Path(sys.executable))
    assert environment.has_pin(f"pytest=={pytest.__version__}")
    assert not environment.has_pin("pytest==0.1")
    assert not environment.has_pin("no-such-distribution-of-solocard==1")


@pytest.mark.parametrize("torch", [False, True])
def test_every_step_runs_and_one_failure_is_enough(steps, capsys, monkeypatch, torch):
    check = steps("check")
    monkeypatch.setattr(check, "PYTHON", Path(sys.executable))
    plan = [("good", ["-c", ""]), ("bad", ["-c", "raise SystemExit(4)"]), ("last", ["-c", ""])]
    assert check._run_all(iter(plan), torch) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "2 of 3 passed; failed: bad" in printed
    assert ("torch suite not run" in printed[-1]) is not torch
    assert check._run_all(iter(plan[:1]), torch) == 0


def test_the_stamp_survives_a_torn_write(steps, tmp_path):
    environment = steps("environment")
    stamps = tmp_path / "solocard.json"
    stamps.write_text('{"solocard": "ab')
    assert environment.read_json(stamps) == {}
    environment.write_json(stamps, {"solocard": "c"})
    assert json.loads(stamps.read_text()) == {"solocard": "c"}
    assert platform.system() == "Linux"
