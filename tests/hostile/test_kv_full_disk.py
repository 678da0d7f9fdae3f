"""A full or failing disk stops the writing, with a reason, never the serving; with room again all is well."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys

import kv_full_support
import pytest
from kv_fault_support import memory_folder
from kv_full_support import CALLS, WRITING, FailIo, endure
from kv_story_support import make_story

NEVER = 1 << 60
CODES = [errno.ENOSPC, errno.EIO]


@pytest.fixture
def folder():
    with memory_folder() as path:
        yield path


def calls_of(folder, story, only):
    """How many of these calls the undisturbed story makes."""
    io = FailIo(0, NEVER, 0, only)
    assert list(endure(folder / "kv", story, io)) == []
    shutil.rmtree(folder / "kv")
    return io.calls


def failing(folder, story, code, at, more, only):
    found = list(endure(folder / "kv", story, FailIo(code, at, more, only), reads="preadv" in only))
    shutil.rmtree(folder / "kv")
    return [f"{errno.errorcode[code]} at call {at} of {only}, {more} more: {problem}" for problem in found]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_the_disk_fails_at_a_seeded_call(folder, small, code):
    """Once, and from there on for good: what was acknowledged is served all the time."""
    story, rng = make_story(12, small=small), random.Random(f"{small} {code}")
    count, found = calls_of(folder, story, WRITING), []
    for more in (0, NEVER):
        for at in rng.sample(range(count), 2):
            found += failing(folder, story, code, at, more, WRITING)
    assert found == []


def test_reads_fail(folder):
    """A record that cannot be read is a miss, with everything that needs it; a copy made of it is never half."""
    story, rng, found = make_story(12, small=True), random.Random("reads"), []
    count = calls_of(folder, story, ["preadv"])
    for more in (0, NEVER):
        for at in rng.sample(range(count), 1):
            found += failing(folder, story, errno.EIO, at, more, ["preadv"])
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("only", CALLS)
def test_the_disk_fails_at_every_call(folder, only, code):
    """Each call of each kind once, in a story with reclaims, and from there on for good."""
    story, found = make_story(12, small=True), []
    for at in range(calls_of(folder, story, [only])):
        for more in (0, NEVER):
            found += failing(folder, story, code, at, more, [only])
    assert found == []


def small_file_system(folder, kind):
    """What went wrong on it; skips where this user may not mount."""
    try_it = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(folder)]
    may = subprocess.run(try_it, capture_output=True, check=False)
    if may.returncode:
        pytest.skip("no right to mount a file system")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "-m", sys.executable, kv_full_support.__file__, str(folder / "disk"), kind]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_a_full_tmpfs(tmp_path):
    assert small_file_system(tmp_path, "tmpfs") == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="no mkfs.ext4")
def test_a_full_ext4(tmp_path):
    assert small_file_system(tmp_path, "ext4") == ""
