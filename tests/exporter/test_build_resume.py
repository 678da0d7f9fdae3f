"""A build that is killed, interrupted, short of disk or damaged half-way ends in the bundle of an undisturbed one."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from build_support import SMALL, a_release, build, files_of, small_checkpoint

from appliance.errors import BundleError, BusyError, SpaceError, UsageError
from appliance.model import Golden
from exporter.graph import build_graph
from exporter.journal import Journal
from exporter.ops.moe import record_bytes
from exporter.release import write_bundle
from exporter.stage import code_version

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, so nothing is tidied up."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("resume") / "checkpoint")


@pytest.fixture(scope="module")
def undisturbed(checkpoint, tmp_path_factory):
    """The files of the bundle that every other run must end in."""
    out = tmp_path_factory.mktemp("undisturbed") / "b"
    build(checkpoint, out)
    return files_of(out)


def killed_build(checkpoint, out, **fields) -> bool:
    """True if the build was killed."""
    try:
        build(checkpoint, out, **fields)
    except Killed:
        return True
    return False


def kill_at_line(monkeypatch, number: int, mode: str) -> None:
    """The ``number``-th line of this run is the last: not written, torn in the middle, or written whole."""
    append, seen, guard = Journal.append, [0], threading.Lock()

    def dying(self, kind, key, **entry):
        with guard:
            seen[0] += 1
            if seen[0] < number:
                return append(self, kind, key, **entry)
            if seen[0] == number and mode != "before":
                append(self, kind, key, **entry)
                if mode == "torn":
                    size = os.fstat(self._fd).st_size
                    os.ftruncate(self._fd, size - 60)
        raise Killed

    monkeypatch.setattr(Journal, "append", dying)


@pytest.mark.parametrize("mode", ["torn", pytest.param("after", marks=pytest.mark.slow)])
def test_killed_at_every_line_of_the_journal(checkpoint, undisturbed, tmp_path, monkeypatch, mode):
    """One more line each run, so that every boundary is one at which a run ended and another began."""
    out, runs = tmp_path / "b", 0
    while True:
        with monkeypatch.context() as patch:
            kill_at_line(patch, 2, mode)
            if not killed_build(checkpoint, out):
                break
        assert not out.exists()
        runs += 1
        assert runs < 400
    assert runs > 90
    assert files_of(out) == undisturbed
    assert not (tmp_path / "b.partial").exists()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_killed_before_a_line_is_written(checkpoint, undisturbed, tmp_path, monkeypatch, share):
    with monkeypatch.context() as patch:
        kill_at_line(patch, round(share * 110), "before")
        assert killed_build(checkpoint, tmp_path / "b", workers=3)
    build(checkpoint, tmp_path / "b", workers=2)
    assert files_of(tmp_path / "b") == undisturbed


def build_graph_once(checkpoint, out):
    """The graph of the build of ``out``, whose objects are complete: building it each time would be the whole test."""
    found = []

    def keep(*arguments):
        found.append(build_graph(*arguments))
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.release.build_graph", keep)
        assert killed_build(checkpoint, out)
    return found[0]


def test_killed_at_the_end_between_any_two_syncs(checkpoint, undisturbed, tmp_path, monkeypatch):
    """After the objects: graph, tokenizer, model.json, manifest, renames."""
    out = tmp_path / "b"
    graph = build_graph_once(checkpoint, out)
    for number in range(1, 200):
        fsync, seen = os.fsync, [0]

        def dying(fd, fsync=fsync, seen=seen, number=number):
            seen[0] += 1
            if seen[0] == number:
                raise Killed
            fsync(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying)
            patch.setattr("exporter.release.build_graph", lambda *_: graph)
            if not killed_build(checkpoint, out):
                break
        if out.exists():
            assert files_of(out) == undisturbed  # renamed, and killed before the rest was removed
            break
    assert number > 10
    assert files_of(out) == undisturbed


@pytest.fixture
def half(checkpoint, tmp_path, monkeypatch):
    """A build killed after 80 lines; → its partial folder."""
    with monkeypatch.context() as patch:
        kill_at_line(patch, 80, "after")
        assert killed_build(checkpoint, tmp_path / "b")
    return tmp_path / "b.partial"


def test_damage_of_what_was_written_is_found_and_mended(checkpoint, undisturbed, half):
    draw = random.Random(1)
    objects = [path for path in (half / "bundle").rglob("*") if path.is_file()] + list((half / "unfinished").iterdir())
    assert len(objects) > 40
    for path in draw.sample(objects, 12):
        data = bytearray(path.read_bytes())
        path.chmod(0o644)
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data if draw.random() < 0.7 else data[:-1])
    draw.choice(objects).unlink()
    build(checkpoint, half.with_name("b"))
    assert files_of(half.with_name("b")) == undisturbed


@pytest.mark.parametrize("record", [0, 1, 2])
def test_a_flipped_byte_in_an_unfinished_object_costs_the_records_from_there_on(
    checkpoint, undisturbed, tmp_path, monkeypatch, record
):
    with monkeypatch.context() as patch:
        kill_at_line(patch, 5, "after")  # embedding, head, three of the four experts of a layer
        assert killed_build(checkpoint, tmp_path / "b")
    (path,) = (tmp_path / "b.partial" / "unfinished").glob("*experts")
    data = bytearray(path.read_bytes())
    size_bytes = record_bytes(SMALL.hidden_size, SMALL.moe_intermediate_size)
    assert len(data) >= 3 * size_bytes
    data[record * size_bytes + 100] ^= 4
    path.write_bytes(data)
    written = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: written.append(at) or pwrite(fd, data, at))
    build(checkpoint, tmp_path / "b")
    assert written[0] == record * size_bytes
    assert files_of(tmp_path / "b") == undisturbed


def test_a_damaged_or_torn_journal_costs_work_never_the_result(checkpoint, undisturbed, half):
    draw, path = random.Random(2), half / "journal.jsonl"
    data = bytearray(path.read_bytes())
    for _ in range(20):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data[:-draw.randrange(1, 100)])
    build(checkpoint, half.with_name("b"), workers=2)
    assert files_of(half.with_name("b")) == undisturbed


def test_a_journal_torn_at_any_byte_is_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "r")
    for index in range(3):
        journal.append("record", "x", index=index, sha256=str(index))
    journal.close()
    data = path.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", data)]
    for size in range(len(data)):
        path.write_bytes(data[:size])
        torn = Journal(path, "r")
        whole = sum(size >= end - 1 for end in ends)  # the newline itself may be missing
        assert [torn.record("x", i) is not None for i in range(3)] == [i < whole for i in range(3)]
        torn.append("record", "x", index=9)
        torn.close()
        again = Journal(path, "r")
        assert again.record("x", 9) is not None
        again.close()
    other = Journal(path, "another recipe")
    assert other.record("x", 0) is None
    other.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("encoding", "dsv4-0424"), ("version", "2.0"), ("tokenizer", b"{}"), ("golden_prompts", [[1, 2]]), ("counter", 9)],
)
def test_another_recipe_is_refused_by_field_name(checkpoint, half, field, value):
    named = {"version": "release_version", "counter": "release_counter", "tokenizer": "tokenizer_sha256"}
    named["golden_prompts"] = "golden_prompts_sha256"
    before = files_of(half)
    with pytest.raises(UsageError, match=rf"another recipe \({named.get(field, field)}: .*remove this one"):
        build(checkpoint, half.with_name("b"), **{field: value})
    assert files_of(half) == before


def test_another_checkpoint_is_refused_by_field_name(checkpoint, half):
    first = sorted(checkpoint.glob("*.safetensors"))[0]
    os.utime(first, ns=(0, first.stat().st_mtime_ns + 1))
    with pytest.raises(UsageError, match=r"another recipe \(source_files"):
        build(checkpoint, half.with_name("b"))
    os.utime(first, ns=(0, first.stat().st_mtime_ns - 1))


def test_a_full_disk_leaves_what_was_written(checkpoint, undisturbed, tmp_path, monkeypatch):
    pwrite, room = os.pwrite, [200_000]

    def limited(fd, data, offset):
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        with pytest.raises(SpaceError, match=r"full: [\d,]+ more bytes are needed, [\d,]+ are free") as caught:
            build(checkpoint, tmp_path / "b", workers=2)
    needed = int(re.search(r"([\d,]+) more bytes", str(caught.value))[1].replace(",", ""))
    written = files_of(tmp_path / "b.partial")
    kept = sum(len(data) for name, data in written.items() if name.startswith(("bundle/objects", "unfinished")))
    total = sum(len(data) for name, data in undisturbed.items() if name.startswith("objects"))
    assert kept > 0
    assert 0 <= needed - (total - kept) < 100  # small tensors of equal bytes are stored once and counted twice
    build(checkpoint, tmp_path / "b")
    assert files_of(tmp_path / "b") == undisturbed


def test_a_disk_that_fills_at_any_small_write_is_one_line(checkpoint, undisturbed, tmp_path, monkeypatch):
    """Journal, recipe, graph and manifest are written elsewhere than objects."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    places = "exporter.stage.write_synced", "exporter.journal.os.fdatasync", "appliance.bundle_writer.write_synced"
    for name in places:
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(SpaceError, match="free some and start"):
                build(checkpoint, tmp_path / "b")
    build(checkpoint, tmp_path / "b")
    assert files_of(tmp_path / "b") == undisturbed


