"""The admin socket, the key folder, and the whole process with its signals."""

import dataclasses
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from kv_support import MASTER_KEY, open_store, put
from serve_live import BUNDLE_ID, live, until
from serve_support import FakeEngine, FakeKv

from appliance.errors import BusyError, UsageError
from appliance.keys import new_key, revoke_key
from appliance.server_link import read_kv, read_status
from appliance.wire import ADMIN_SOCKET, KvReport
from runtime.server.admin import bind_admin_socket, tail_lines
from runtime.server.auth import Caller
from runtime.server.keys import KeyFolder

ROOT = Path(__file__).resolve().parents[2]


def admin_get(home: Path, path: str, method: str = "GET") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(str(home / ADMIN_SOCKET))
    connection.request(method, path)
    response = connection.getresponse()
    body = json.loads(response.read())
    connection.close()
    return response.status, body


# -- the socket


def test_status_over_the_socket(tmp_path) -> None:
    with live(tmp_path, FakeEngine(), FakeKv()) as server:
        server.chat(max_tokens=30)
        until(lambda: server.service.status().requests_total)
        status = read_status(tmp_path)
        assert (status.state, status.bundle_id, status.model) == ("ready", BUNDLE_ID, "deepseek-v4-flash")
        assert (status.encoding, status.numerics, status.backend) == ("dsv4-0731", "kv-v4", "toy")
        assert status.completion_tokens_total == 30
        assert status.prompt_tokens_total > 0
        assert status.prefill_tokens_per_s > 0
        assert status.decode_tokens_per_s > 0
        assert (status.queue_depth, status.queued, status.running, status.requests_total) == (8, 0, 0, 1)
        assert status.kv.enabled
        assert status.notes == ("unverified on hardware",)
        assert status.context_tokens == 4096


def test_the_socket_is_ours_alone_and_read_only(tmp_path) -> None:
    with live(tmp_path):
        assert stat.S_IMODE((tmp_path / ADMIN_SOCKET).stat().st_mode) == 0o600
        assert admin_get(tmp_path, "/admin/v1/status", "POST")[0] == 405
        assert admin_get(tmp_path, "/v1/models")[0] == 404


def test_the_kv_cache_over_the_socket(tmp_path) -> None:
    with live(tmp_path, FakeEngine(), FakeKv()) as server:
        server.chat(max_tokens=3)
        report = read_kv(tmp_path)
        assert report.live
        assert report.status == server.service.kv_status()
        assert (report.tenants, report.problems) == ((), ())
        status, body = admin_get(tmp_path, "/admin/v1/kv")
        assert status == 200
        assert set(body) == {field.name for field in dataclasses.fields(KvReport)}
        assert admin_get(tmp_path, "/admin/v1/kv", "POST")[0] == 405


def test_what_the_files_hold_is_told_beside_the_writer(tmp_path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/kv-master").write_bytes(MASTER_KEY)
    (tmp_path / "keys/kv-master").chmod(0o600)
    store = open_store(tmp_path / "kv")
    put(store, 1, 512, "team-b")
    with live(tmp_path, FakeEngine(), FakeKv()):
        (tenant,) = read_kv(tmp_path).tenants
        assert (tenant.name, tenant.blocks, tenant.checkpoints) == ("team-b", 2, 1)
        (tmp_path / "keys/kv-master").chmod(0o644)
        assert "chmod 600" in read_kv(tmp_path).problems[0]
    store.close()


def test_log_lines_over_the_socket(tmp_path) -> None:
    with live(tmp_path) as server:
        for number in range(5):
            server.request("GET", "/health", headers={"x-request-id": f"look-{number}"})
        until(lambda: "look-4" in server.log())
        status, body = admin_get(tmp_path, "/admin/v1/log?lines=2")
        assert status == 200
        assert [line.split()[2] for line in body["lines"]] == ["look-3", "look-4"]
        assert body["lines"][0].split()[0].endswith("Z")
        assert len(admin_get(tmp_path, "/admin/v1/log")[1]["lines"]) >= 6
        for bad in ("0", "-1", "x", "2001", "9" * 400, "%C2%B2"):
            assert admin_get(tmp_path, f"/admin/v1/log?lines={bad}")[0] == 400


def test_tail_of_a_long_file(tmp_path) -> None:
    path = tmp_path / "log"
    assert tail_lines(path, 3) == []
    path.write_text("".join(f"line {number}\n" for number in range(200_000)))
    assert tail_lines(path, 2) == ["line 199998", "line 199999"]
    everything = tail_lines(path, 10**6)
    assert everything[-1] == "line 199999"
    assert everything[0].startswith("line 1")


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path) -> None:
    path = tmp_path / ADMIN_SOCKET
    first = bind_admin_socket(path)
    with pytest.raises(BusyError, match="another Solocard server"):
        bind_admin_socket(path)
    first.close()
    assert path.exists()
    bind_admin_socket(path).close()
    with pytest.raises(UsageError, match="SOLOCARD_HOME"):
        bind_admin_socket(tmp_path / ("x" * 100) / "admin.sock")


