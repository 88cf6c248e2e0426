"""Learning rates and exit weights against closed forms written out here."""

import math

import numpy as np
import pytest

from eellm.train.config import TrainConfig
from eellm.train.rates import exit_weights, learning_rate


def rates_of(**values):
    config = TrainConfig(**values)
    return np.array([learning_rate(config, step) for step in range(config.steps)])


def test_warmup_rises_in_equal_parts_to_the_peak():
    rates = rates_of(steps=20, warmup_steps=5, learning_rate=2.0, schedule="constant")
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-15)
    assert (rates[5:] == 2.0).all()


def test_cosine():
    steps, warmup, peak, least = 50, 10, 3e-3, 1e-4
    rates = rates_of(steps=steps, warmup_steps=warmup, learning_rate=peak, min_learning_rate=least)
    t = np.arange(warmup, steps)
    wanted = least + (peak - least) * np.cos(np.pi / 2 * (t - warmup) / (steps - warmup)) ** 2
    np.testing.assert_allclose(rates[warmup:], wanted, rtol=1e-12)
    assert rates[warmup] == peak


def test_linear():
    rates = rates_of(steps=8, learning_rate=1.0, min_learning_rate=0.2, schedule="linear")
    np.testing.assert_allclose(rates, 1.0 - 0.1 * np.arange(8), rtol=1e-12)


def test_warmup_stable_decay():
    rates = rates_of(
        steps=20, warmup_steps=4, decay_steps=5, learning_rate=1.0, min_learning_rate=0.5,
        schedule="wsd",
    )  # fmt: skip
    assert (rates[4:16] == 1.0).all()
    np.testing.assert_allclose(rates[15:], [1.0, 0.9, 0.8, 0.7, 0.6], rtol=1e-12)


def test_wsd_without_decay_is_constant():
    assert (rates_of(steps=5, learning_rate=1.0, schedule="wsd") == 1.0).all()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_learning_rate_is_a_function_of_the_step_alone(schedule):
    config = TrainConfig(steps=30, warmup_steps=3, decay_steps=7, schedule=schedule)
    forward = [learning_rate(config, step) for step in range(30)]
    backward = [learning_rate(config, step) for step in reversed(range(30))]
    assert forward == backward[::-1]


def ramp(kind, start, end, steps=40, length=16):
    config = TrainConfig(
        steps=steps,
        exit_weights=(end,),
        exit_weights_initial=(start,),
        exit_ramp=kind,
        exit_ramp_steps=0 if kind == "constant" else length,
    )
    return np.array([exit_weights(config, 1, step)[0] for step in range(steps)])


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.1, 0.3), (2.0, 0.25), (1.0, 0.0)])
def test_ramps_up_and_down(start, end):
    t = np.arange(40)
    part = np.minimum(t / 16, 1.0)
    linear = start + part * (end - start)
    cosine = start + 0.5 * (np.cos(np.pi * (part + 1.0)) + 1.0) * (end - start)
    np.testing.assert_allclose(ramp("linear", start, end), linear, atol=1e-14)
    np.testing.assert_allclose(ramp("cosine", start, end), cosine, atol=1e-14)
    assert (ramp("constant", start, end) == end).all()


def test_a_ramp_ends_exactly_at_its_target():
    for kind in ("linear", "cosine"):
        assert (ramp(kind, 0.1, 0.7)[16:] == 0.7).all()


def test_one_weight_serves_all_exits_and_many_serve_each():
    config = TrainConfig(exit_weights=0.5)
    assert exit_weights(config, 3, 0) == [0.5, 0.5, 0.5]
    config = TrainConfig(exit_weights=(0.1, 0.2))
    assert exit_weights(config, 2, 7) == [0.1, 0.2]
    config.check_model(2)
    with pytest.raises(ValueError, match=r"exit_weights \(expected 1 value or one for each of 3"):
        config.check_model(3)


def test_the_ramps_differ():
    """The comparison above can fail: the shapes are not the same."""
    assert not math.isclose(ramp("linear", 0.0, 1.0)[4], ramp("cosine", 0.0, 1.0)[4])


BAD = {
    "steps": 0,
    "seq_length": 0,
    "micro_batch_size": 3,
    "learning_rate": 0.0,
    "min_learning_rate": 1.0,
    "warmup_steps": 2000,
    "decay_steps": -1,
    "beta1": 1.0,
    "beta2": -0.1,
    "eps": 0.0,
    "weight_decay": -1.0,
    "clip": float("nan"),
    "exit_weights": (-1.0,),
    "exit_temperature": (0.0,),
    "exit_ramp": "square",
    "recompute": "half",
    "on_spike": "ignore",
    "spike_threshold": float("inf"),
    "seed": -1,
    "keep_checkpoints": 0,
}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_value_is_refused_by_its_name(key):
    name = "global_batch_size" if key == "micro_batch_size" else key
    with pytest.raises(ValueError, match=rf"{name}.* \(expected .*, got .*\); "):
        TrainConfig(**{key: BAD[key]})


def test_a_ramp_needs_its_length():
    with pytest.raises(ValueError, match="exit_ramp_steps"):
        TrainConfig(exit_ramp="linear")


def test_wrong_types_are_refused():
    with pytest.raises(ValueError, match="steps has the wrong type"):
        TrainConfig(steps="many")
    with pytest.raises(ValueError, match="dynamic_exit_weights has the wrong type"):
        TrainConfig(dynamic_exit_weights=1)
    assert isinstance(TrainConfig(learning_rate=1).learning_rate, float)
