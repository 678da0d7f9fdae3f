"""The HTTP endpoint over real sockets: who may ask, what is refused and how it is said, and how it ends."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading

import pytest
from serve_live import BUNDLE_ID, KEY, KEY_NAME, live, until
from serve_support import FakeEngine, FakeKv, spell

from appliance.errors import BusyError, EngineError, UsageError
from runtime.server import limits, serve
from runtime.server.openai import ChatWriter
from runtime.server.sse import Answer, stream_answer


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    with live(tmp_path_factory.mktemp("h"), FakeEngine(spell("why</think>because"))) as server:
        yield server


# -- who may ask


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/chat/completions", "/nothing", "/admin/v1/status"])
def test_every_path_but_health_needs_a_key(toy, path: str) -> None:
    for key in (None, "sk-wrong", "x" * 5000):
        status, headers, body = toy.request("GET", path, key=key)
        assert status == 401
        assert headers["www-authenticate"] == "Bearer"
        assert "solocard key new" in body["error"]["message"]
        assert body["error"]["code"] == "invalid_api_key"
        assert key is None or key not in json.dumps(body)
    assert toy.request("GET", "/health", key=None)[0] == 200


def test_the_key_may_come_as_x_api_key(toy) -> None:
    assert toy.request("GET", "/v1/models", key=None, headers={"x-api-key": KEY})[0] == 200


def test_another_host_name_is_refused(toy) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example:8017", ""):
        status, _, body = toy.request("GET", "/health", headers={"Host": host})
        assert (status, body["error"]["code"]) == (403, "host_not_allowed")
    assert toy.request("GET", "/health", headers={"Host": "[::1]:8017"})[0] == 200
    assert toy.request("GET", "/health", headers={"Host": "localhost"})[0] == 200


# -- small routes


def test_models(toy) -> None:
    status, _, body = toy.request("GET", "/v1/models")
    assert status == 200
    [model] = body["data"]
    assert (model["id"], model["bundle"], model["object"]) == ("deepseek-v4-flash", BUNDLE_ID, "model")
    assert toy.request("GET", "/v1/models/deepseek-v4-flash")[2] == model
    assert toy.request("GET", f"/v1/models/{BUNDLE_ID}")[0] == 200
    assert toy.request("GET", "/v1/models/gpt-4")[0] == 404


def test_health_says_what_is_served(toy) -> None:
    _, _, body = toy.request("GET", "/health", key=None)
    assert (body["status"], body["bundle"], body["backend"]) == ("ready", BUNDLE_ID, "toy")
    assert body["arithmetic"] == {"backend": "toy"}
    assert body["kv"]["enabled"] is False
    assert body["notes"] == ["unverified on hardware"]


def test_health_shows_that_the_kv_cache_stopped_writing(tmp_path) -> None:
    kv = FakeKv()
    kv._status = type(kv._status)(enabled=True, used_bytes=5, max_bytes=6, writing=False, reason="no space left")
    with live(tmp_path, kv=kv) as server:
        body = server.request("GET", "/health")[2]
        assert body["kv"] == {"enabled": True, "writing": False, "reason": "no space left", "used_bytes": 5,
                              "max_bytes": 6}  # fmt: skip
        assert server.chat()[0] == 200
        assert b"solocard_kv_writing 0" in server.request("GET", "/metrics")[2]


def test_metrics_are_prometheus_text(toy) -> None:
    toy.chat()
    until(lambda: toy.service.scheduler.metrics.requests("/v1/chat/completions"))
    status, headers, text = toy.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'solocard_http_responses_total{route="/v1/chat/completions",status="200"}' in text
    for line in text.decode().splitlines():
        assert line.startswith("# TYPE ") or len(line.rsplit(" ", 1)) == 2


def test_unknown_paths_and_methods(toy) -> None:
    assert toy.request("GET", "/v1/nothing")[2]["error"]["code"] == "not_found"
    status, _, body = toy.request("GET", "/v1/chat/completions")
    assert (status, body["error"]["code"]) == (405, "method_not_allowed")
    assert toy.request("HEAD", "/health")[0] == 200


def test_request_ids_are_echoed_when_they_are_sane(toy) -> None:
    assert toy.request("GET", "/health", headers={"x-request-id": "abc-1"})[1]["x-request-id"] == "abc-1"
    assert toy.request("GET", "/health", headers={"x-request-id": "a b\t"})[1]["x-request-id"].startswith("req-")


# -- chat


def test_an_answer_with_reasoning_and_usage(toy) -> None:
    status, _, body = toy.chat(max_tokens=100)
    assert status == 200
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("why", "because")
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["completion_tokens"] == len("why") + 1 + len("because") + 1
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
    assert (body["model"], body["system_fingerprint"]) == ("deepseek-v4-flash", BUNDLE_ID)


@pytest.mark.parametrize("off", [{"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}])
def test_thinking_can_be_switched_off(tmp_path, off: dict) -> None:
    with live(tmp_path, FakeEngine(spell("plain"))) as server:
        message = server.chat(max_tokens=50, **off)[2]["choices"][0]["message"]
        assert message["content"] == "plain"
        assert "reasoning_content" not in message


def test_each_dialect_has_its_efforts(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    for encoding, good, bad in (("dsv4-0424", ("high", "max"), "low"), ("dsv4-0731", ("low", "high", "max"), "xhigh")):
        with live(tmp_path / "a", FakeEngine(encoding=encoding)) as server:
            tokens = [server.chat(reasoning_effort=e, max_tokens=1)[2]["usage"]["prompt_tokens"] for e in good]
            assert len(set(tokens)) == len(good)
            status, _, body = server.chat(reasoning_effort=bad)
            assert (status, body["error"]["param"]) == (400, "reasoning_effort")
            assert f"none, {', '.join(good)}" in body["error"]["message"]


def test_cache_hits_are_in_the_usage(tmp_path) -> None:
    with live(tmp_path, FakeEngine(), FakeKv()) as server:
        ask = {"messages": [{"role": "user", "content": "word " * 150}], "thinking": {"type": "disabled"}}
        first, second = (server.chat(**ask, temperature=0)[2] for _ in range(2))
        assert first["usage"]["prompt_cache_hit_tokens"] == 0
        hit = second["usage"]["prompt_cache_hit_tokens"]
        assert hit == 256 * ((second["usage"]["prompt_tokens"] - 1) // 256) > 0
        assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": hit}
        assert first["choices"][0]["message"] == second["choices"][0]["message"]
        until(lambda: f"hit={hit}" in server.log())


def test_seeds_repeat_and_parameters_arrive(tmp_path) -> None:
    with live(tmp_path) as server:
        def text(**fields) -> str:
            body = server.chat(max_tokens=20, thinking={"type": "disabled"}, **fields)[2]
            return body["choices"][0]["message"]["content"]

        assert text(seed=3) == text(seed=3) != text(seed=4)
        assert text(temperature=0) == text(temperature=0, seed=9)
        assert text(seed=3, top_p=0) == text(temperature=0)


@pytest.mark.parametrize(("fields", "param"), [
    ({"messages": ...}, "messages"), ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0]"),
    ({"n": 2}, "n"), ({"n": True}, "n"), ({"temperature": 2.1}, "temperature"), ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"), ({"top_p": -0.1}, "top_p"), ({"top_p": 1.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"), ({"seed": "x"}, "seed"), ({"seed": 1 << 70}, "seed"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": [""]}, "stop"), ({"stop": 3}, "stop"), ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": 1}, "stream_options"), ({"thinking": {"type": "maybe"}}, "thinking"),
    ({"thinking": "enabled"}, "thinking"), ({"reasoning_effort": 3}, "reasoning_effort"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"), ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"), ({"response_format": {"type": "json_object"}}, "response_format"),
])  # fmt: skip
def test_wrong_fields_are_named(toy, fields: dict, param: str) -> None:
    status, _, body = toy.chat(**fields)
    assert status == 400, body
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"


def test_another_model_is_not_found(toy) -> None:
    status, _, body = toy.chat(model="gpt-4")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert toy.chat(model=BUNDLE_ID)[0] == 200


def test_unknown_and_empty_fields_are_ignored(toy) -> None:
    fields = {"user": "u", "store": False, "tools": [], "tool_choice": "auto", "logprobs": False, "logit_bias": {},
              "response_format": {"type": "text"}, "frequency_penalty": 1, "invented": [1, {}]}  # fmt: skip
    assert toy.chat(**fields)[0] == 200


def test_developer_and_system_mean_the_same(toy) -> None:
    ask = [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}]
    usage = [
        toy.chat(messages=[{**ask[0], "role": role}, ask[1]])[2]["usage"]["prompt_tokens"]
        for role in ("system", "developer")
    ]
    assert usage[0] == usage[1]


# -- limits


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b'"x"', b'{"messages": NaN}', b'{"temperature": Infinity}', b'{"temperature": 1e999}', b"\xff",
    b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", b'{"a": "' + b'\\"' * 5000, b'{"a": 1' + b"0" * 5000 + b"}",
    b'{"a": [' + b"[]," * 200_001 + b"[]]}",
])  # fmt: skip
def test_bodies_that_are_no_sane_json(toy, body: bytes) -> None:
    status, _, answer = toy.request("POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_depth_64_is_fine_and_brackets_in_strings_do_not_count(toy) -> None:
    assert toy.chat(extra=json.loads("[" * 63 + "]" * 63), more="[" * 500)[0] == 200


def test_a_large_body_is_refused(tmp_path) -> None:
    with live(tmp_path, server={"max_body_bytes": 2000}) as server:
        status, _, body = server.chat(extra="x" * 2000)
        assert (status, body["error"]["code"]) == (413, "request_too_large")
        assert server.chat()[0] == 200


def test_a_prompt_over_the_context_is_refused_before_prefill(tmp_path) -> None:
    engine = FakeEngine(context_tokens=100)
    with live(tmp_path, engine) as server:
        short = {"thinking": {"type": "disabled"}}
        prompt = server.chat(**short, max_tokens=1)[2]["usage"]["prompt_tokens"]
        engine.calls.clear()
        for fields in ({"max_tokens": 101 - prompt}, {"messages": [{"role": "user", "content": "x" * 100}]}):
            status, _, body = server.chat(**short, **fields)
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert not engine.calls
        assert server.chat(**short, max_tokens=100 - prompt)[2]["usage"]["completion_tokens"] == 100 - prompt
        assert server.chat(**short, max_tokens=...)[2]["usage"]["completion_tokens"] == 100 - prompt


def test_a_slow_body_and_a_slow_header_are_closed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(limits, "HEADER_TIMEOUT_S", 0.3)
    with live(tmp_path, limits={"body_timeout_s": 0.3}) as server:
        for start in (b"", b"GET /health HTTP/1.1\r\nHos"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
                connection.sendall(start)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
                b"Authorization: Bearer " + KEY.encode() + b"\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(100)
        assert server.chat()[0] == 200


def test_a_huge_header_is_refused(toy) -> None:
    with socket.create_connection(("127.0.0.1", toy.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n")
        assert b" 431 " in connection.recv(100)
    with socket.create_connection(("127.0.0.1", toy.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000)
        assert b" 400 " in connection.recv(100)


# -- queue, cancellation, failure, end


def test_a_full_queue_says_when_to_come_back(tmp_path) -> None:
    engine = FakeEngine()
    engine.hold.clear()
    with live(tmp_path, engine, server={"queue_depth": 1}) as server:
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(server.chat()[0])) for _ in range(2)]
        for count, thread in enumerate(threads):
            thread.start()
            until(lambda count=count: server.service.scheduler.running + server.service.scheduler.queued > count)
        status, headers, body = server.chat()
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        engine.hold.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_forgotten(tmp_path, stream: bool) -> None:
    engine = FakeEngine(step_s=0.01)
    with live(tmp_path, engine) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        body = {"messages": [{"role": "user", "content": "x" * 900}], "max_tokens": 3000, "stream": stream,
                "thinking": {"type": "disabled"}}  # fmt: skip
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
        until(lambda: len(engine.calls) >= 2)
        connection.close()
        assert server.service.scheduler.wait_idle(5)
        assert engine.open_sequences == 0
        assert len(engine.calls) < 200
        until(lambda: " 499 " in server.log())
        assert b"solocard_requests_cancelled_total 1" in server.request("GET", "/metrics")[2]


async def test_a_client_that_stops_reading_is_cut_off() -> None:
    async def never(*_: object) -> dict:
        await asyncio.Event().wait()
        return {}

    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await never()

    writer = ChatWriter("id", "model", "bundle", 0, thinking=False)
    with pytest.raises(limits.ClientGoneError):
        await stream_answer(Answer(), writer, never, send, limits.Limits(stall_s=0.05))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_keep_alive_comments_while_nothing_comes(tmp_path) -> None:
    engine = FakeEngine(spell("x"))
    engine.hold.clear()
    with live(tmp_path, engine, limits={"keep_alive_s": 0.05}) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
        response = connection.getresponse()
        seen = b""
        while seen.count(b": keep-alive\n\n") < 2:
            seen += response.read1(1000)
        engine.hold.set()
        seen += response.read()
        connection.close()
        assert seen.endswith(b"data: [DONE]\n\n")


def test_a_failing_engine_is_a_500_without_its_words(tmp_path) -> None:
    engine = FakeEngine()
    with live(tmp_path, engine) as server:
        engine.broken = EngineError("secret inside")
        status, _, body = server.chat()
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "secret" not in json.dumps(body)
        assert "secret inside" in server.log()
        engine.broken = EngineError("secret inside")
        status, _, text = server.chat(stream=True)
        assert status == 200
        assert b'"error"' in text
        assert b"[DONE]" not in text
        assert b"secret" not in text
        assert server.chat()[0] == 200


def test_the_log_has_counts_and_names_and_no_text(tmp_path) -> None:
    with live(tmp_path, FakeEngine(spell("ANSWERTEXT"))) as server:
        server.chat(messages=[{"role": "user", "content": "PROMPTTEXT"}], max_tokens=50)
        server.chat(messages=[{"role": "user", "content": "PROMPTTEXT"}], temperature="SECRETVALUE")
        server.request("GET", "/v1/models?token=QUERYTEXT", key="sk-WRONGKEY")
        server.request("GET", "/PATHTEXT")
        until(lambda: " GET other 404 " in server.log())
        log = server.log()
        for word in ("PROMPTTEXT", "ANSWERTEXT", "SECRETVALUE", "QUERYTEXT", "WRONGKEY", "PATHTEXT", KEY):
            assert word not in log
        assert f"key={KEY_NAME} POST /v1/chat/completions 200 prompt=" in log
        assert " hit=0 miss=" in log
        assert " kv=policy finish=stop tenant=default total_s=" in log
        assert f"key={KEY_NAME} POST /v1/chat/completions 400 total_s=" in log
        assert "key=- GET other 401" in log


def test_drain_lets_the_running_request_end(tmp_path) -> None:
    engine = FakeEngine(step_s=0.01)
    with live(tmp_path, engine) as server:
        answers: list = []
        thread = threading.Thread(target=lambda: answers.append(server.chat(max_tokens=60)))
        thread.start()
        until(lambda: engine.calls)
        pid = int((tmp_path / "run/serve.pid").read_text())
        assert pid > 1
        server.ask_to_end()
        until(lambda: server.service.state == "draining")
        assert server.request("GET", "/health")[0] == 503
        status, headers, body = server.chat()
        assert (status, body["error"]["code"]) == (503, "server_stopping")
        assert headers["retry-after"]
        assert server.join() == "stop"
        thread.join()
        assert answers[0][0] == 200
        assert answers[0][2]["usage"]["completion_tokens"] == 60
        assert not (tmp_path / "run/serve.pid").exists()
        assert not (tmp_path / "run/admin.sock").exists()


def test_what_does_not_end_in_time_is_cut_off(tmp_path) -> None:
    engine = FakeEngine(step_s=0.01)
    with live(tmp_path, engine, server={"drain_s": 0}) as server:
        answers: list = []

        def ask(stream: bool) -> None:
            answers.append(server.chat(max_tokens=3000, stream=stream))

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
        for thread in threads:
            thread.start()
        until(lambda: server.service.scheduler.queued == 1 and engine.calls)
        server.ask_to_end()
        server.join()
        for thread in threads:
            thread.join()
        by_status = dict(sorted((status, body) for status, _, body in answers))
        assert sorted(by_status) == [200, 503]
        assert b'"code":"server_stopping"' in by_status[200]


def test_a_restart_keeps_the_pid_file_and_a_stop_overrules_it(tmp_path) -> None:
    with live(tmp_path) as server:
        server.ask_to_end("restart")
        assert server.join() == "restart"
        assert (tmp_path / "run/serve.pid").exists()
    engine = FakeEngine(step_s=0.01)
    with live(tmp_path, engine) as server:
        thread = threading.Thread(target=lambda: server.chat(max_tokens=40))
        thread.start()
        until(lambda: engine.calls)
        server.ask_to_end("restart")
        server.ask_to_end("stop")
        assert server.join() == "stop"
        thread.join()


def test_only_loopback_and_only_a_free_port(tmp_path, toy) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "example.com"):  # noqa: S104
        with pytest.raises(UsageError, match=r"server\.host"):
            serve.bind_http_socket(host, 0)
    with pytest.raises(UsageError, match=r"set server\.port"):
        serve.bind_http_socket("127.0.0.1", toy.port)


def test_one_server_per_home(tmp_path) -> None:
    with live(tmp_path), pytest.raises(BusyError, match="another Solocard server"), live(tmp_path):
        pytest.fail("a second server must not start")
