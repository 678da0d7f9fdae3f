"""The served process asks nothing of any network, and what users write stays out of log and disk."""

from __future__ import annotations

import json
import random
import socket
import string
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from e2e_support import Answer, Appliance, boundary, complete, long_prompt, stream
from trace_support import NETWORK, STRACE, calls, leaving, need_strace, strace

from runtime.tokenizer import Tokenizer

MARKER = "".join(random.Random().choices(string.ascii_letters, k=28))
CHILD = """
import socket, sys
for family, kind, address in (
    (socket.AF_INET, socket.SOCK_STREAM, ("192.0.2.1", 80)),
    (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 53)),
    (socket.AF_INET6, socket.SOCK_DGRAM, ("2001:db8::1", 443)),
    (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 9)),
    (socket.AF_UNIX, socket.SOCK_STREAM, "/nowhere"),
):
    try:
        with socket.socket(family, kind) as one:
            one.settimeout(0.2)
            one.connect(address)
    except OSError as error:
        print(address, error)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    try:
        one.sendto(b"x", ("192.0.2.2", 9))
    except OSError as error:
        print(error)
"""


class Traced:
    """A server under strace (where there is one) from exec to exit, the questions it got, what it left on disk."""

    def __init__(self, machine: Appliance, trace: Path) -> None:
        self.machine, key = machine, machine.new_key()
        prefix = strace(trace, "listen", *NETWORK) if STRACE else []
        machine.start(*prefix, module=("appliance.cli", "serve"))
        client = machine.client(key)
        self.pid = int((machine.home / "run" / "serve.pid").read_text())
        environ = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        self.environ = dict(pair.decode().split("=", 1) for pair in environ if pair)
        self.prompt = long_prompt(f"{MARKER} is what nobody else may read")
        self.cold: Answer = stream(client, self.prompt, max_tokens=24)
        self.warm: Answer = complete(client, self.prompt, max_tokens=24)
        with pytest.raises(openai.BadRequestError):
            complete(client, MARKER, reasoning_effort=MARKER)
        with pytest.raises(openai.NotFoundError):
            complete(client, MARKER, model=f"{MARKER}-model")
        self.unknown_path = machine.get(f"/{MARKER}", key)[0]
        self.health = machine.health()
        self.exit_code = machine.terminate()
        self._trace = trace

    @property
    def trace(self) -> str:
        need_strace()
        return self._trace.read_text()


@pytest.fixture(scope="module")
def traced(new_appliance: Callable[[], Appliance], tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(new_appliance(), tmp_path_factory.mktemp("e2e") / "trace.txt")


def test_the_trace_would_show_a_call_to_the_outside(tmp_path: Path) -> None:
    """The check itself: three connects and one datagram leave, one of them to a name server on loopback."""
    out = tmp_path / "trace.txt"
    subprocess.run([*strace(out, *NETWORK), sys.executable, "-c", CHILD], check=True, capture_output=True, timeout=120)
    found = leaving(out.read_text())
    for address in ("192.0.2.1", "htons(53)", "2001:db8::1", "192.0.2.2"):
        assert sum(address in line for line in found) == 1
    assert len(found) == 4


def test_the_served_process_answers_and_calls_nobody(traced: Traced) -> None:
    assert leaving(traced.trace) == []
    assert traced.cold.tokens > 1
    assert traced.exit_code == 0


def test_it_listens_on_loopback_and_on_its_admin_socket_only(traced: Traced) -> None:
    bound = [line for line in calls(traced.trace, "bind") if "htons(0)" not in line]  # a library asks for IPv6 so
    listening = {line.split("listen(")[1].split(",")[0] for line in calls(traced.trace, "listen")}
    assert len(bound) == len(listening) == 2
    [http] = [line for line in bound if "AF_INET" in line]
    assert f"htons({traced.machine.port})" in http
    assert '"127.0.0.1"' in http
    assert any("admin.sock" in line for line in bound)


def test_it_writes_nothing_outside_its_home(traced: Traced, installed) -> None:
    """onnxruntime would keep a device id below ~/.cache, were its telemetry on."""
    for user_home in (traced.machine.user_home, installed.user_home):
        assert list(user_home.iterdir()) == []


def test_the_tokenizer_library_is_told_to_stay_offline(traced: Traced) -> None:
    assert traced.environ["HF_HUB_OFFLINE"] == "1"
    assert traced.environ["SOLOCARD_HOME"] == str(traced.machine.home)


def test_nothing_a_user_wrote_is_on_disk(traced: Traced) -> None:
    """Every file below the home: log, what the process printed, KV segments and index, journal."""
    files = [path for path in traced.machine.home.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"serve.log", "console.txt", "index.sqlite3", "journal.jsonl"} <= names
    assert sum(path.suffix == ".kvs" for path in files) == 1
    assert [path for path in files if MARKER.encode() in path.read_bytes()] == []
    assert "POST /v1/chat/completions 200" in (traced.machine.home / "log" / "serve.log").read_text()
    assert traced.unknown_path == 404


def test_neither_the_prompt_s_ids_nor_the_answer_are_in_the_cache(traced: Traced) -> None:
    """The prompt was stored (the second time it was a hit), yet no run of eight ids lies in the open."""
    assert traced.warm.hit == boundary(traced.warm.prompt) > 0
    assert traced.health["kv"]["used_bytes"] > 10_000
    [tokenizer] = (traced.machine.home / "models").glob("*.tokenizer.json")
    ids = Tokenizer.from_file(tokenizer).encode_text(MARKER)[1:-1][:8]
    forms = [struct.pack(f"<{len(ids)}{code}", *ids) for code in "HIQ"] + [json.dumps(ids)[1:-1].encode()]
    stored = b"".join(path.read_bytes() for path in (traced.machine.home / "kv").rglob("*") if path.is_file())
    assert len(ids) >= 6
    assert [form for form in forms if form in stored] == []
    assert traced.cold.text.encode() not in stored


def test_ports_are_free_again(traced: Traced) -> None:
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", traced.machine.port)) != 0
