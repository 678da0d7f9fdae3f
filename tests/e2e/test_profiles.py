"""One bundle, two profiles, as real processes: each tried and served with its own graph, goldens and KV cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_support import Answer, Appliance, appliance, boundary, command, complete, long_prompt
from view_support import build_profiles, short_checkpoint


class Story:
    """A machine that serves ``small``, then ``full``, then ``small`` again; what it said on the way."""

    def __init__(self, machine: Appliance, stick: Path, keys: Path) -> None:
        self.machine = machine
        self.health: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, Answer] = {}
        self.reasons: dict[str, str] = {}
        machine.solocard("trust", "add", keys / "root.json", "--yes")
        self.choose("big")
        self.refused = machine.solocard("install", stick, code=9).stderr
        self.state_after_refusal = machine.told("status")["current"]
        self.choose("small")
        self.outcome = machine.told("install", stick)
        self.listed = machine.told("list")["bundles"]
        self.client = machine.client(machine.new_key())
        self.serve("small")
        self.serve("full", "--profile", "full")
        self.serve("small again")

    def choose(self, profile: str) -> None:
        config = self.machine.home / "config.yaml"
        text = re.sub(r"engine:\n.*\n", "", config.read_text())
        config.write_text(f"{text}engine:\n  profile: {profile}\n")

    def serve(self, step: str, *options: str) -> None:
        self.machine.start(module=("runtime", "serve", *options))
        self.health[step] = self.machine.health()
        request_id = step.replace(" ", "-")
        self.answers[step] = complete(self.client, long_prompt("p"), request_id=request_id)
        self.reasons[step] = self.machine.kv_reason(request_id)
        self.status = self.machine.told("status")["server"]
        assert self.machine.terminate() == 0


@pytest.fixture(scope="module")
def story(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("profiles")
    short_checkpoint(folder / "checkpoint")
    build_profiles(folder / "checkpoint", folder / "bundle", folder)
    command("exporter", "sign", folder / "bundle", "--keys", keys)
    with appliance(folder / "home") as machine:
        yield Story(machine, folder / "bundle", keys)


def test_a_profile_the_bundle_lacks_is_refused_by_the_trial_and_nothing_is_switched(story: Story) -> None:
    assert "profile 'big' is not in" in story.refused
    assert "which has full, small" in story.refused
    last = story.refused.strip().splitlines()[-1]
    assert last.startswith("solocard: the trial of deepseek-v4-flash-1-")
    assert not story.state_after_refusal


def test_install_tries_the_configured_profile(story: Story) -> None:
    assert ", profile small: checked 16 golden tokens of 16 prompts" in story.outcome["trial_output"]
    [row] = story.listed
    assert row["profiles"] == ["full", "small"]


def test_each_profile_is_served_and_named(story: Story) -> None:
    assert {step: health["profile"] for step, health in story.health.items()} == {
        "small": "small", "full": "full", "small again": "small",
    }  # fmt: skip
    assert story.status["profile"] == "small"


def test_profiles_share_no_stored_rows(story: Story) -> None:
    small, full, again = (story.answers[step] for step in ("small", "full", "small again"))
    assert (small.hit, full.hit) == (0, 0)
    assert again.hit == boundary(again.prompt) > 0
    assert again.said == small.said
    assert "profile" in story.reasons["full"]
