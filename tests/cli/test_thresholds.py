"""Thresholds against a search over all that can occur."""

from itertools import product

import numpy as np
import pytest

from eellm.evaluation.thresholds import choose, outcome, places


def made(count, exits, seed):
    """Confidences that rise with depth, and agreement that rises with confidence."""
    rng = np.random.default_rng(seed)
    ease = rng.random(count)
    depth = np.arange(1, exits + 1)[:, None] / exits
    confidence = np.clip(ease * depth + 0.2 * rng.random((exits, count)), 0, 1).astype(np.float32)
    correct = rng.random((exits, count)) < confidence + 0.15
    correct[-1] = True
    return confidence, correct


def by_hand(thresholds, confidence):
    result = []
    for token in range(confidence.shape[1]):
        for i, limit in enumerate(thresholds):
            if limit < 1 and confidence[i, token] >= limit:
                result.append(i)
                break
        else:
            result.append(len(confidence) - 1)
    return result


def test_places_follow_the_decode_rule():
    confidence, _ = made(200, 4, 1)
    confidence[0, :5] = 1.0
    for thresholds in ((0.5, 0.6, 0.7), (1.0, 0.2, 1.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)):
        assert places(thresholds, confidence).tolist() == by_hand(thresholds, confidence)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("least_share", [0.0, 0.1])
def test_choice_is_as_good_as_an_exhaustive_search(seed, least_share):
    confidence, correct = made(60, 3, seed)
    depths = (2, 4, 6)
    found = choose(confidence, correct, depths, agreement=0.9, least_share=least_share)
    limits = [[*np.unique(confidence[i]).astype(float), 1.0] for i in range(2)]
    best = np.inf
    for thresholds in product(*limits):
        other = outcome(thresholds, confidence, correct, depths)
        if other.agreement >= 0.9 and min(other.shares) >= least_share:
            best = min(best, other.mean_depth)
    assert found.agreement >= 0.9 and min(found.shares) >= least_share
    assert found.mean_depth == pytest.approx(best)


def test_one_early_exit():
    confidence, correct = made(500, 2, 7)
    found = choose(confidence, correct, (3, 6), agreement=0.95)
    assert found.agreement >= 0.95 and len(found.thresholds) == 1
    lower = outcome((found.thresholds[0] - 0.05,), confidence, correct, (3, 6))
    assert lower.mean_depth < found.mean_depth and lower.agreement < 0.95


def test_full_agreement_is_possible_by_never_leaving():
    confidence, correct = made(100, 3, 3)
    correct[:-1] = False
    found = choose(confidence, correct, (2, 4, 6), agreement=1.0)
    assert found.thresholds == (1.0, 1.0) or found.shares[-1] == 1.0
    with pytest.raises(ValueError, match="no thresholds reach"):
        choose(confidence, correct, (2, 4, 6), agreement=1.0, least_share=0.05)


def test_confidence_one_never_becomes_the_threshold_one():
    confidence = np.ones((2, 10), np.float32)
    found = choose(confidence, np.ones((2, 10), bool), (1, 2), agreement=0.9)
    assert found.thresholds[0] < 1 and found.shares == (1.0, 0.0)
