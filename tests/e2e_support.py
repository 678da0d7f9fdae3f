"""An appliance on this machine as its users have it: the commands, the served process, and the OpenAI SDK."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from appliance.model import BLOCK_TOKENS

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 120  # for any one step, on a machine that has other things to do
MODEL = "deepseek-v4-flash"


def environment(**more: str) -> dict[str, str]:
    """A plain shell's, with this checkout's packages: nothing that the product has to set itself, nor the variables
    of a CI or test run, which onnxruntime takes as a reason to send nothing."""
    plain = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TMPDIR")
    return {name: os.environ[name] for name in plain if name in os.environ} | {"PYTHONPATH": str(ROOT)} | more


def command(*arguments: object, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """``python -m …`` to its end, which must have this exit code and no stack trace."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], env=environment(**more), cwd="/", stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def build_release(folder: Path, keys: Path, *, seed: int = 0, counter: int = 1, **options: str) -> Path:
    """A signed bundle of a tiny sample checkpoint, by the exporter's commands."""
    command("exporter", "sample", folder / "checkpoint", "--preset", "tiny", "--seed", seed)
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    build = ["build", folder / "checkpoint", folder / "bundle", "--encoding", "dsv4-0731"]
    command("exporter", *build, "--release-counter", counter, *given)
    command("exporter", "sign", folder / "bundle", "--keys", keys)
    return folder / "bundle"


def free_port() -> int:
    """A loopback port that nothing has, below those the kernel gives to outgoing connections."""
    while True:
        port = random.randint(20_000, 30_000)
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {patience_s:.0f} s"
        time.sleep(0.02)


def boundary(prompt_tokens: int) -> int:
    """c(n), written out once more on purpose: 256·⌊(n − 1)/256⌋."""
    return (prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def long_prompt(name: str, words: int = 130) -> str:
    """About 5 tokens a word; ``name`` comes first, so that prompts of two names share no block."""
    return f"{name}: " + " ".join(f"w{i}x" for i in range(words))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the SDK gave; ``text`` and ``tokens`` stand for the tokens, which HTTP does not show."""

    text: str
    tokens: int
    reason: str
    prompt: int
    hit: int
    miss: int
    chunks: int = 0

    @property
    def said(self) -> tuple[str, int, str]:
        """All that may not depend on where the prompt's state came from."""
        return self.text, self.tokens, self.reason

    @staticmethod
    def of(text: str, reason: str | None, usage: Any, chunks: int = 0) -> Answer:
        hit, miss = usage.prompt_cache_hit_tokens, usage.prompt_cache_miss_tokens
        assert usage.prompt_tokens_details.cached_tokens == hit
        assert hit + miss == usage.prompt_tokens
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        return Answer(text, usage.completion_tokens, str(reason), usage.prompt_tokens, hit, miss, chunks)


class Appliance:
    """One SOLOCARD_HOME, its commands and at most one served process."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.user_home = home.with_name("user")  # HOME of whoever runs the commands
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[openai.OpenAI] = []
        home.mkdir(parents=True, exist_ok=True)
        self.user_home.mkdir(exist_ok=True)
        (home / "config.yaml").write_text(f"server:\n  port: {self.port}\n")

    @property
    def variables(self) -> dict[str, str]:
        return {"SOLOCARD_HOME": str(self.home), "HOME": str(self.user_home)}

    # -- commands

    def solocard(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        return command("appliance.cli", *arguments, code=code, **self.variables)

    def told(self, *arguments: object) -> dict[str, Any]:
        """What a command with --json says at its end."""
        lines = [json.loads(line) for line in self.solocard(*arguments, "--json").stdout.splitlines()]
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        data: dict[str, Any] = lines[-1]["data"]
        return data

    def new_key(self) -> str:
        return self.solocard("key", "new", f"app-{len(self.told('key', 'list')['keys'])}").stdout.strip()

    # -- the served process

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, *prefix: str, module: tuple[str, ...] = ("runtime", "serve")) -> None:
        """Start the server (under ``prefix``, e.g. strace) and wait until it is ready."""
        out = self.home / "log" / "console.txt"
        out.parent.mkdir(exist_ok=True)
        with out.open("ab") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", *module], env=environment(**self.variables), cwd="/",
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        until(lambda: self._dead() or self.health().get("status") == "ready", f"server ready ({out})")
        assert not self._dead(), out.read_text()

    def _dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def terminate(self) -> int:
        """SIGTERM to the whole group; the exit code."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        """Leave no process behind, whatever happened."""
        for client in self._clients:
            client.close()
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(PATIENCE_S)

    # -- HTTP

    def get(self, path: str, key: str = "") -> tuple[int, Any]:
        """Status and JSON body."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:  # noqa: S310
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def health(self) -> dict[str, Any]:
        """Body of /health; empty while nobody answers."""
        try:
            body: dict[str, Any] = self.get("/health")[1]
        except (OSError, ValueError):
            return {}
        return body

    def client(self, key: str) -> openai.OpenAI:
        base = f"http://127.0.0.1:{self.port}/v1"
        self._clients.append(openai.OpenAI(base_url=base, api_key=key, max_retries=0, timeout=PATIENCE_S))
        return self._clients[-1]

    def log_line(self, request_id: str) -> str:
        """The line that the log ends a request with."""
        found: list[str] = []

        def look() -> bool:
            lines = (self.home / "log" / "serve.log").read_text().splitlines()
            found[:] = [line for line in lines if f" {request_id} key=" in line]
            return bool(found)

        until(look, f"a log line of {request_id}")
        return found[-1]

    def kv_reason(self, request_id: str) -> str:
        """``hit``, or why the longest usable boundary was not reached."""
        return self.log_line(request_id).split(" kv=", 1)[1].rsplit(" finish=", 1)[0]


def question(prompt: str, **fields: Any) -> dict[str, Any]:
    """Arguments of ``chat.completions.create``: greedy, without thinking, twelve tokens."""
    request_id = fields.pop("request_id", "")
    asked: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 12,
        "extra_body": {"thinking": {"type": "disabled"}},
    }  # fmt: skip
    if request_id:
        asked["extra_headers"] = {"x-request-id": request_id}
    return asked | fields


def complete(client: openai.OpenAI, prompt: str, **fields: Any) -> Answer:
    """One answer, not streamed."""
    done = client.chat.completions.create(**question(prompt, **fields))
    return Answer.of(done.choices[0].message.content or "", done.choices[0].finish_reason, done.usage)


def stream(client: openai.OpenAI, prompt: str, each: Callable[[], object] = lambda: None, **fields: Any) -> Answer:
    """One streamed answer; ``each`` is called after every piece of text."""
    asked = question(prompt, **fields) | {"stream": True, "stream_options": {"include_usage": True}}
    parts, reason, usage = [], None, None
    with client.chat.completions.create(**asked) as chunks:
        for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                reason = choice.finish_reason or reason
                if choice.delta.content:
                    parts.append(choice.delta.content)
                    each()
    return Answer.of("".join(parts), reason, usage, len(parts))


@contextlib.contextmanager
def appliance(home: Path) -> Iterator[Appliance]:
    """An appliance whose server is gone at the end."""
    made = Appliance(home)
    try:
        yield made
    finally:
        made.close()
