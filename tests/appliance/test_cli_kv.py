"""``solocard kv``: what it says of a report, what it asks, and how it runs the child that does the work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance import cli_kv, kv_child
from appliance.cli import main
from appliance.errors import BusyError, SolocardError, StoreError
from appliance.kv_child import run_kv
from appliance.kv_words import MEANING, REMEDY, ago, bar, stats_lines
from appliance.server_link import ServerDownError
from appliance.wire import MISS_REASONS, KvMiss, KvReport, KvStatus, KvTenant, Progress

DOCS = Path(__file__).parents[2] / "docs"
REPORT = KvReport(
    status=KvStatus(
        enabled=True, used_bytes=1_288_490_189, max_bytes=8_589_934_592, blocks=1204, checkpoints=96, segments=5,
        written_today_bytes=300 << 20, daily_write_bytes=20 << 30, min_free_bytes=1 << 30,
    ),
    roles={"prompt": 80, "answer": 10, "anchor": 6, "suspended": 0}, damaged=2, purged_bytes=50 << 20,
    free_bytes=40 << 30, tenants=(KvTenant("default", 1200, 95, 1_200_000_000, 1), KvTenant("team-b")),
    logged_requests=312, logged_prompt_tokens=98_765, logged_hit_tokens=61_440,
    logged_reasons={"no-unit": 41, "evicted": 3}, misses=(KvMiss(1.0, 600, 256, "no-unit"),),
    problems=("something to know",),
)  # fmt: skip
Fake = Callable[[str], None]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SOLOCARD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def child(monkeypatch, tmp_path) -> Fake:
    """The child becomes a Python program of the test's."""

    def becomes(program: str) -> None:
        path = tmp_path / "child.py"
        path.write_text("import json, sys\n" + program)
        monkeypatch.setattr(kv_child, "child_command", lambda *words: [sys.executable, str(path), *words])

    return becomes


@pytest.fixture
def runs(monkeypatch) -> list[list[str]]:
    """Words of every child, which answers with what a purge of ``default`` would."""
    asked: list[list[str]] = []

    def answer(home, words, report=None):
        asked.append(list(words))
        if words[0] == "stats":
            return REPORT.to_dict()
        return {"blocks": 1200, "checkpoints": 95, "size_bytes": 1_200_000_000, "elapsed_s": 0.0123}

    monkeypatch.setattr(cli_kv, "run_kv", answer)
    return asked


# -- stats


def test_stats_in_words(home):
    text = "\n".join(stats_lines(home, REPORT))
    assert f"KV cache in {home}/kv, read from the files; no server is running" in text
    assert "used      [####....................]  15 %  1.2 GiB" not in text  # sizes below 10 GiB are in MiB
    assert "used      [####....................]  15 %  1,228.8 MiB of 8,192.0 MiB; 40.0 GiB free on the disk" in text
    assert "50.0 MiB of it are of purged tenants" in text
    assert "1,204 blocks of 256 tokens, 96 checkpoints (80 prompt, 10 answer, 6 anchor), 5 segment files" in text
    assert "2 damaged records set aside" in text
    assert "today     300.0 MiB written of 20.0 GiB (kv.daily_write_bytes)" in text
    assert "62 %  61,440 of 98,765 prompt tokens of the newest 312 requests were read, not computed" in text
    assert text.index("no-unit") < text.index("evicted")
    assert f"{41:>7,}  {MEANING['no-unit']}" in text
    assert "default" in text
    assert "team-b" in text
    assert text.endswith("note: something to know")


@pytest.mark.parametrize(
    ("status", "live", "says"),
    [
        ({"enabled": False}, True, "no: the cache is off; set kv.enabled: true"),
        ({"enabled": True}, False, "no server is running"),
        ({"enabled": True}, True, "writes    yes"),
        ({"enabled": True, "writing": False, "reason": "ENOSPC: No space left"}, True, REMEDY["ENOSPC"]),
        ({"enabled": True, "writing": False, "reason": "quota: kv.max_bytes = 7 is in use"}, True, REMEDY["quota"]),
        (
            {
                "enabled": True,
                "writing": False,
                "reason": "policy: kv.daily_write_bytes = 7 is used up until 00:00 UTC",
            },
            True,
            REMEDY["kv.daily_write_bytes"],
        ),
        (
            {"enabled": True, "writing": False, "reason": "quota: less than kv.min_free_bytes = 7 would be left"},
            True,
            REMEDY["kv.min_free_bytes"],
        ),
        ({"enabled": True, "writing": False, "reason": "not opened: kv: EIO"}, True, REMEDY["not opened"]),
        ({"enabled": True, "writing": False, "reason": "new in 2031"}, True, "stored prompts are still read"),
    ],
)
def test_whether_it_writes_and_what_to_do(home, status, live, says):
    assert says in "\n".join(stats_lines(home, KvReport(status=KvStatus(**status), live=live)))


