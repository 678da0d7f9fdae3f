"""Tokens follow from logits, seed and parameters, and from nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import EngineError
from runtime.sampler import Sampler, SamplingParams, _nucleus


def draw(logits: np.ndarray, count: int, **params: object) -> list[int]:
    sampler = Sampler(SamplingParams(**params))  # type: ignore[arg-type]
    return [sampler.choose(logits) for _ in range(count)]


LOGITS = np.random.default_rng(1).standard_normal(500).astype(np.float32) * 3


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = np.array([1, 3, 3, 2], np.float32)
    assert draw(logits, 3, temperature=0) == [1, 1, 1]


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    assert draw(LOGITS, 50, seed=7) == draw(LOGITS, 50, seed=7)
    assert draw(LOGITS, 50, seed=7) != draw(LOGITS, 50, seed=8)
    assert draw(LOGITS, 50, seed=-1) == draw(LOGITS, 50, seed=2**64 - 1)


def test_no_seed_is_a_fresh_one_each_time() -> None:
    assert draw(LOGITS, 50) != draw(LOGITS, 50)


def test_frequencies_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    counts = np.bincount(draw(logits, 6000, seed=3), minlength=3) / 6000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.02


def test_temperature_sharpens() -> None:
    logits = np.log(np.array([0.6, 0.4], np.float32))
    cold, hot = (np.mean(draw(logits, 3000, seed=3, temperature=t)) for t in (0.25, 2.0))
    assert cold < 0.2 < hot


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.4], np.float32))
    assert set(draw(logits, 300, seed=1, top_p=0.49)) == {1}
    assert set(draw(logits, 300, seed=1, top_p=0.6)) == {1, 2}
    assert set(draw(logits, 300, seed=1, top_p=1e-9)) == {1}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_the_short_way_to_the_nucleus_is_the_long_way(weights: list[float], top_p: float) -> None:
    values = np.array(weights, np.float64) + 1e-3
    order = np.argsort(-values, kind="stable")
    share = np.cumsum(values[order]) / np.sum(values)
    assert _nucleus(values, top_p).tolist() == order[: int(np.searchsorted(share, top_p)) + 1].tolist()


def test_masked_logits_are_never_drawn() -> None:
    logits = np.full(100, -np.inf, np.float32)
    logits[[5, 9]] = 0
    assert set(draw(logits, 200, seed=1)) == {5, 9}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_stop_the_request(bad: float) -> None:
    logits = LOGITS.copy()
    logits[123] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(EngineError, match="id 123"):
            draw(logits, 1, temperature=temperature)


def test_all_masked_is_an_error() -> None:
    with pytest.raises(EngineError):
        draw(np.full(4, -np.inf, np.float32), 1)
