"""Export → sign → trust → install → serve → SDK → kill → restart → hit → tamper → refuse → update → roll back.

One machine lives through all of it once, as real processes; the tests look at what it said on the way.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e_support import MODEL, Answer, Appliance, boundary, build_release, complete, long_prompt, stream

NEXT = "deepseek-v4-flash-next"
TAMPERED = ("objects", "tokenizer.json", "model.onnx", "metadata/timestamp.json")  # "objects": one of them


class Story:
    """The machine's life, step by step; each step keeps what the tests want to see."""

    def __init__(self, machine: Appliance, release_2: Path, folder: Path) -> None:
        self.machine, self.release_2, self.folder = machine, release_2, folder
        self.key = machine.new_key()
        self.client = machine.client(self.key)
        self.models: dict[str, dict[str, Any]] = {}
        self.healths: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, Answer] = {}
        self.reasons: dict[str, str] = {}
        self.pids: dict[str, int] = {}
        self.events: list[tuple[str, str]] = []  # (client, what) of two at once, as they happened
        self.refusals: dict[str, str] = {}

    def look(self, when: str) -> None:
        [model] = self.client.models.list().data
        self.models[when] = {"id": model.id} | dict(model.model_extra or {})
        self.healths[when], self.pids[when] = self.machine.health(), self.machine.pid

    def ask(self, name: str, prompt: str, how: Callable[..., Answer] = complete, **fields: Any) -> Answer:
        request_id = re.sub(r"\W+", "-", name)
        self.answers[name] = how(self.client, prompt, request_id=request_id, **fields)
        self.reasons[name] = self.machine.kv_reason(request_id)
        return self.answers[name]

    def serve_and_ask(self) -> None:
        self.machine.start()
        self.look("first")
        self.ask("cold", long_prompt("a"), stream)
        self.ask("warm", long_prompt("a"))
        self.ask("short", "hello")
        self.ask("short again", "hello")
        self.ask("sampled", long_prompt("b"), temperature=1.0, seed=7)
        self.ask("sampled again", long_prompt("b"), stream, temperature=1.0, seed=7)

    def two_at_once(self) -> None:
        """The second is sent when the first has begun to answer."""
        begun = threading.Event()

        def first() -> None:
            def piece() -> None:
                self.events.append(("1", "piece"))
                begun.set()

            self.answers["1"] = stream(self.machine.client(self.key), long_prompt("c"), piece, max_tokens=50)
            self.events.append(("1", "end"))

        thread = threading.Thread(target=first)
        thread.start()
        assert begun.wait(120)
        self.events.append(("2", "sent"))
        self.answers["2"] = stream(self.client, "hello", lambda: self.events.append(("2", "piece")))
        thread.join()

    def kill_and_restart(self) -> None:
        self.machine.kill()
        self.left_by_kill = self.left_in_run()
        self.machine.start()
        self.look("restarted")
        self.ask("after kill", long_prompt("a"))
        self.ask("after kill, streamed", long_prompt("a"), stream)

    def tamper(self) -> None:
        """One byte of the next bundle, in the middle of a file, four times; each is put right again."""
        stick = self.folder / "stick"
        shutil.copytree(self.release_2, stick)
        for name in TAMPERED:
            path = sorted((stick / "objects").rglob("?" * 64))[7] if name == "objects" else stick / name
            good = path.read_bytes()
            path.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
            code = 5 if name.startswith("metadata") else 4
            self.refusals[path.name] = self.machine.solocard("install", stick, code=code).stderr.splitlines()[-1]
            path.write_bytes(good)
        self.look("refused")
        self.ask("after refusals", long_prompt("a"))

    def update(self) -> None:
        self.update_outcome = self.machine.told("install", self.release_2)
        self.look("updated")
        with pytest.raises(openai.NotFoundError) as old_name:
            complete(self.client, "hello")
        self.old_name = old_name.value.code
        self.ask("updated", long_prompt("a"), model=NEXT)
        self.ask("updated again", long_prompt("a"), model=NEXT)

    def roll_back(self) -> None:
        self.rollback_outcome = self.machine.told("rollback")
        self.look("rolled back")
        self.ask("rolled back", long_prompt("a"))
        self.status = self.machine.told("status")
        self.listed = self.machine.told("list")["bundles"]

    def stop(self) -> None:
        """SIGTERM while an answer is being written."""
        begun = threading.Event()

        def last() -> None:
            self.answers["last"] = stream(self.machine.client(self.key), long_prompt("a"), begun.set, max_tokens=30)

        thread = threading.Thread(target=last)
        thread.start()
        assert begun.wait(120)
        self.exit_code = self.machine.terminate()
        thread.join()
        self.left_by_stop = self.left_in_run()

    def left_in_run(self) -> list[str]:
        """What a server leaves there; the lock of installations is not its own."""
        return sorted({path.name for path in (self.machine.home / "run").iterdir()} - {"install.lock"})