def test_too_little_space_is_said_before_the_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.release.SPARE_BYTES", 1 << 60)
    with pytest.raises(SpaceError, match=r"needs [\d,]+ bytes and [\d,]+ are free"):
        build(checkpoint, tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("name", "Not A Name", "name 'Not A Name'"), ("version", "é", "version 'é'"), ("counter", 0, "release_counter 0")],
)
def test_what_no_manifest_may_say_is_refused_before_the_work(checkpoint, tmp_path, field, value, message):
    with pytest.raises(BundleError, match=message):
        build(checkpoint, tmp_path / "b", **{field: value})
    assert not list(tmp_path.iterdir())


def test_interrupted_build_stops_soon_and_goes_on(checkpoint, undisturbed, tmp_path, monkeypatch):
    append, seen = Journal.append, [0]

    def interrupting(self, kind, key, **entry):
        append(self, kind, key, **entry)
        seen[0] += 1
        if seen[0] == 20:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupting)
        with pytest.raises(KeyboardInterrupt):
            build(checkpoint, tmp_path / "b", workers=2)
    assert 20 <= seen[0] < 60
    build(checkpoint, tmp_path / "b")
    assert files_of(tmp_path / "b") == undisturbed


def test_two_builds_of_one_folder_are_kept_apart(checkpoint, half):
    holder = Journal(half / "journal.jsonl", "whoever")
    with pytest.raises(BusyError, match="another build is writing here"):
        build(checkpoint, half.with_name("b"))
    holder.close()


