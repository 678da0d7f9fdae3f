"""The real OpenAI Python SDK against the real server."""

import threading
import time

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serve_live import BUNDLE_ID, KEY, live
from serve_support import FakeEngine, FakeKv, spell

MODEL = "deepseek-v4-flash"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 100}


@pytest.fixture
def connect():
    clients = []

    def build(server, key: str = KEY, **options) -> openai.OpenAI:
        client = openai.OpenAI(base_url=server.base_url, api_key=key, **({"max_retries": 0, "timeout": 15} | options))
        clients.append(client)
        return client

    yield build
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    with live(tmp_path_factory.mktemp("h"), FakeEngine(spell("größer</think>Weil 😀."))) as server:
        yield server


def test_the_sdk_lists_models(toy, connect) -> None:
    [model] = connect(toy).models.list().data
    assert (model.id, model.bundle) == (MODEL, BUNDLE_ID)
    assert connect(toy).models.retrieve(MODEL).id == MODEL


def test_the_sdk_completes(toy, connect) -> None:
    answer = connect(toy).chat.completions.create(**ASK)
    assert isinstance(answer, ChatCompletion)
    assert answer.choices[0].message.content == "Weil 😀."
    assert answer.choices[0].message.reasoning_content == "größer"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("größer".encode()) + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    ChatCompletion.model_validate(answer.model_dump(), strict=False)


@pytest.mark.parametrize("usage", [True, False])
def test_the_sdk_streams(toy, connect, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    with connect(toy).chat.completions.create(**ASK, stream=True, **options) as stream:
        chunks = list(stream)
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "größer"
    assert "".join(delta.content or "" for delta in deltas) == "Weil 😀."
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    if usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens > 0
        assert all(chunk.usage is None for chunk in chunks[:-1])
    else:
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_stream_and_answer_say_the_same(tmp_path, connect) -> None:
    with live(tmp_path) as server:
        ask = ASK | {"seed": 11, "max_tokens": 40, "extra_body": {"thinking": {"type": "disabled"}}}
        whole = connect(server).chat.completions.create(**ask).choices[0].message.content
        with connect(server).chat.completions.create(**ask, stream=True) as stream:
            parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(parts) == whole != ""
        assert len(parts) > 5


def test_the_sdk_reads_our_errors(toy, connect) -> None:
    with pytest.raises(openai.AuthenticationError, match="solocard key new"):
        connect(toy, key="sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        connect(toy).chat.completions.create(**(ASK | {"model": "gpt-4"}))
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        connect(toy).chat.completions.create(**(ASK | {"max_tokens": 10_000}))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature must be a number") as wrong:
        connect(toy).chat.completions.create(**(ASK | {"temperature": 3}))
    assert wrong.value.param == "temperature"


def test_an_error_in_the_middle_of_a_stream_is_raised(tmp_path, connect) -> None:
    engine = FakeEngine(step_s=0.01)
    with live(tmp_path, engine, server={"drain_s": 0}) as server:
        with connect(server).chat.completions.create(**(ASK | {"max_tokens": 2000}), stream=True) as stream:
            next(iter(stream))
            server.ask_to_end()
            with pytest.raises(openai.APIError, match="stopped before this answer"):
                list(stream)
        server.join()


def test_two_clients_at_once_both_finish_in_order(tmp_path, connect) -> None:
    engine = FakeEngine(spell("</think>" + "abcdefghij" * 3), step_s=0.002)
    with live(tmp_path, engine, FakeKv()) as server:
        ends: list[tuple[float, str]] = []

        def ask(name: str) -> None:
            with connect(server).chat.completions.create(**ASK, stream=True) as stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            ends.append((time.monotonic(), name + text))

        threads = [threading.Thread(target=ask, args=(name,)) for name in "12"]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        assert [said for _, said in sorted(ends)] == ["1" + "abcdefghij" * 3, "2" + "abcdefghij" * 3]


def test_the_sdk_waits_as_told_and_tries_again(tmp_path, connect) -> None:
    engine = FakeEngine(spell("</think>ok"))
    engine.hold.clear()
    with live(tmp_path, engine, server={"queue_depth": 0}) as server:
        first = threading.Thread(target=lambda: connect(server).chat.completions.create(**ASK))
        first.start()
        while not engine.calls:
            time.sleep(0.005)
        with pytest.raises(openai.RateLimitError) as full:
            connect(server).chat.completions.create(**ASK)
        assert int(full.value.response.headers["retry-after"]) >= 1
        threading.Timer(0.3, engine.hold.set).start()
        answer = connect(server, max_retries=3).chat.completions.create(**ASK)
        assert answer.choices[0].message.content == "ok"
        first.join()


def test_closing_the_stream_cancels(tmp_path, connect) -> None:
    engine = FakeEngine(step_s=0.01)
    with live(tmp_path, engine) as server:
        with connect(server).chat.completions.create(**(ASK | {"max_tokens": 2000}), stream=True) as stream:
            next(iter(stream))
        assert server.service.scheduler.wait_idle(5)
        assert len(engine.calls) < 300


async def test_the_async_sdk_streams(toy) -> None:
    async with openai.AsyncOpenAI(base_url=toy.base_url, api_key=KEY, max_retries=0) as client:
        stream = await client.chat.completions.create(**ASK, stream=True)
        text = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(text) == "Weil 😀."
