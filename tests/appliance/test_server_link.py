"""Handing a running server the new model: a real process that drains, re-executes itself and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from bundle_support import Desk, Machine

from appliance.lock import make_home
from appliance.server_link import ServerDownError, read_status, restart_server, server_pid
from appliance.trial import child_environment

SERVER = """
import http.server, json, os, signal, socketserver, sys, time
from pathlib import Path

home, delay_s, wrong = Path(os.environ["SOLOCARD_HOME"]), float(sys.argv[1]), sys.argv[2]
time.sleep(delay_s)
current = wrong or json.loads((home / "models" / "state.json").read_bytes())["current"]

class Handler(http.server.BaseHTTPRequestHandler):
    def address_string(self):
        return "unix"
    def log_message(self, *arguments):
        return None
    def do_GET(self):
        body = json.dumps({"bundle_id": current, "state": "ready", "uptime_s": 1.0}).encode()
        self.send_response(200 if self.path == "/admin/v1/status" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server(socketserver.UnixStreamServer):
    def get_request(self):
        request, _ = super().get_request()
        return request, ("unix", 0)

path = home / "run" / "admin.sock"
path.unlink(missing_ok=True)

def again(*arguments):
    path.unlink(missing_ok=True)
    if wrong == "ends":
        os._exit(0)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

signal.signal(signal.SIGHUP, again)
with Server(str(path), Handler) as server:
    (home / "run" / "serve.pid").write_text(f"{os.getpid()}\\n")
    server.serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    """Starts the little server; the last one started is stopped at the end."""
    started = []

    def start(home, *, delay_s: float = 0.0, wrong: str = ""):
        make_home(home)
        (home / "run" / "serve.pid").unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", SERVER, str(delay_s), wrong], env=child_environment(home))
        started.append(child)
        deadline = time.monotonic() + 20
        while not (home / "run" / "serve.pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path / "desk")


def test_no_server_is_said_plainly(tmp_path):
    make_home(tmp_path)
    with pytest.raises(ServerDownError, match="no server answers"):
        read_status(tmp_path)
    assert restart_server(tmp_path, "x-1-" + "0" * 12, 1).outcome == "down"
    for stale in ("", "nonsense", "0", "1", "999999999"):
        (tmp_path / "run" / "serve.pid").write_text(stale)
        assert server_pid(tmp_path) is None
    (tmp_path / "run" / "serve.pid").write_text(str(os.getpid()))
    result = restart_server(tmp_path, "x-1-" + "0" * 12, 1)
    assert result.outcome == "down"
    assert "does not answer" in result.message


def test_install_and_rollback_restart_the_server_with_the_new_model(desk, tmp_path, server):
    machine = Machine(tmp_path / "home", desk.root)
    first = machine.install(desk.release(1))
    child = server(machine.home, delay_s=0.3)
    assert read_status(machine.home).bundle_id == first.bundle_id
    second = machine.install(desk.release(2))
    assert second.restart.outcome == "ready"
    assert 0.2 < second.restart.downtime_s < 20
    assert read_status(machine.home).bundle_id == second.bundle_id
    assert server_pid(machine.home) == child.pid
    back = machine.installer().rollback()
    assert back.restart.outcome == "ready"
    assert read_status(machine.home).bundle_id == first.bundle_id


def test_a_refused_bundle_does_not_touch_the_server(desk, tmp_path, server):
    machine = Machine(tmp_path / "home", desk.root)
    machine.install(desk.release(1))
    server(machine.home)
    machine.trial_error = "wrong token"
    with pytest.raises(Exception, match="wrong token"):
        machine.install(desk.release(2))
    assert read_status(machine.home).uptime_s == 1.0


@pytest.mark.parametrize(("wrong", "word"), [("other-1-000000000000", "not serve it after 1 s"), ("ends", "ended")])
def test_a_server_that_does_not_come_back_is_reported(desk, tmp_path, server, wrong, word):
    machine = Machine(tmp_path / "home", desk.root)
    bundle_id = machine.install(desk.release(1)).bundle_id
    child = server(machine.home, wrong=wrong)
    if wrong == "ends":
        import threading

        threading.Thread(target=child.wait, daemon=True).start()  # no zombie: its pid must vanish
    result = restart_server(machine.home, bundle_id, 1)
    assert result.outcome == "late"
    assert word in result.message
