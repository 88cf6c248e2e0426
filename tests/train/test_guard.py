"""Spike limits against a robust z-score computed with other means."""

import math
import statistics

import numpy as np
import pytest

from eellm.train.guard import Guard


def filled(values, threshold=6.0, window=64):
    guard = Guard(threshold, window)
    for value in values:
        guard.add(value, value / 2)
    return guard


def test_limit_is_a_robust_z_score():
    values = np.random.default_rng(1).normal(3.0, 0.2, 64).tolist()
    median = statistics.median(values)
    spread = statistics.median(abs(value - median) for value in values)
    wanted = median + 6.0 * 1.4826 * spread
    loss, norm = filled(values).limits()
    assert math.isclose(loss, wanted, rel_tol=1e-12)
    assert math.isclose(norm, wanted / 2, rel_tol=1e-12)


def test_noise_passes_and_spikes_do_not():
    rng = np.random.default_rng(2)
    limit = filled(rng.normal(3.0, 0.1, 64).tolist()).limits()[0]
    assert rng.normal(3.0, 0.1, 1000).max() < limit < 3.0 + 0.1 * 10


def test_one_outlier_does_not_widen_the_limit():
    values = np.random.default_rng(3).normal(3.0, 0.1, 63).tolist()
    assert filled([*values, 1e6]).limits()[0] < 2 * filled(values).limits()[0]


def test_a_constant_loss_leaves_room_for_rounding():
    limit = filled([2.0] * 64).limits()[0]
    assert 2.0 + 1e-3 < limit < 2.2


def test_no_limit_before_there_is_a_history_or_when_off():
    assert filled([1.0] * 15).limits() == (math.inf, math.inf)
    assert math.isfinite(filled([1.0] * 16).limits()[0])
    assert filled([1.0] * 64, threshold=0.0).limits() == (math.inf, math.inf)


def test_old_values_leave_the_window():
    assert filled([100.0] * 64 + [1.0] * 64).limits() == filled([1.0] * 64).limits()


def test_state_survives_json_exactly():
    import json

    guard = filled(np.random.default_rng(4).normal(3.0, 0.1, 40).tolist())
    other = Guard(6.0, 64)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.limits() == guard.limits()
    other.add(9.0, 1.0)
    with pytest.raises(AssertionError):
        assert other.limits() == guard.limits()
