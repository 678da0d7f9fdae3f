"""The demo's server: started on the first free port from 8017 on, watched until it answers, stopped by SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import question
from environment import VENV, SetupError, clean_environment
from progress import heartbeat, say

FIRST_PORT, PORTS = 8017, 100
READY_S, STOP_S = 300.0, 45.0
CONFIG = "# Written anew by every packaging/demo.\nserver:\n  port: {port}\n"


@dataclass
class Server:
    """A server of the demo's SOLOCARD_HOME; ``process`` is None when it ran before."""

    port: int
    process: subprocess.Popen[Any] | None = None

    @property
    def ours(self) -> bool:
        return self.process is not None

    @staticmethod
    def running(home: Path) -> Server | None:
        """The server that another terminal started for this home, if it answers."""
        try:
            pid = int((home / "run" / "serve.pid").read_text())
            os.kill(pid, 0)
            port = int(re.findall(r"port: (\d+)", (home / "config.yaml").read_text())[0])
        except (OSError, ValueError, IndexError):
            return None
        if (question.health(port) or {}).get("status") is None:
            return None
        say(f"  already running on http://127.0.0.1:{port} (process {pid})")
        return Server(port)

    @staticmethod
    def start(home: Path) -> Server:
        """Start it and wait until /health answers; SetupError with the end of its log if it does not come up."""
        port = free_port()
        (home / "config.yaml").write_text(CONFIG.format(port=port))
        log = home / "log" / "demo-output.log"
        log.parent.mkdir(exist_ok=True)
        environment = clean_environment() | {"SOLOCARD_HOME": str(home)}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [VENV / "bin" / "solocard-serve"], env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        server = Server(port, process)
        try:
            server._await_ready(log)
        except BaseException:
            server.close()
            raise
        return server

    def _await_ready(self, log: Path) -> None:
        assert self.process is not None
        started_s = time.monotonic()
        with heartbeat(lambda: f"loading the model; its words are in {log}"):
            while (question.health(self.port) or {}).get("status") is None:
                if self.process.poll() is not None or time.monotonic() - started_s > READY_S:
                    end = "\n".join(log.read_text("utf-8", "replace").splitlines()[-12:])
                    raise SetupError(f"the server did not come up on port {self.port}; its last words:\n{end}")
                time.sleep(0.05)
        say(f"  http://127.0.0.1:{self.port} after {time.monotonic() - started_s:.1f} s (process {self.process.pid})")

    def wait(self) -> None:
        """Until the server ends or Ctrl-C."""
        try:
            if self.process is not None:
                self.process.wait()
        except KeyboardInterrupt:
            say("\nstopping the server")

    def close(self) -> None:
        """Stop the server if this run started it: it finishes its answers, then ends."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """The first port from 8017 on that can be bound on 127.0.0.1."""
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise SetupError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free on 127.0.0.1")