def test_golden_tokens_found_by_a_killed_run_are_not_searched_again(checkpoint, tmp_path, monkeypatch):
    calls = []

    def find(bundle, config, prompts, profile):
        calls.append(profile)
        return (Golden(profile, (2, 3), (4,), 0.5),)

    release = a_release(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr("exporter.release.dataclasses.replace", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            write_bundle(release, tmp_path / "b", find=find)
    resumed = write_bundle(release, tmp_path / "b", find=find)
    assert calls == ["full"]
    assert resumed.digest == write_bundle(release, tmp_path / "c", find=find).digest


KILLS = [pytest.param(4, id="few"), pytest.param(40, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
def test_real_kills(checkpoint, undisturbed, tmp_path, kills):
    """SIGKILL to a process of its own, at a random size of the journal."""
    out, draw = tmp_path / "b", random.Random(kills)
    code = (
        "import sys, pathlib, exporter.provenance, exporter.release; from build_support import build;"
        f"exporter.release.code_version = exporter.provenance.code_version = lambda: {code_version()};"  # sources may
        "build(*map(pathlib.Path, sys.argv[1:3]), workers=2)"  # be edited while this runs
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    journal, done = tmp_path / "b.partial" / "journal.jsonl", 0
    while done < kills and not out.exists():
        before = journal.stat().st_size if journal.exists() else 0
        with subprocess.Popen([sys.executable, "-c", code, checkpoint, out], env=env, stderr=subprocess.PIPE) as child:
            goal = before + draw.randrange(1, 60_000 // kills)
            while child.poll() is None and (not journal.exists() or journal.stat().st_size < goal):
                time.sleep(0.001)
            if child.poll() is None:
                child.kill()
                done += 1
    if not out.exists():
        build(checkpoint, out)
    assert done >= min(kills, 3)
    assert files_of(out) == undisturbed
