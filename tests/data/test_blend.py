import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.data import Blend, PackedDataset, TokenArray, split_documents
from eellm.data.blend import PERIOD, integer_weights, schedule
from eellm.data.packing import permutation


def datasets(count, seq_length=3):
    """Datasets whose tokens tell which one they are."""
    return [
        PackedDataset(TokenArray(np.arange(20) + 100 * i), seq_length, seed=i) for i in range(count)
    ]


def largest_error(choice, shares):
    """Exact, in integers: max over prefixes and datasets of |given - wanted|, times the period."""
    period = sum(shares)
    worst = 0
    steps = np.arange(1, choice.size + 1, dtype=np.int64)
    for i, share in enumerate(shares):
        given_ = np.cumsum(choice == i, dtype=np.int64)
        worst = max(worst, int(np.abs(given_ * period - steps * share).max()))
    return worst


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_error_is_below_one_sample_at_any_prefix(shares):
    choice, place = schedule(shares)
    assert largest_error(choice, shares) < sum(shares)
    for i, share in enumerate(shares):
        assert place[choice == i].tolist() == list(range(share))


@pytest.mark.parametrize(
    "weights", [[1, 1000], [3, 2, 2], [0.7, 0.2, 0.1], [1] * 50, [1 / 3, 2 / 3]]
)
def test_error_over_many_periods(weights):
    blend = Blend(datasets(len(weights)), weights)
    choice, places = blend.locate(np.arange(3 * blend.period + 17))
    assert largest_error(choice, blend.shares) < blend.period
    for i in range(len(weights)):
        mine = places[choice == i]
        assert mine.tolist() == list(range(mine.size))


def test_error_negative_control():
    """Drawing by chance is not within one sample."""
    shares = [3, 2, 5]
    choice = np.random.default_rng(0).choice(3, size=1000, p=np.array(shares) / 10)
    assert largest_error(choice, shares) > 10


@pytest.mark.parametrize(
    "weights, expected",
    [
        ([1, 1], [1, 1]),
        ([2, 4, 6], [1, 2, 3]),
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([0.0362, 0.0657, 0.8981], [362, 657, 8981]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([1 / 7, 1 / 3], [3, 7]),
        ([5], [1]),
    ],
)
def test_weights_are_exact_where_they_can_be(weights, expected):
    assert integer_weights(weights) == expected


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_other_weights_are_rounded_little(weights):
    shares = integer_weights(weights)
    assert sum(shares) <= PERIOD and min(shares) >= 1
    wanted = np.array(weights) / sum(weights)
    assert np.abs(np.array(shares) / sum(shares) - wanted).max() <= len(weights) / PERIOD


def test_rounded_weights_fill_the_period():
    shares = integer_weights([np.pi, np.e, 1e-9])
    assert shares[2] == 1 and sum(shares) == PERIOD
    assert shares[0] == round((PERIOD - 3) * np.pi / (np.pi + np.e)) + 1


@pytest.mark.parametrize(
    "weights", [[0, 1], [-1, 2], [float("nan"), 1], [float("inf"), 1], [1], [1, 2, 3]]
)
def test_bad_weights(weights):
    with pytest.raises(ValueError, match=r"bad (weight|blend)"):
        Blend(datasets(2), weights)


def test_windows_come_from_the_chosen_datasets():
    parts = datasets(3)
    blend = Blend(parts, [1, 2, 3])
    ids = np.array([40, 3, 3, 0, 17, 5])
    choice, places = blend.locate(ids)
    tokens, ends = blend.windows(ids)
    for row in range(ids.size):
        window = parts[choice[row]].sample(int(places[row]))
        assert (tokens[row] == window.tokens).all() and (ends[row] == window.ends).all()
        assert (tokens[row] // 100 == choice[row]).all()
        assert (blend.sample(int(ids[row])).tokens == window.tokens).all()
    with pytest.raises(ValueError, match="one seq_length"):
        Blend([*datasets(1), *datasets(1, 4)], [1, 1])


def test_window_count_is_one_pass_of_the_first_to_end():
    parts = datasets(2)
    blend = Blend(parts, [1, 3])
    choice, places = blend.locate(np.arange(blend.window_count))
    assert places[choice == 1].max() == parts[1].window_count - 1


def test_ten_million_samples_at_once():
    start = time.perf_counter()
    weights = np.random.default_rng(0).random(15)
    blend = Blend(datasets(15), weights)
    choice, _ = blend.locate(np.arange(10_000_000, 20_000_000))
    assert time.perf_counter() - start < 20
    shares = np.bincount(choice, minlength=15) / 1e7
    assert np.abs(shares - weights / weights.sum()).max() < 15 / PERIOD


@given(
    st.integers(0, 200),
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    st.sampled_from([None, 0, 7]),
)
@settings(max_examples=200, deadline=None)
def test_split_covers_all_documents_once(count, parts, seed):
    wanted = sum(part > 0 for part in parts)
    if count < wanted:
        with pytest.raises(ValueError, match="too few documents to split"):
            split_documents(count, parts, seed)
        return
    split = split_documents(count, parts, seed)
    joined = np.concatenate(split).tolist()
    order = range(count) if seed is None else permutation(seed, 0, 2, count).tolist()
    assert joined == list(order)
    for part, ids in zip(parts, split, strict=True):
        assert (ids.size > 0) == (part > 0)
        assert abs(ids.size - count * part / sum(parts)) <= len(parts)


def test_split_like_megatron():
    assert [ids.size for ids in split_documents(1000, [969, 30, 1])] == [969, 30, 1]
    for bad in ([], [0, 0], [-1, 2], [float("nan")]):
        with pytest.raises(ValueError, match="bad split"):
            split_documents(10, bad)