def test_an_empty_cache_is_said_calmly(home):
    text = "\n".join(stats_lines(home, KvReport(status=KvStatus(enabled=True, max_bytes=1 << 30))))
    assert "no request logged yet" in text
    assert "tenants   none has stored anything" in text
    assert "misses" not in text


def test_every_reason_has_a_sentence_here_and_in_the_manual():
    assert set(MEANING) == set(MISS_REASONS)
    manual = (DOCS / "operations.md").read_text()
    assert [reason for reason in MISS_REASONS if f"\n| `{reason}` |" not in manual] == []
    assert [mark for mark in REMEDY if mark not in manual and mark not in ("EDQUOT", "slower than")] == []


def test_stats_from_the_files_and_from_the_server(home, runs, monkeypatch, capsys):
    assert main(["kv", "stats"]) == 0
    assert "no server is running" in capsys.readouterr().out
    assert runs == [["stats"]]
    monkeypatch.setattr(cli_kv, "read_kv", lambda _: KvReport(live=True, status=KvStatus(enabled=True)))
    assert main(["kv", "stats"]) == 0
    assert "as the running server counts" in capsys.readouterr().out
    assert runs == [["stats"]]


def test_stats_as_json_is_the_report(home, runs, capsys):
    assert main(["kv", "stats", "--json"]) == 0
    last = Progress(**json.loads(capsys.readouterr().out))
    assert last.done
    assert KvReport.from_dict(last.data) == REPORT
    assert last.data["meaning"] == {reason: MEANING[reason] for reason in ("no-unit", "evicted")}


def test_bars_never_lie():
    assert bar(0, 100) == "[" + "." * 24 + "]   0 %"
    assert bar(1, 10_000).startswith("[#.")
    assert bar(1, 10_000).endswith(" <1 %")
    assert bar(999, 1000).endswith(" 99 %")
    assert bar(200, 100) == "[" + "#" * 24 + "] 100 %"
    assert bar(5, 0).endswith("  0 %")


def test_how_long_ago():
    spans = {0: "used just now", 59: "used just now", 60: "used 1 min ago", 3600: "used 60 min ago",
             7200: "used 2 h ago", 86400 * 3: "used 3 days ago", -5: "used just now"}  # fmt: skip
    assert {span: ago(1e9, 1e9 + span) for span in spans} == spans
    assert ago(0) == "never used"


# -- purge


def test_purge_asks_a_person(home, runs, monkeypatch, capsys):
    class Terminal:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return self.answer

    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert main(["kv", "purge", "default"]) == 2
    asked = capsys.readouterr().err
    assert "1,200 blocks, 95 checkpoints" in asked
    assert "can never be read again" in asked
    assert "nothing was changed" in asked
    assert runs == [["stats"]]
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    assert main(["kv", "purge", "default"]) == 0
    assert runs[1:] == [["stats"], ["purge", "default"]]
    said = capsys.readouterr().out
    assert "key destroyed in 12 ms; 1,200 blocks and 95 checkpoints" in said
    assert "left on the disk until overwritten" in said
    assert "SSD" in said


