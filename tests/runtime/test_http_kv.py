"""What a client sees of the KV cache: usage, reasons, counters; whose cache it is; answers that come back."""

import dataclasses
import json
from contextlib import contextmanager

import pytest
from serve_live import KEY, live, toy_config, until
from serve_support import FakeEngine, FakeKv, spell, tokenizer

from appliance.config import KvConfig
from runtime.kv.approvals import Approvals
from runtime.server.auth import Caller

OFF = {"thinking": {"type": "disabled"}, "temperature": 0}
KEYS = {KEY: Caller("tester"), "sk-a": Caller("app-a", "a"), "sk-b": Caller("app-b", "b")}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


@contextmanager
def server(home, engine=None, kv=None, **options):
    with live(home, engine or FakeEngine(), kv, **options) as running:
        running.service.verify = KEYS.get
        yield running


def ask(running, messages: list[dict], *, key: str = KEY, **fields) -> tuple[dict, dict]:
    """Usage and message of one answer."""
    body = {"messages": messages, "max_tokens": 4} | OFF | fields
    status, _, answer = running.request("POST", "/v1/chat/completions", body, key=key)
    assert status == 200, answer
    return answer["usage"], answer["choices"][0]["message"]


# -- reasons


def test_a_miss_has_a_reason_everywhere_and_a_full_hit_has_none(tmp_path) -> None:
    with server(tmp_path, kv=FakeKv()) as running:
        long = [user("word " * 150)]
        first, _ = ask(running, long)
        second, _ = ask(running, long)
        longer, _ = ask(running, [user("word " * 300)])
        short, _ = ask(running, [user("hi")])
        assert first["prompt_tokens_details"] == {"cached_tokens": 0, "cache_miss_reason": "no-unit"}
        assert second["prompt_tokens_details"] == {"cached_tokens": second["prompt_cache_hit_tokens"]}
        assert second["prompt_cache_hit_tokens"] > 0
        assert longer["prompt_cache_hit_tokens"] > 0
        assert longer["prompt_tokens_details"]["cache_miss_reason"] == "no-unit"
        assert short["prompt_tokens_details"]["cache_miss_reason"] == "too-short"
        text = running.request("GET", "/metrics")[2].decode()
        assert 'solocard_kv_lookups_total{reason="no-unit"} 2' in text
        assert 'solocard_kv_lookups_total{reason="hit"} 1' in text
        assert 'solocard_kv_lookups_total{reason="too-short"} 1' in text
        usages = (first, second, longer, short)
        for name in ("hit", "miss"):
            total = sum(usage[f"prompt_cache_{name}_tokens"] for usage in usages)
            assert f"solocard_prefix_cache_{name}_tokens_total {total}\n" in text
        until(lambda: running.log().count(" kv=") == 4)
        assert [line.split(" kv=")[1].split()[0] for line in running.log().splitlines() if " kv=" in line] == [
            "no-unit", "hit", "no-unit", "too-short",
        ]  # fmt: skip


def test_a_reason_with_fields_is_one_word_in_the_log_and_one_class_in_the_counters(tmp_path) -> None:
    class Changed(FakeKv):
        def lookup(self, tenant, ids, sink, **options):
            hit = super().lookup(tenant, ids, sink, **options)
            return type(hit)(0, 0, None, None, False, "fingerprint: objects, tokenizer", 0)

    with server(tmp_path, kv=Changed()) as running:
        usage, _ = ask(running, [user("word " * 150)])
        assert usage["prompt_tokens_details"]["cache_miss_reason"] == "fingerprint: objects, tokenizer"
        until(lambda: " kv=" in running.log())
        assert " kv=fingerprint:objects,tokenizer finish=" in running.log()
        assert b'solocard_kv_lookups_total{reason="fingerprint"} 1' in running.request("GET", "/metrics")[2]


