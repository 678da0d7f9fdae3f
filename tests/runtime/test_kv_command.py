"""``python -m runtime kv …`` on real stores: beside one that is open, after it was closed, and through ``solocard``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kv_support import MASTER_KEY, look_up, open_store, prompt, put, put_tail, tiny_layout

from appliance import cli
from appliance.journal import Journal
from appliance.trial import child_command, child_environment
from appliance.wire import KvReport, KvTenant, Progress
from runtime.__main__ import main
from runtime.kv import verify as verifying
from runtime.kv.contents import open_index
from runtime.kv.job import Note, PutJob
from runtime.kv.keys import derive_master
from runtime.kv.record import Role, record_bytes
from runtime.kv.store import KvStore
from runtime.kv.tail import tail_bytes
from runtime.kv.verify import verify
from runtime.kv_command import seconds

BLOCK_BYTES, UNIT_BYTES = (record_bytes(n) for n in (tiny_layout().block_bytes, tiny_layout().checkpoint_bytes))
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    where = tmp_path / "home"
    monkeypatch.setenv("SOLOCARD_HOME", str(where))
    (where / "keys").mkdir(parents=True, mode=0o700)
    (where / "keys/kv-master").write_bytes(MASTER_KEY)
    (where / "keys/kv-master").chmod(0o600)
    return where


@pytest.fixture
def store(home) -> Iterator[KvStore]:
    """Three tenants: 600 and 1,024 tokens, 256 tokens with an answer's end, a tail."""
    opened = open_store(home / "kv")
    assert put(opened, 1, 512).stored
    assert put(opened, 2, 1024).stored
    assert put(opened, 3, 256, "team-b", Role.ANSWER).stored
    assert put_tail(opened, 4, 300, "team-c").stored
    yield opened
    opened.close()


@pytest.fixture
def ask(home, capsys) -> Ask:
    """Run one command; the data of its last line."""

    def run(*words: str) -> dict[str, Any]:
        assert main(["kv", *words]) == 0, capsys.readouterr().err
        last = Progress(**json.loads(capsys.readouterr().out.splitlines()[-1]))
        assert last.done
        return last.data

    return run


def note(store: KvStore, chat: int, tokens: int, reason: str, at_s: float = 1e9, tenant: str = "default") -> None:
    made = Note(at_s, tokens, 256 if reason != "no-unit" else 0, 9, reason)
    assert store.put(PutJob(tenant, prompt(chat, tokens), note=made)).stored


def refused(capsys, *words: str) -> tuple[int, str]:
    code = main(["kv", *words])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return code, said


# -- stats


def test_a_home_without_a_cache(ask):
    report = KvReport.from_dict(ask("stats"))
    assert (report.live, report.tenants, report.problems) == (False, (), ())
    assert report.status.max_bytes == 8 << 30
    assert ask("verify")["records"] == 0


@pytest.mark.parametrize("closed", [False, True])
def test_stats_beside_an_open_store_and_after_it(ask, store, home, closed):
    note(store, 1, 600, "")
    note(store, 2, 2000, "no-unit")
    if closed:
        store.close()
    report = KvReport.from_dict(ask("stats"))
    tail = record_bytes(tail_bytes(tiny_layout(), 300))
    assert (report.status.blocks, report.status.checkpoints) == (2 + 4 + 1 + 1, 4)
    assert report.roles == {"prompt": 2, "answer": 1, "anchor": 0, "suspended": 1}
    sizes = {tenant.name: tenant.size_bytes for tenant in report.tenants}
    assert sizes == {
        "default": 6 * BLOCK_BYTES + 2 * UNIT_BYTES, "team-b": BLOCK_BYTES + UNIT_BYTES, "team-c": BLOCK_BYTES + tail,
    }  # fmt: skip
    assert report.status.used_bytes == sum(path.stat().st_size for path in (home / "kv").glob("*.kvs"))
    assert report.status.segments == len(list((home / "kv").glob("*.kvs")))
    assert report.status.written_today_bytes >= sum(sizes.values())
    assert (report.logged_requests, report.logged_prompt_tokens, report.logged_hit_tokens) == (2, 2600, 256)
    assert report.logged_reasons == {"no-unit": 1}
    assert [(miss.tokens, miss.reason) for miss in report.misses] == [(2000, "no-unit")]
    assert report.free_bytes > 0
    assert report.problems == ()


