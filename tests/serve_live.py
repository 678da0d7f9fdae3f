"""The real server on real sockets, in a thread of the test process, in front of the toy engine."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_support import FakeEngine, FakeKv, tokenizer

from appliance.config import Config
from runtime.server.auth import Caller
from runtime.server.serve import LOG_FILE, Ending, build_service, log_to, serve

KEY, KEY_NAME, BUNDLE_ID = "sk-test-0123456789", "tester", "toy-1-0123456789ab"


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for ``condition``; what a client sees may be a moment ahead of the log and the counters."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def toy_config(**server: Any) -> Config:
    base = Config()
    return replace(base, server=replace(base.server, **({"port": 0, "drain_s": 5} | server)))


class LiveServer:
    """``url`` is up when the constructor returns; ``stop`` asks for the end and returns serve()'s outcome."""

    def __init__(self, home: Path, engine: FakeEngine, kv: FakeKv | None = None, **options: Any) -> None:
        self.home, self.engine = home, engine
        limits, server = options.pop("limits", {}), options.pop("server", {})
        self.config = options.pop("config", None) or toy_config(**server)
        self.service = build_service(
            self.config, engine, tokenizer(), kv, verify={KEY: Caller(KEY_NAME)}.get, bundle_id=BUNDLE_ID,
            backend_description="toy", arithmetic={"backend": "toy"}, notes=("unverified on hardware",), **options,
        )  # fmt: skip
        self.service.limits = replace(self.service.limits, **limits)
        self.port, self.outcome, self._up = 0, None, threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._up.wait(10)
        if self.error:
            self._thread.join()
            raise self.error

    def _run(self) -> None:
        async def main() -> None:
            self._loop, self._ending = asyncio.get_running_loop(), Ending()
            self.outcome = await serve(
                self.service, self.config, self.home, ending=self._ending, ready=self._ready
            )  # fmt: skip

        try:
            with log_to(self.home / LOG_FILE):
                asyncio.run(main())
        except BaseException as error:
            self.error = error
        finally:
            self._up.set()

    def _ready(self, port: int) -> None:
        self.port = port
        self._up.set()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask_to_end(self, outcome: str = "stop") -> None:
        self._loop.call_soon_threadsafe(self._ending.ask, outcome)

    def join(self) -> str | None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error
        return self.outcome

    def stop(self) -> str | None:
        if self._thread.is_alive():
            self.ask_to_end()
        return self.join()

    def log(self) -> str:
        return (self.home / LOG_FILE).read_text()

    def request(
        self, method: str, path: str, body: Any = None, *, key: str | None = KEY, headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], Any]:  # fmt: skip
        """Status, headers (lower case) and body, JSON where it is. ``body`` bytes go as they are."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            authorization = {"Authorization": f"Bearer {key}"} if key else {}
            connection.request(method, path, data, authorization | (headers or {}))
            response = connection.getresponse()
            text = response.read()
            names = {name.lower(): value for name, value in response.getheaders()}
            return response.status, names, json.loads(text) if text and "json" in names["content-type"] else text

    def chat(self, **fields: Any) -> tuple[int, dict[str, str], Any]:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4} | fields
        return self.request("POST", "/v1/chat/completions", {k: v for k, v in body.items() if v is not ...})


@contextlib.contextmanager
def live(
    home: Path, engine: FakeEngine | None = None, kv: FakeKv | None = None, **options: Any
) -> Iterator[LiveServer]:
    server = LiveServer(home, engine or FakeEngine(), kv, **options)
    try:
        yield server
    finally:
        server.engine.hold.set()
        server.stop()