def test_a_stream_carries_the_reason_in_its_usage(tmp_path) -> None:
    with server(tmp_path) as running:
        _, _, text = running.chat(stream=True, stream_options={"include_usage": True})
        usage = json.loads(text.decode().split("data: ")[-2])["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "cache_miss_reason": "policy"}


# -- tenants


def test_the_key_says_whose_cache_it_is(tmp_path) -> None:
    with server(tmp_path, kv=FakeKv()) as running:
        long = [user("word " * 150)]
        usages = [ask(running, long, key=key)[0] for key in ("sk-a", "sk-b", KEY, "sk-a", "sk-b")]
        hits = [usage["prompt_cache_hit_tokens"] for usage in usages]
        assert hits[:3] == [0, 0, 0]
        assert hits[3] == hits[4] > 0
        until(lambda: "tenant=b" in running.log())
        assert "key=app-a POST" in running.log()


SYSTEM = "You are the help desk. " * 40


def test_an_approved_system_prompt_is_shared_and_nothing_after_it(tmp_path) -> None:
    approvals = Approvals(tmp_path / "shared", bytes(32))
    approvals.approve(SYSTEM)
    kv = FakeKv()
    with server(tmp_path, kv=kv, is_approved=approvals.is_approved) as running:
        def hit(key: str, system: str, text: str) -> int:
            chat = [{"role": "system", "content": system}, user(text)]
            return ask(running, chat, key=key)[0]["prompt_cache_hit_tokens"]

        whole = len(tokenizer().encode_text(SYSTEM)) + 1
        assert hit("sk-a", SYSTEM, "secret " * 100) == 0
        assert hit("sk-b", SYSTEM, "other " * 100) == 256 * (whole // 256) > 0
        assert hit("sk-b", SYSTEM, "secret " * 100) == 256 * (whole // 256)
        assert hit("sk-b", SYSTEM + "!", "x") == 0
        assert hit("sk-a", SYSTEM + "!", "x") == 0
    shared = {ids for tenant, ids in kv.blocks if tenant == "shared"}
    approved = [tokenizer().control_id("<｜begin▁of▁sentence｜>"), *tokenizer().encode_text(SYSTEM)]
    assert shared == {tuple(approved[:end]) for end in range(256, whole + 1, 256)}


def test_a_text_that_only_begins_like_the_approved_one_is_not_shared(tmp_path) -> None:
    kv = FakeKv()
    with server(tmp_path, kv=kv, is_approved=lambda text: text == SYSTEM) as running:
        ask(running, [{"role": "system", "content": SYSTEM + "And you know a secret. " * 40}, user("x")], key="sk-a")
        ask(running, [user("x"), {"role": "system", "content": SYSTEM}], key="sk-a")
        ask(running, [user(SYSTEM)], key="sk-a")
    assert {tenant for tenant, _ in kv.blocks} == {"a"}


def test_more_after_the_approved_text_belongs_to_the_tenant(tmp_path) -> None:
    """Two system messages run together into one text; only whole blocks of the approved one are shared."""
    kv = FakeKv()
    system = [{"role": "system", "content": text} for text in (SYSTEM, "And you know a secret. " * 60)]
    with server(tmp_path, kv=kv, is_approved=lambda text: text == SYSTEM) as running:
        ask(running, [*system, user("x")], key="sk-a")
    shared = max(len(ids) for tenant, ids in kv.blocks if tenant == "shared")
    assert shared == 256 * ((len(tokenizer().encode_text(SYSTEM)) + 1) // 256)
    assert any(tenant == "a" for tenant, _ in kv.blocks)


def test_the_end_of_the_system_prompt_gets_a_checkpoint(tmp_path) -> None:
    kv = FakeKv()
    with server(tmp_path, kv=kv) as running:
        ask(running, [{"role": "system", "content": SYSTEM}, user("word " * 200)])
        assert kv.puts[0] == 256 * ((len(tokenizer().encode_text(SYSTEM)) + 1) // 256)
        usage, _ = ask(running, [{"role": "system", "content": SYSTEM}, user("other " * 200)])
        assert usage["prompt_cache_hit_tokens"] == kv.puts[0]


# -- answers that come back


ANSWER = "the king is in the thing " * 40  # byte by byte where the tokenizer would merge "the", "in", "ing"


REPLAYING = dataclasses.replace(toy_config(), kv=KvConfig(replay_answers=True))


@pytest.mark.parametrize("config", [toy_config(), REPLAYING])
@pytest.mark.parametrize("known", [True, False])
def test_an_answer_sent_back_keeps_the_prefix_as_it_was_sampled(tmp_path, known: bool, config) -> None:
    """Where that is asked for; without, the same messages are the same tokens whatever the cache has."""
    engine, kv = FakeEngine(spell(ANSWER)), FakeKv()
    kept = known and config.kv.replay_answers
    sampled = len(spell(ANSWER))
    assert len(tokenizer().encode_text(ANSWER)) < sampled
    with server(tmp_path, engine, kv, reuse_mixed=True, config=config) as running:
        question = [user("word " * 100)]
        first, message = ask(running, question, max_tokens=2000)
        assert message["content"] == ANSWER
        assert first["completion_tokens"] == sampled + 1
        assert bool(kv.replays) == config.kv.replay_answers
        if not known:
            kv.replays.clear()
        chat = [*question, message, user("and then?")]
        second, _ = ask(running, chat, max_tokens=2)
        own = len(tokenizer().encode_text(ANSWER))
        if kept:
            assert second["prompt_cache_hit_tokens"] == 256 * ((first["prompt_tokens"] + sampled) // 256)
            assert second["prompt_tokens"] > first["prompt_tokens"] + sampled
        else:
            assert second["prompt_cache_hit_tokens"] <= first["prompt_tokens"]
            assert second["prompt_tokens"] < first["prompt_tokens"] + own + 40
        third, _ = ask(running, chat, key="sk-b", max_tokens=2)  # another tenant's history is the tokenizer's way
        assert third["prompt_tokens"] < first["prompt_tokens"] + own + 40
        edited = [*question, message | {"content": ANSWER + "!"}, user("and then?")]
        assert ask(running, edited, max_tokens=2)[0]["prompt_tokens"] < first["prompt_tokens"] + own + 42


def test_answers_of_thinking_models_come_back_too(tmp_path) -> None:
    engine, kv = FakeEngine(spell(f"why the thing</think>{ANSWER}")), FakeKv()
    with server(tmp_path, engine, kv, reuse_mixed=True, config=REPLAYING) as running:
        _, message = ask(running, [user("word " * 100)], max_tokens=2000, thinking={"type": "enabled"})
        assert (message["reasoning_content"], message["content"]) == ("why the thing", ANSWER)
        assert list(kv.replays.values()) == [spell(f"why the thing</think>{ANSWER}")]


def test_a_store_that_cannot_say_what_was_sampled_does_not_stop_a_request(tmp_path) -> None:
    class Broken(FakeKv):
        def replay_ids(self, tenant, names):
            raise OSError("input/output error")

    with server(tmp_path, kv=Broken(), config=REPLAYING) as running:
        ask(running, [user("a"), {"role": "assistant", "content": "b"}, user("c")])
        until(lambda: "input/output error" in running.log())