def test_the_stores_own_count_agrees(ask, store):
    look_up(store, prompt(9, 300))
    report = KvReport.from_dict(ask("stats"))
    own = store.status()
    assert [type(count) for count in (own.lookups, own.hits, own.replays)] == [int] * 3
    same = ("used_bytes", "blocks", "checkpoints", "segments", "written_today_bytes")
    assert {name: getattr(report.status, name) for name in same} == {name: getattr(own, name) for name in same}


def test_what_was_set_aside_counts_as_damaged_and_not_as_held(ask, store, home):
    flip(home / "kv/0000.kvs", 5000)  # the first block of the first chat
    assert look_up(store, prompt(1, 600))[0].reason == "corrupt"
    put(store, 5, 256)  # the next commit notes it
    report = KvReport.from_dict(ask("stats"))
    assert (report.damaged, report.status.blocks) == (1, 8)  # 8 - 1 + 1
    found = ask("verify")
    assert [(item["file"], item["offset"]) for item in found["damaged"]] == [("0000.kvs", 0)]


def test_damaged_parts_are_sentences_not_stack_traces(ask, store, home, capsys):
    store.close()
    (home / "kv/index.sqlite3").write_bytes(b"no database" * 1000)
    report = KvReport.from_dict(ask("stats"))
    assert "index.sqlite3 cannot be read" in report.problems[0]
    assert [tenant.name for tenant in report.tenants] == ["default", "team-b", "team-c"]  # their keys are there
    code, said = refused(capsys, "verify")
    assert (code, "makes it anew when it starts" in said) == (6, True)
    (home / "keys/kv-master").chmod(0o644)
    assert "chmod 600" in KvReport.from_dict(ask("stats")).problems[0]
    assert refused(capsys, "verify")[0] == 6


def test_a_lost_index_beside_segments_is_not_an_empty_cache(ask, store, home, capsys):
    store.close()
    for path in (home / "kv").glob("index.sqlite3*"):
        path.unlink()
    report = KvReport.from_dict(ask("stats"))
    assert "index.sqlite3 is missing" in report.problems[0]
    assert [tenant.name for tenant in report.tenants] == ["default", "team-b", "team-c"]
    code, said = refused(capsys, "verify")
    assert (code, "index.sqlite3 is missing; a server makes it anew" in said) == (6, True)


def test_an_index_that_cannot_be_opened_now_is_not_called_damaged(ask, home, monkeypatch):
    (home / "kv").mkdir()
    (home / "kv/index.sqlite3").mkdir()  # stands for whatever keeps SQLite from opening a file
    assert "cannot be opened now" in KvReport.from_dict(ask("stats")).problems[0]


def test_a_master_key_that_cannot_be_used_purges_nobody(ask, store, home):
    store.close()
    (home / "keys/kv-master").chmod(0o644)
    report = KvReport.from_dict(ask("stats"))
    assert (report.status.blocks, report.purged_bytes) == (8, 0)
    assert "chmod 600" in report.problems[0]


def test_a_damaged_key_file_is_a_note_and_the_others_are_read(ask, store, home):
    store.close()
    path = store._ground.tenants.path("team-b")
    path.write_bytes(b"x" * 90)
    report = KvReport.from_dict(ask("stats"))
    assert {tenant.name for tenant in report.tenants} == {"default", "team-c"}
    assert path.name in report.problems[0]
    assert report.purged_bytes == BLOCK_BYTES + UNIT_BYTES


# -- verify


def test_verify_opens_every_record(ask, store, home):
    found = ask("verify")
    assert (found["records"], found["damaged"], found["purged_records"]) == (12, [], 0)
    assert found["read_bytes"] == 8 * BLOCK_BYTES + 3 * UNIT_BYTES + record_bytes(tail_bytes(tiny_layout(), 300))


