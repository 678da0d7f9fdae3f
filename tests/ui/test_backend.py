from __future__ import annotations

import dataclasses
import json
import socket
import threading
from pathlib import Path

import pytest
from ui_support import REPORT, STATUS, FakeAdmin

from appliance.errors import UsageError
from appliance.wire import KvReport, KvStatus, Status
from ui.backend import (
    MAX_ANSWER_BYTES,
    AnswerError,
    ReplayBackend,
    ServerDownError,
    SocketBackend,
    UnixConnection,
    read_replay,
)


@pytest.fixture
def backend(home: Path) -> SocketBackend:
    return SocketBackend(home / "run/admin.sock", timeout_s=2.0)


def test_status_crosses_the_socket_whole(admin: FakeAdmin, backend: SocketBackend) -> None:
    assert backend.status() == STATUS


def test_log_asks_for_so_many_lines(admin: FakeAdmin, backend: SocketBackend) -> None:
    admin.lines = [f"line {n}" for n in range(10)]
    assert backend.log(3) == ("line 7", "line 8", "line 9")
    assert admin.asked == ["/admin/v1/log?lines=3"]


def test_no_socket_is_a_server_that_is_down(backend: SocketBackend) -> None:
    with pytest.raises(ServerDownError, match=r"nothing answers at .*admin\.sock"):
        backend.status()


def test_a_socket_nobody_listens_on_is_a_server_that_is_down(home: Path, backend: SocketBackend) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(home / "run/admin.sock"))
    with pytest.raises(ServerDownError):
        backend.status()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b"{}", "HTTP 500"),
        (200, b"not json", "did not answer JSON"),
        (200, b"[1]", "did not answer a JSON object"),
        (200, b'{"kv": 3}', "is not a status"),
        (200, b'{"uptime_s": "long"}', "uptime_s is 'long', not a number"),
        (200, b'{"uptime_s": NaN}', "uptime_s is nan, not a number"),
        (200, b'{"kv": {"writing": "yes"}}', "kv.writing is 'yes', not bool"),
        (200, b'{"kv": {"miss_reasons": {"x": "y"}}}', "kv.miss_reasons is 'y'"),
        (200, b'{"notes": [1]}', "notes is 1, not str"),
        (200, b" " * (MAX_ANSWER_BYTES + 1), "more than"),
    ],
)
def test_an_answer_nobody_can_read_names_what_is_wrong(
    admin: FakeAdmin, backend: SocketBackend, status: int, body: bytes, message: str
) -> None:
    admin.raw = (status, body)
    with pytest.raises(AnswerError, match=message):
        backend.status()


def test_a_socket_of_another_user_says_whose_it_is(
    admin: FakeAdmin, backend: SocketBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: UnixConnection) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(UnixConnection, "connect", refused)
    with pytest.raises(AnswerError, match="only by the user that runs the server"):
        backend.status()


def test_a_log_without_lines_is_refused(admin: FakeAdmin, backend: SocketBackend) -> None:
    admin.raw = (200, b'{"lines": "many"}')
    with pytest.raises(AnswerError, match="no list of lines"):
        backend.log(5)


def test_the_cache_crosses_the_socket_whole(admin: FakeAdmin, backend: SocketBackend) -> None:
    assert backend.kv() == REPORT
    assert admin.asked == ["/admin/v1/kv"]


def test_the_cache_of_a_newer_and_of_an_older_server(admin: FakeAdmin, backend: SocketBackend) -> None:
    newer = {**REPORT.to_dict(), "shards": 3, "status": {**dataclasses.asdict(REPORT.status), "tiers": 2}}
    newer["tenants"] = [{**tenant, "quota": 5} for tenant in newer["tenants"]]
    admin.raw = (200, json.dumps(newer).encode())
    assert backend.kv() == REPORT
    admin.raw = (200, b'{"status": {"used_bytes": 7}, "tenants": [{"name": "a"}]}')
    assert backend.kv().status == KvStatus(used_bytes=7)
    assert backend.kv().tenants[0].size_bytes == 0
    admin.report, admin.raw = None, None
    with pytest.raises(AnswerError, match="/admin/v1/kv answered HTTP 404"):
        backend.kv()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"tenants": [{"size_bytes": "big"}]}', "tenants.size_bytes is 'big', not a number"),
        (b'{"tenants": 3}', "is not a report"),
        (b'{"misses": [{"reason": 3}]}', "misses.reason is 3, not str"),
        (b'{"status": {"blocks": null}}', "status.blocks is None, not a number"),
        (b'{"logged_reasons": {"ttl": "many"}}', "logged_reasons is 'many'"),
        (b'{"problems": [[]]}', r"problems is \[\], not str"),
    ],
)
def test_a_report_nobody_can_read_names_what_is_wrong(
    admin: FakeAdmin, backend: SocketBackend, body: bytes, message: str
) -> None:
    admin.raw = (200, body)
    with pytest.raises(AnswerError, match=message):
        backend.kv()


def test_a_recording_tells_of_the_cache_what_its_status_says() -> None:
    backend = ReplayBackend([STATUS])
    assert backend.kv() == KvReport(status=STATUS.kv, live=True)


def test_an_older_console_reads_a_newer_server(admin: FakeAdmin, backend: SocketBackend) -> None:
    admin.raw = (200, json.dumps({**STATUS.to_dict(), "card_temperature_c": 61}).encode())
    assert backend.status() == STATUS


def test_a_server_that_says_nothing_is_not_waited_for(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(home / "run/admin.sock"))
        mute.listen()
        with pytest.raises(AnswerError, match="no answer within"):
            SocketBackend(home / "run/admin.sock", timeout_s=0.05).status()


def test_a_server_that_hangs_up_is_an_answer_error(home: Path, backend: SocketBackend) -> None:
    with socket.socket(socket.AF_UNIX) as rude:
        rude.bind(str(home / "run/admin.sock"))
        rude.listen()

        def hang_up() -> None:
            rude.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(AnswerError, match=r"admin\.sock"):
            backend.status()
        thread.join()


def test_a_home_too_long_for_a_socket_is_told_at_once() -> None:
    with pytest.raises(UsageError, match="choose a shorter home"):
        SocketBackend(Path("/" + "x" * 120))


def test_replay_plays_in_order_and_stays_on_the_last(tmp_path: Path) -> None:
    recording = tmp_path / "day.jsonl"
    recording.write_text("\n".join(json.dumps(Status(running=n).to_dict()) for n in range(3)) + "\n\n")
    backend = read_replay(recording)
    assert isinstance(backend, ReplayBackend)
    assert [backend.status().running for _ in range(5)] == [0, 1, 2, 2, 2]
    assert backend.log(10) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no status line"), ('{"running": 1}\n{', "line 2 is not a status"), ("[]", "line 1 is not a status")],
)
def test_a_bad_recording_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    recording = tmp_path / "day.jsonl"
    recording.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_replay(recording)


def test_a_missing_recording_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read as a recording"):
        read_replay(tmp_path / "none.jsonl")
