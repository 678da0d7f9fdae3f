"""The exporter's command line: what the file system refuses is one line that names the path, never a stack trace."""

import errno
import os
import subprocess
import sys

import pytest

from exporter.__main__ import main

OVER_A_FOLDER, IN_NO_FOLDER, BELOW_A_FILE = "folder", "nowhere/file", "file/below"


@pytest.fixture
def places(tmp_path):
    (tmp_path / OVER_A_FOLDER).mkdir()
    (tmp_path / "file").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("place", [OVER_A_FOLDER, IN_NO_FOLDER, BELOW_A_FILE])
def test_an_output_that_cannot_be_written_is_named(tiny_checkpoint, places, capsys, place):
    assert main(["rank", str(tiny_checkpoint), "--score", "first", "--out", str(places / place)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"solocard: {places / place}")
    assert line.count("\n") == 1


def test_a_stage_folder_below_a_file_is_named(tiny_checkpoint, places, capsys):
    assert main(["quantize", str(tiny_checkpoint), "--out", str(places / BELOW_A_FILE)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"solocard: {places / BELOW_A_FILE}")
    assert line.count("\n") == 1


def test_a_full_disk_ends_with_its_own_code(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    def full(path, data, mode=0o644):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("exporter.stage.write_synced", full)
    assert main(["rank", str(tiny_checkpoint), "--score", "first", "--out", str(tmp_path / "ranking.json")]) == 8
    assert "ranking.json: No space left on device; free some space" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error(tiny_checkpoint):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "exporter", "inspect", str(tiny_checkpoint)]
    with os.fdopen(writing, "wb") as closed:
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize("command", ["build", "student"])
@pytest.mark.parametrize("out", ["", ".", "/"])
def test_an_output_folder_without_a_name_is_refused(tiny_checkpoint, tmp_path, capsys, monkeypatch, command, out):
    monkeypatch.chdir(tmp_path)
    more = ["--encoding", "dsv4-0731"] if command == "build" else []
    assert main([command, str(tiny_checkpoint), out, *more]) == 2
    assert "solocard: " in capsys.readouterr().err


@pytest.mark.parametrize("line", ["[]", "[true]", "{}", "[768]", "[-1]"])
def test_golden_prompts_that_are_none_are_named_by_line(tiny_checkpoint, tmp_path, capsys, line):
    (tmp_path / "prompts").write_text(f"[5, 6]\n{line}\n")
    more = ["--encoding", "dsv4-0731", "--golden-prompts", str(tmp_path / "prompts")]
    assert main(["build", str(tiny_checkpoint), str(tmp_path / "b"), *more]) == 2
    assert f"{tmp_path / 'prompts'}:2: expected 1 to 4,080 token ids below 768" in capsys.readouterr().err
