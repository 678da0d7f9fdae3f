"""kill -9 of the serving process at five seeded moments: what was answered is hit at c(n), the rest is a clean miss.

Every prompt is asked three times: of a server that is never killed, of one that is killed while it works on them, and
of that one's successor. The answers must be the same, whatever the successor found on disk.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import openai
import pytest
from e2e_support import PATIENCE_S, Answer, Appliance, boundary, complete, long_prompt, stream

SEED = 20260731
# When the server dies: after so much of the first answer's time, at a write to the cache's files, after an answer.
MOMENTS = ("early", "late", "second", "storing", "answered")
CUT_OFF = (openai.APIError, httpx2.TransportError)  # what the SDK raises when the server is gone


def prompts() -> dict[str, list[str]]:
    """Two prompts of 600 to 900 tokens for each moment, no two with a block in common."""
    draw = random.Random(SEED)
    return {moment: [long_prompt(f"{moment} {i}", draw.randint(110, 150)) for i in (1, 2)] for moment in MOMENTS}


@dataclass
class Round:
    """One life of the server: what had ended before the kill, what was cut off, and what its successor said."""

    delay_s: float = 0.0
    ended: dict[int, Answer] = field(default_factory=dict)
    cut_off: dict[int, str] = field(default_factory=dict)
    again: dict[int, Answer] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


class Killed:
    """Runs the rounds; a prompt is its place (0, 1) in its moment's list."""

    def __init__(self, steady: Appliance, machine: Appliance) -> None:
        self.prompts, self.rounds = prompts(), {moment: Round() for moment in MOMENTS}
        self.machine, self.key = machine, machine.new_key()
        self.undisturbed, self.answer_s = self._undisturbed(steady)
        draw = random.Random(SEED)
        machine.start()
        for moment in MOMENTS:
            self.rounds[moment].delay_s = self._delay_s(moment, draw)
            self._kill_in_flight(moment)
            machine.start()
            self._ask_again(moment)
        client = machine.client(self.key)
        self.at_the_end = [complete(client, self.prompts[moment][0]) for moment in MOMENTS]
        self.kv = machine.health()["kv"]
        self.exit_code = machine.terminate()

    def _undisturbed(self, steady: Appliance) -> tuple[dict[str, list[Answer]], float]:
        """Every prompt's answer from a server that is never killed, and the seconds one takes."""
        steady.start()
        client, started_s = steady.client(steady.new_key()), time.monotonic()
        answers = {moment: [complete(client, prompt) for prompt in pair] for moment, pair in self.prompts.items()}
        took_s = time.monotonic() - started_s
        assert steady.terminate() == 0
        return answers, took_s / sum(map(len, answers.values()))

    def _delay_s(self, moment: str, draw: random.Random) -> float:
        first, last = {"early": (0.0, 0.5), "late": (0.5, 1.0), "second": (1.0, 2.0)}.get(moment, (0.0, 0.0))
        return draw.uniform(first, last) * self.answer_s

    def _kill_in_flight(self, moment: str) -> None:
        """Ask both prompts at once, kill at the moment; threads whose answer did not end got an error."""
        done, one = self.rounds[moment], threading.Event()

        def ask(place: int) -> None:
            try:
                done.ended[place] = stream(self.machine.client(self.key), self.prompts[moment][place])
                one.set()
            except CUT_OFF as error:
                done.cut_off[place] = type(error).__name__

        threads = [threading.Thread(target=ask, args=(place,)) for place in (0, 1)]
        before = self._segments()
        for thread in threads:
            thread.start()
        if moment == "answered":
            assert one.wait(PATIENCE_S)
        elif moment == "storing":
            end = time.monotonic() + PATIENCE_S
            while self._segments() == before and time.monotonic() < end:
                time.sleep(0.0005)
        else:
            time.sleep(done.delay_s)
        self.machine.kill()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert len(done.ended) + len(done.cut_off) == 2

    def _segments(self) -> list[tuple[str, int, int]]:
        files = sorted((self.machine.home / "kv").glob("*.kvs"))
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]

    def _ask_again(self, moment: str) -> None:
        """Of the successor: this round's prompts, in turn."""
        done, client = self.rounds[moment], self.machine.client(self.key)
        for place, prompt in enumerate(self.prompts[moment]):
            request_id = f"{moment}-{place}"
            done.again[place] = complete(client, prompt, request_id=request_id)
            done.reasons[place] = self.machine.kv_reason(request_id)


@pytest.fixture(scope="module")
def killed(new_appliance: Callable[[], Appliance]) -> Killed:
    done = Killed(new_appliance(), new_appliance())
    for moment, one in done.rounds.items():
        print(moment, one)
    return done


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_was_answered_is_hit_at_exactly_c_n(killed: Killed, moment: str) -> None:
    done = killed.rounds[moment]
    for place, ended in done.ended.items():
        again = done.again[place]
        assert ended.prompt > 512
        assert again.hit == boundary(ended.prompt), done
        assert done.reasons[place] == "hit"
    assert len(done.ended) >= (moment == "answered")


@pytest.mark.parametrize("moment", MOMENTS)
def test_everything_else_is_a_hit_or_a_clean_miss(killed: Killed, moment: str) -> None:
    """Stored but not yet answered is a whole hit; else nothing of it is there, and the log says why."""
    done = killed.rounds[moment]
    for place, again in done.again.items():
        if place not in done.ended:
            whole = boundary(again.prompt)
            assert (again.hit, done.reasons[place]) in [(whole, "hit"), (0, "no-unit")], done
    assert len(done.again) == 2


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_answers_are_those_of_a_server_that_was_never_killed(killed: Killed, moment: str) -> None:
    done = killed.rounds[moment]
    expected = [answer.said for answer in killed.undisturbed[moment]]
    assert [done.again[place].said for place in (0, 1)] == expected
    for place, ended in done.ended.items():
        assert ended.said == expected[place]


def test_nothing_that_was_stored_is_lost_by_a_later_kill(killed: Killed) -> None:
    for answer in killed.at_the_end:
        assert answer.hit == boundary(answer.prompt)
    assert [answer.said for answer in killed.at_the_end] == [killed.undisturbed[moment][0].said for moment in MOMENTS]


def test_the_kills_met_answers_that_had_ended_and_some_that_had_not(killed: Killed) -> None:
    """Else the tests above looked at nothing."""
    rounds = killed.rounds.values()
    assert any(one.ended for one in rounds)
    assert sum(len(one.cut_off) for one in rounds) >= 3
    assert any(reason == "no-unit" for one in rounds for reason in one.reasons.values())


def test_the_cache_still_writes_after_five_kills(killed: Killed) -> None:
    assert killed.kv["writing"]
    assert killed.kv["reason"] == ""
    assert killed.exit_code == 0


def test_no_life_logged_a_damaged_record_or_a_failure(killed: Killed) -> None:
    log: Path = killed.machine.home / "log" / "serve.log"
    bad = [line for line in log.read_text().splitlines() if " ERROR " in line or " WARNING " in line]
    assert bad == []