# -- keys


def test_keys_come_and_go_without_a_restart(tmp_path) -> None:
    folder = KeyFolder(tmp_path / "keys")
    assert folder.verify("sk-any") is None
    first, second = new_key(tmp_path, "first"), new_key(tmp_path, "second", "lab")
    assert (folder.verify(first), folder.verify(second)) == (Caller("first"), Caller("second", "lab"))
    assert folder.verify(first + "x") is None
    revoke_key(tmp_path, "first")
    assert folder.verify(first) is None
    assert folder.verify(second) == Caller("second", "lab")


def test_two_changes_within_one_tick_of_the_clock_are_both_seen(tmp_path) -> None:
    first = new_key(tmp_path, "first")
    folder, now_s = KeyFolder(tmp_path / "keys"), time.time()
    os.utime(tmp_path / "keys", (now_s, now_s))
    assert folder.verify(first) == Caller("first")
    second = new_key(tmp_path, "second")
    os.utime(tmp_path / "keys", (now_s, now_s))
    assert folder.verify(second) == Caller("second")


def test_a_settled_folder_is_not_read_again(tmp_path, monkeypatch) -> None:
    token = new_key(tmp_path, "first")
    os.utime(tmp_path / "keys", (time.time() - 60,) * 2)
    folder = KeyFolder(tmp_path / "keys")
    assert folder.verify(token) == Caller("first")
    monkeypatch.setattr("runtime.server.keys._read", lambda path: pytest.fail("read again"))
    assert folder.verify(token) == Caller("first")


def test_a_damaged_key_file_is_one_key_less(tmp_path, caplog) -> None:
    token = new_key(tmp_path, "good")
    for name, text in (("broken", "{"), ("list", "[]"), ("fields", '{"name": "fields", "sha256": "00"}')):
        (tmp_path / f"keys/{name}.json").write_text(text)
    assert KeyFolder(tmp_path / "keys").verify(token) == Caller("good")
    assert all(f"{name}.json" in caplog.text for name in ("broken", "list", "fields"))


@pytest.mark.parametrize("tenant", ['"shared"', '"../x"', '""', "7", "null", '["default"]'])
def test_a_key_with_an_unusable_tenant_opens_nothing(tmp_path, caplog, tenant: str) -> None:
    token = new_key(tmp_path, "app")
    path = tmp_path / "keys/app.json"
    path.write_text(path.read_text().replace('"tenant":"default"', f'"tenant":{tenant}'))
    assert KeyFolder(tmp_path / "keys").verify(token) is None
    assert "app.json" in caplog.text


def test_a_key_from_before_tenants_is_the_default_tenants(tmp_path) -> None:
    token = new_key(tmp_path, "app")
    path = tmp_path / "keys/app.json"
    path.write_text(path.read_text().replace(',"tenant":"default"', ""))
    assert KeyFolder(tmp_path / "keys").verify(token) == Caller("app", "default")


# -- the process

_PROGRAM = """
    import sys
    from pathlib import Path
    sys.path[:0] = [{root!r}, {tests!r}]
    from serve_live import toy_config
    from serve_support import FakeEngine, tokenizer
    from runtime.server.keys import KeyFolder
    from runtime.server.serve import run
    home = Path(sys.argv[1])
    bundle = (home / "current").read_text()
    sys.exit(run(toy_config(), FakeEngine(step_s=0.01), tokenizer(), None, home=home, bundle_id=bundle,
                 verify=KeyFolder(home / "keys").verify, backend_description="toy",
                 close=lambda: print("closed", flush=True)))
"""


@pytest.fixture
def process(tmp_path):
    (tmp_path / "current").write_text("toy-1")
    program = textwrap.dedent(_PROGRAM).format(root=str(ROOT), tests=str(ROOT / "tests"))
    started = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    yield started
    started.kill()
    started.wait()
    started.stdout.close()


def test_sigterm_drains_and_ends_with_zero(process, tmp_path) -> None:
    line = process.stdout.readline()
    assert line.startswith("solocard: serving deepseek-v4-flash (toy-1) on http://127.0.0.1:")
    assert int((tmp_path / "run/serve.pid").read_text()) == process.pid
    port, token = int(line.rsplit(":", 1)[1]), new_key(tmp_path, "app")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 50, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    assert response.status == 200
    process.send_signal(signal.SIGTERM)
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()
    assert process.wait(10) == 0
    assert process.stdout.read() == "closed\n"
    assert not (tmp_path / "run/serve.pid").exists()
    assert "drained in" in (tmp_path / "log/serve.log").read_text()


def test_sighup_serves_the_new_bundle_under_the_same_pid(process, tmp_path) -> None:
    assert "(toy-1)" in process.stdout.readline()
    (tmp_path / "current").write_text("toy-2")
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "closed\n"
    assert "(toy-2)" in process.stdout.readline()
    assert int((tmp_path / "run/serve.pid").read_text()) == process.pid
    assert read_status(tmp_path).bundle_id == "toy-2"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