@pytest.fixture(scope="module")
def release_2(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights under another name."""
    return build_release(tmp_path_factory.mktemp("e2e"), keys, seed=1, counter=2, name=NEXT)


@pytest.fixture(scope="module")
def story(
    new_appliance: Callable[[], Appliance], release_2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Story:  # fmt: skip
    told = Story(new_appliance(), release_2, tmp_path_factory.mktemp("e2e"))
    steps = ("serve_and_ask", "two_at_once", "kill_and_restart", "tamper", "update", "roll_back", "stop")
    for step in steps:
        started_s = time.monotonic()
        getattr(told, step)()
        print(f"{step}: {time.monotonic() - started_s:.1f} s")
    return told


def test_the_installation_copied_tried_and_switched(installed) -> None:
    outcome = installed.outcome
    assert outcome["changed"]
    assert outcome["previous"] == ""
    assert outcome["copied_bytes"] > 1_000_000
    assert "16 golden tokens of 16 prompts" in outcome["trial_output"]
    assert outcome["restart"]["outcome"] == "down"
    assert outcome["unlisted"] == []


def test_the_sdk_sees_what_was_installed(story: Story, installed) -> None:
    assert story.models["first"]["id"] == MODEL
    assert story.models["first"]["bundle"] == story.healths["first"]["bundle"] == installed.bundle_id
    assert story.healths["first"]["kv"]["writing"]


def test_streamed_and_complete_say_the_same_and_the_second_hits_at_c_n(story: Story) -> None:
    cold, warm = story.answers["cold"], story.answers["warm"]
    assert cold.prompt > 513
    assert (cold.hit, warm.hit) == (0, boundary(cold.prompt))
    assert (story.reasons["cold"], story.reasons["warm"]) == ("no-unit", "hit")
    assert cold.said == warm.said
    assert cold.chunks > 1
    assert cold.tokens > 1


def test_a_prompt_of_at_most_256_tokens_is_never_a_hit(story: Story) -> None:
    assert [story.answers[name].hit for name in ("short", "short again")] == [0, 0]
    assert story.answers["short"].prompt <= 256
    assert story.reasons["short again"] == "too-short"
    assert story.answers["short"].said == story.answers["short again"].said


def test_a_seed_gives_the_same_answer_cold_and_restored(story: Story) -> None:
    cold, again = story.answers["sampled"], story.answers["sampled again"]
    assert (cold.hit, again.hit) == (0, boundary(cold.prompt))
    assert cold.said == again.said


def test_two_clients_at_once_both_finish_first_come_first_served(story: Story) -> None:
    assert story.answers["1"].reason in ("length", "stop")
    assert story.answers["2"].said == story.answers["short"].said
    pieces_2 = [i for i, event in enumerate(story.events) if event == ("2", "piece")]
    last_piece_1 = max(i for i, event in enumerate(story.events) if event == ("1", "piece"))
    assert story.events.index(("2", "sent")) < last_piece_1 < pieces_2[0]


def test_after_kill_9_the_prompt_is_hit_at_c_n_and_the_answer_is_the_same(story: Story) -> None:
    cold = story.answers["cold"]
    assert story.left_by_kill == ["admin.sock", "serve.pid"]
    assert story.pids["restarted"] != story.pids["first"]
    assert story.models["restarted"]["bundle"] == story.models["first"]["bundle"]
    for name in ("after kill", "after kill, streamed"):
        assert story.answers[name].hit == boundary(cold.prompt)
        assert story.answers[name].said == cold.said


def test_a_tampered_bundle_is_refused_by_file_name_and_the_old_model_serves_on(story: Story) -> None:
    assert len(story.refusals) == len(TAMPERED)
    for name, message in story.refusals.items():
        assert message.startswith("solocard: ")
        assert name in message
    assert story.pids["refused"] == story.pids["restarted"]
    assert story.healths["refused"]["bundle"] == story.healths["first"]["bundle"]
    assert story.answers["after refusals"].hit == boundary(story.answers["cold"].prompt)
    assert story.answers["after refusals"].said == story.answers["cold"].said


def test_an_update_changes_the_running_server(story: Story) -> None:
    outcome = story.update_outcome
    assert outcome["changed"]
    assert outcome["previous"] == story.models["first"]["bundle"]
    assert outcome["restart"]["outcome"] == "ready"
    assert story.models["updated"]["id"] == NEXT
    assert story.models["updated"]["bundle"] == story.healths["updated"]["bundle"] == outcome["bundle_id"]
    assert story.healths["updated"]["model"] == NEXT
    assert story.pids["updated"] == story.pids["restarted"]  # the same process, with another model
    assert story.old_name == "model_not_found"


def test_another_model_never_reads_the_old_one_s_cache(story: Story) -> None:
    first, again = story.answers["updated"], story.answers["updated again"]
    assert first.hit == 0
    assert story.reasons["updated"] == "fingerprint:graphs,objects"  # one word in the log line
    assert again.hit == boundary(again.prompt)
    assert first.said == again.said != story.answers["cold"].said


def test_rollback_brings_model_and_cache_back(story: Story) -> None:
    assert story.rollback_outcome["restart"]["outcome"] == "ready"
    for key in ("id", "bundle"):
        assert story.models["rolled back"][key] == story.models["first"][key]
    assert story.answers["rolled back"].hit == boundary(story.answers["cold"].prompt)
    assert story.answers["rolled back"].said == story.answers["cold"].said
    assert story.status["current"] == story.status["server"]["bundle_id"] == story.models["first"]["bundle"]
    assert story.status["previous"] == story.models["updated"]["bundle"]
    assert sorted(bundle["bundle_id"] for bundle in story.listed) == sorted(
        [story.models["first"]["bundle"], story.models["updated"]["bundle"]]
    )


def test_sigterm_lets_the_answer_end(story: Story) -> None:
    assert story.exit_code == 0
    assert story.answers["last"].reason in ("length", "stop")
    assert story.answers["last"].text.startswith(story.answers["cold"].text[:4])
    assert story.left_by_stop == []
    with pytest.raises(ProcessLookupError):
        os.kill(story.pids["rolled back"], 0)