def test_verify_tells_how_far_it_is(store, home, monkeypatch, capsys):
    monkeypatch.setattr("runtime.kv_command.PROGRESS_S", 0.0)
    assert main(["kv", "verify"]) == 0
    *steps, last = [Progress(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert len(steps) == 12
    assert [step.done_bytes for step in steps] == sorted(step.done_bytes for step in steps)
    assert {step.total_bytes for step in steps} == {store.status().used_bytes}
    assert (last.done, last.data["records"]) == (True, 12)


def test_verify_names_what_is_damaged(ask, store, home):
    with open_index(home) as index:
        rows = [row for segment in index.segments() for row in index.rows_of(segment.number)]
        sealed = [segment.number for segment in index.segments() if segment.sealed]
    for row, at in ((rows[0], 5000), (rows[3], 40)):  # a byte of a payload, a byte of a header
        flip(home / "kv" / f"{row.segment:04d}.kvs", row.offset + at)
    footer = home / "kv" / f"{sealed[0]:04d}.kvs"
    flip(footer, footer.stat().st_size - 4096)
    found = ask("verify")
    assert found["records"] == 12
    places = {(item["file"], item["offset"]): item["problem"] for item in found["damaged"]}
    assert "not authentic" in places[f"{rows[0].segment:04d}.kvs", rows[0].offset]
    assert "another header" in places[f"{rows[3].segment:04d}.kvs", rows[3].offset]
    assert "list of records" in places[footer.name, footer.stat().st_size]
    assert len(places) == 3


def test_a_missing_segment_is_damage(ask, store, home):
    with open_index(home) as index:
        segment = index.segments()[0].number
        lost = len(index.rows_of(segment))
    (home / "kv" / f"{segment:04d}.kvs").unlink()
    found = ask("verify")
    assert len([item for item in found["damaged"] if item["problem"] == "No such file or directory"]) == lost > 0


def test_what_was_freed_while_it_was_read_is_no_damage(store, home, monkeypatch):
    def freed(path, row, io):
        store._ground.index.begin()
        store._ground.index.forget(row.segment)
        store._ground.index.commit()
        raise FileNotFoundError(2, "No such file or directory")

    with open_index(home) as index:
        keys = {info.tenant_id: store._ground.tenants.find(info.name) for info in store._ground.tenants.all()}
        monkeypatch.setattr(verifying, "read_record", freed)
        found = verify(home / "kv", index, keys, derive_master(MASTER_KEY), lambda _: None)
    assert (found.records, found.damaged) == (0, [])


def test_solocard_ends_with_6_and_says_what_it_means(store, home, capsys):
    assert cli.main(["kv", "verify"]) == 0
    assert "12 records opened and authenticated" in capsys.readouterr().out
    flip(home / "kv/0000.kvs", 5000)
    assert cli.main(["kv", "verify"]) == 6
    said = capsys.readouterr().out
    assert "1 of 12 records are damaged" in said
    assert "0000.kvs at byte 0" in said


def test_another_master_key_is_not_called_purged(store, home, capsys):
    store.close()
    (home / "keys/kv-master").write_bytes(bytes(32))
    assert cli.main(["kv", "verify"]) == 6
    said = capsys.readouterr().out
    assert "does not open with keys/kv-master" in said
    assert "all good" not in said
    assert "as it should be" not in said


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# -- purge


def test_a_purge_counts_at_once_for_a_store_that_is_open(ask, store, home):
    assert look_up(store, prompt(3, 300), "team-b")[0].tokens == 256
    purged = ask("purge", "team-b")
    assert (purged["blocks"], purged["checkpoints"], purged["size_bytes"]) == (1, 1, BLOCK_BYTES + UNIT_BYTES)
    assert purged["elapsed_s"] < 1
    assert look_up(store, prompt(3, 300), "team-b")[0].tokens == 0
    assert look_up(store, prompt(1, 600))[0].tokens == 512
    report = KvReport.from_dict(ask("stats"))
    assert {tenant.name for tenant in report.tenants} == {"default", "team-c"}
    assert report.purged_bytes == BLOCK_BYTES + UNIT_BYTES
    found = ask("verify")
    assert (found["records"], found["purged_records"], found["damaged"]) == (10, 2, [])


def test_a_purge_beside_a_damaged_index_says_that_it_was_done(store, home, capsys):
    store.close()
    (home / "kv/index.sqlite3").write_bytes(b"no database" * 1000)
    assert cli.main(["kv", "purge", "team-b", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "team-b: key destroyed" in said
    assert "what it stored was not counted" in said
    assert len(list((home / "kv/tenants").iterdir())) == 2
    (line,) = Journal(home).read()
    assert (line["event"], line["tenant"]) == ("kv-purge", "team-b")


def test_a_tenant_of_that_name_starts_empty_again(ask, store):
    ask("purge", "team-b")
    assert put(store, 3, 256, "team-b").stored
    assert look_up(store, prompt(3, 300), "team-b")[0].tokens == 256
    (team,) = [tenant for tenant in KvReport.from_dict(ask("stats")).tenants if tenant.name == "team-b"]
    assert isinstance(team, KvTenant)
    assert team.blocks == 1


def test_an_unknown_tenant_lists_the_known_and_changes_nothing(store, capsys):
    code, said = refused(capsys, "purge", "nobody")
    assert code == 2
    assert "there are: default, team-b, team-c" in said
    assert look_up(store, prompt(1, 600))[0].tokens == 512


def test_a_damaged_key_file_can_be_purged_by_its_name(ask, store):
    path = store._ground.tenants.path("team-b")
    path.write_bytes(b"x" * 90)
    assert ask("purge", "team-b")["blocks"] == 0
    assert not path.exists()


def test_a_whole_purge_by_command_line_in_another_process(store, home):
    done = subprocess.run(
        child_command("appliance.cli", "kv", "purge", "team-b", "--yes"), env=child_environment(home),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "team-b: key destroyed in" in done.stdout
    assert "left on the disk until overwritten" in done.stdout
    assert look_up(store, prompt(3, 300), "team-b")[0].tokens == 0


# -- export-trace


def test_the_trace_tells_what_began_alike_and_nothing_else(ask, store, tmp_path):
    for at_s, tokens, tenant in ((1e9, 600, "default"), (1e9 + 1.5, 1100, "default"), (1e9 + 2, 600, "team-b")):
        note(store, 1, tokens, "no-unit", at_s, tenant)
    out = tmp_path / "trace.jsonl"
    told = ask("export-trace", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["hash_ids"] for row in rows] == [[0, 1, 2], [0, 1, 3, 4, 5], [6, 7, 8]]
    assert [row["timestamp"] for row in rows] == [0, 1500, 2000]
    assert {tuple(row) for row in rows} == {("timestamp", "input_length", "output_length", "hash_ids")}
    assert (told["requests"], told["blocks"]) == (3, 9)
    assert not list(tmp_path.glob("*.partial"))


def test_purged_tenants_and_old_requests_are_left_out(ask, store, tmp_path):
    import time

    note(store, 1, 600, "no-unit", time.time() - 3 * 86_400)
    note(store, 1, 600, "no-unit", time.time() - 60)
    note(store, 1, 600, "no-unit", time.time() - 60, "team-b")
    assert ask("export-trace", str(tmp_path / "all"))["requests"] == 3
    assert ask("export-trace", str(tmp_path / "new"), "--since", "2d")["requests"] == 2
    ask("purge", "team-b")
    assert ask("export-trace", str(tmp_path / "kept"))["requests"] == 2


def test_a_trace_overwrites_nothing(ask, store, tmp_path, capsys):
    out = tmp_path / "trace.jsonl"
    out.write_text("mine")
    code, said = refused(capsys, "export-trace", str(out))
    assert (code, "is there already" in said, out.read_text()) == (2, True, "mine")
    code, said = refused(capsys, "export-trace", str(tmp_path / "none/trace"))
    assert (code, "none is no folder" in said) == (2, True)


def test_an_empty_log_is_an_empty_file(ask, home, tmp_path):
    assert ask("export-trace", str(tmp_path / "trace"))["requests"] == 0
    assert (tmp_path / "trace").read_text() == ""


def test_ages():
    assert [seconds(age) for age in ("90m", "12h", "7d", "2w")] == [5400, 43_200, 604_800, 1_209_600]
    for wrong in ("", "7", "d", "-1d", "7s", "1e3d", "9999999d"):
        with pytest.raises(Exception, match="like 90m"):
            seconds(wrong)


# -- share


def test_share_and_take_back(ask, home, tmp_path, capsys):
    from runtime.kv.approvals import APPROVALS, Approvals

    text = tmp_path / "system.txt"
    text.write_text("You are helpful.\n")
    approvals = Approvals(home / "kv" / APPROVALS, MASTER_KEY)
    assert "17 characters; its final line break is part of it" in ask("share", str(text))["lines"][0]
    assert approvals.is_approved("You are helpful.\n")
    assert not approvals.is_approved("You are helpful.")
    ask("share", str(text), "--remove")
    assert not approvals.is_approved("You are helpful.\n")
    code, said = refused(capsys, "share", str(text), "--remove")
    assert (code, "is not approved" in said) == (2, True)


@pytest.mark.parametrize(("data", "says"), [(b"", "no text"), (b"\xff", "not UTF-8"), (None, "cannot be read")])
def test_a_text_that_no_request_can_send(home, tmp_path, capsys, data, says):
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    code, said = refused(capsys, "share", str(tmp_path / "text"))
    assert (code, says in said) == (2, True)


# -- cost


def test_the_command_does_not_wait_for_the_engine(home):
    code = (
        "import sys; from runtime.__main__ import main; main(['kv', 'stats']);"
        "print([m for m in ('onnxruntime', 'tokenizers', 'starlette', 'tuf') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(home), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
