"""Predicted bytes against what decoding reads: equal to the byte."""

import numpy as np
import pytest

from eellm import _core
from eellm.evaluation.costs import StepCosts
from tests.infer.models import CASES, fill, make_config

COUNT = 40
PROMPT = np.array([3, 1, 4], np.int32)


def make(case, dtype):
    config = make_config(case)
    core = fill(_core.Model(config.to_core(), threads=1), 1)
    return config, _core.Engine(core, dtype=dtype)


def decode(decoder, **settings):
    """(bytes of each step but the first, exit of each token)."""
    decoder.add(PROMPT, max_new_tokens=COUNT, **settings)
    read, exits = [], []
    while decoder.active:
        before = decoder.stats["bytes_read"]
        exits += decoder.step()["exit"].tolist()
        read.append(decoder.stats["bytes_read"] - before)
    assert len(read) == len(exits) == COUNT
    return read[1:], np.array(exits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_full_depth(case, dtype):
    config, engine = make(case, dtype)
    costs = StepCosts(config, dtype)
    read, _ = decode(engine, engine="full")
    assert read == [costs.full()] * (COUNT - 1)
    assert costs.leaving([False] * costs.early)[-1] == costs.full()


@pytest.mark.parametrize("max_deferred", [0, 1, 3, 15])
@pytest.mark.parametrize("case", CASES)
def test_known_exits(case, max_deferred):
    """Steps of tokens that leave at exits known beforehand, some looked at and some not."""
    config, engine = make(case, "float32")
    costs = StepCosts(config, max_deferred=max_deferred)
    rng = np.random.default_rng(max_deferred)
    for active in (np.ones(costs.early, bool), np.arange(costs.early) % 2 == 0):
        # Mostly early, so that rows wait until the cap is reached.
        allowed = [*np.flatnonzero(active), costs.early]
        odds = np.array([4.0] * (len(allowed) - 1) + [1.0])
        replay = rng.choice(allowed, COUNT, p=odds / odds.sum()).astype(np.int32)
        # An exit is looked at where its threshold is below 1, and the replay decides.
        limits = np.where(active, 0.5, 1.0).tolist()
        read, exits = decode(engine, thresholds=limits, replay=replay, max_deferred=max_deferred)
        assert exits.tolist() == replay.tolist()
        predicted = costs.steps(active.tolist(), replay, np.array([0]))
        assert read == predicted[1:].tolist()
        assert costs.average(active.tolist(), replay, np.array([0])) == predicted.mean()


@pytest.mark.parametrize("case", ["llama_heads", "window", "gpt2_mlp"])
def test_a_wrong_count_is_noticed(case):
    """Negative control: another exit, other active exits and another cap cost other bytes."""
    config, engine = make(case, "float32")
    costs = StepCosts(config, max_deferred=3)
    active = [True] * costs.early
    replay = np.array(([0] * 6 + [costs.early]) * 6, np.int32)[:COUNT]
    read, _ = decode(engine, thresholds=[0.5], replay=replay, max_deferred=3)
    start = np.array([0])
    assert read == costs.steps(active, replay, start)[1:].tolist()
    assert read != costs.steps(active, np.roll(replay, 1), start)[1:].tolist()
    assert read != costs.steps([True, *active[1:-1], False], replay, start)[1:].tolist()
    assert read != StepCosts(config).steps(active, replay, start)[1:].tolist()
    assert read != StepCosts(config, "bfloat16", 3).steps(active, replay, start)[1:].tolist()