def test_purge_without_a_person_needs_yes(home, runs, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert main(["kv", "purge", "default"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert main(["kv", "purge", "default", "--yes", "--json"]) == 0
    assert runs[-1] == ["purge", "default"]
    assert Progress(**json.loads(capsys.readouterr().out)).data["size_bytes"] == 1_200_000_000


def test_an_unknown_tenant_lists_the_known(home, runs, capsys):
    assert main(["kv", "purge", "nobody"]) == 2
    assert "there are: default, team-b" in capsys.readouterr().err
    assert runs == [["stats"]]


# -- verify


VERIFIED = {"records": 1300, "read_bytes": 1_200_000_000, "purged_records": 7, "elapsed_s": 2.5, "damaged": []}


def test_verify_says_what_damage_means_and_ends_with_6(home, monkeypatch, capsys):
    damaged = [{"file": "0001.kvs", "offset": 4096 * n, "problem": "not authentic"} for n in range(12)]
    monkeypatch.setattr(cli_kv, "run_kv", lambda *_: VERIFIED | {"damaged": damaged})
    assert main(["kv", "verify"]) == StoreError.exit_code == 6
    said = capsys.readouterr().out
    assert "12 of 1,300 records are damaged" in said
    assert "nothing wrong is ever served" in said
    assert "0001.kvs at byte 36,864: not authentic" in said
    assert "and 2 more" in said
    assert "what to do" in said
    assert main(["kv", "verify", "--json"]) == 6
    last = Progress(**json.loads(capsys.readouterr().out))
    assert (last.done, last.ok, len(last.data["damaged"])) == (True, False, 12)


def test_verify_of_a_good_cache(home, monkeypatch, capsys):
    monkeypatch.setattr(cli_kv, "run_kv", lambda *_: VERIFIED)
    assert main(["kv", "verify"]) == 0
    said = capsys.readouterr().out
    assert "1,300 records opened and authenticated" in said
    assert "all good" in said
    assert "7 records of purged tenants" in said


# -- export-trace and share


def test_paths_are_made_absolute_for_the_child(home, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(cli_kv, "run_kv", lambda _, words, *__: asked.append(words) or {"requests": 3, "blocks": 9})
    monkeypatch.chdir(tmp_path)
    assert main(["kv", "export-trace", "out.jsonl", "--since", "7d"]) == 0
    assert main(["kv", "share", "system.txt", "--remove"]) == 0
    assert asked == [
        ["export-trace", str(tmp_path / "out.jsonl"), "--since", "7d"],
        ["share", str(tmp_path / "system.txt"), "--remove"],
    ]
    assert "No text, no token, no hash" in capsys.readouterr().out


@pytest.mark.parametrize("age", ["7", "d", "7x", "-7d", "7.5d", "٧d", ""])
def test_an_age_is_a_number_and_a_unit(home, age, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["kv", "export-trace", "out", "--since", age])
    assert ended.value.code == 2
    assert "12h" in capsys.readouterr().err or age.startswith("-")


# -- the child


def test_progress_is_passed_on_and_the_last_line_answers(child, home):
    child("""
for done in (10, 20):
    print(json.dumps({"step": "verify", "message": "records", "done_bytes": done, "total_bytes": 20}), flush=True)
print(json.dumps({"step": "kv", "message": "", "done": True, "data": {"words": sys.argv[1:]}}))
""")
    seen: list[Progress] = []
    assert run_kv(home, ["verify", "--all"], seen.append) == {"words": ["runtime", "kv", "verify", "--all"]}
    assert [progress.done_bytes for progress in seen] == [10, 20]


@pytest.mark.parametrize(("code", "kind"), [(6, StoreError), (7, BusyError), (1, SolocardError), (99, SolocardError)])
def test_errors_of_the_child_are_errors_of_ours(child, home, code, kind):
    child(f"print('solocard: what went wrong', file=sys.stderr); sys.exit({code})")
    with pytest.raises(SolocardError, match=r"^what went wrong$") as caught:
        run_kv(home, ["stats"])
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("sys.exit(3)", "ended with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with signal 9"),
        ("print('hello')", "printed 'hello', not a progress line"),
        ("pass", "exit code 0, saying nothing"),
    ],
)
def test_a_child_that_breaks_is_one_line(child, home, program, says):
    child(program)
    with pytest.raises(SolocardError, match=says):
        run_kv(home, ["stats"])


def test_a_server_that_knows_no_report_is_read_from_the_files(home, runs, monkeypatch):
    def old_server(_):
        raise ServerDownError("answered 404")

    monkeypatch.setattr(cli_kv, "read_kv", old_server)
    assert cli_kv.read_report(home) == REPORT
