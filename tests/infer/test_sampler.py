"""Sampling: the right distribution, from keys that know nothing of the batch."""

import ctypes as ct
import hashlib
import math
from contextlib import contextmanager

import numpy as np
import pytest

from eellm import _core
from tests.infer.models import SIZES, drain, make, random_tokens, run, same, thresholds_for
from tests.infer.reference import softmax
from tests.infer.sampling import (
    DRAFT,
    RESIDUAL,
    Sampler,
    chi_square_tail,
    choices,
    draw,
    expected_distribution,
    g_test,
    history,
    sampling,
    transformers_distribution,
    uniform,
)
from tests.ops.harness import INVALID, NOMEM, OK, function

VOCAB = SIZES["vocab_size"]
SAMPLES = 6000
LEVEL = 0.001  # a right sampler fails a test of distribution with this probability
ALMOST_ONE = 1 - 2.0**-53
EPS = np.finfo(np.float64).eps


def test_statistics():
    """Tail values as in printed tables, and the G-test of a distribution and of another one."""
    for x, freedom in ((10.828, 1), (13.816, 2), (16.266, 3), (20.515, 5), (59.703, 30)):
        assert abs(chi_square_tail(x, freedom) - 0.001) < 1e-6
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(20))
    values = [g_test(rng.multinomial(20_000, p), p) for _ in range(1000)]
    assert abs(np.mean(values) - 0.5) < 4 * math.sqrt(1 / 12 / 1000)
    q = p * rng.uniform(0.9, 1.1, 20)
    assert g_test(rng.multinomial(20_000, q / q.sum()), p) < LEVEL


# Bias, penalties, bans


def _tokens(rng, vocab, count):
    return rng.integers(0, vocab, count).astype(np.int32)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 8.0])
def test_adjusted_like_transformers(penalty):
    """Bias, repetition penalty and bans, to the bit."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    rng = np.random.default_rng(3)
    penalty = float(np.float32(penalty))
    with Sampler(101) as sampler:
        for count in (1, 7, 300):
            logits = rng.normal(0, 4, 101).astype(np.float32)
            logits[rng.integers(0, 101, 5)] = 0
            tokens = _tokens(rng, 101, count)
            bias = {int(t): float(np.float32(b)) for t, b in ((99, 2), (3, -0.3), (50, -7))}
            banned = [3, 8, 100]
            text = history(tokens, count // 2, banned)
            settings = sampling(list(bias.items()), repetition_penalty=penalty)
            scores = torch.tensor(logits)[None]
            ids = torch.tensor(tokens.astype(np.int64))[None]
            for processor in (
                hf.SequenceBiasLogitsProcessor({(t,): b for t, b in bias.items()}),
                hf.RepetitionPenaltyLogitsProcessor(penalty),
                hf.SuppressTokensLogitsProcessor(banned, device="cpu"),
            ):
                scores = processor(ids, scores)
            found = sampler.adjust(settings, logits, text)
            assert found.tobytes() == scores[0].numpy().tobytes()
            # Two penalties are told apart.
            settings.repetition_penalty = penalty * 1.001
            assert (sampler.adjust(settings, logits, text) != found).any()


@pytest.mark.parametrize("count", [0, 1, 2, 50, 200_000])
def test_penalties_of_written_tokens(count):
    """Subtracted once and once a time, from tokens that were written only; float32 rounds three
    times, within 2^-24 of the sum of magnitudes each."""
    rng = np.random.default_rng(count)
    vocab, prompt = 57, count // 3
    logits = rng.normal(0, 4, vocab).astype(np.float32)
    tokens = _tokens(rng, 40, count)  # 40 to 56 never stand in the text
    text = history(tokens, prompt)
    times = np.bincount(tokens[prompt:], minlength=vocab)
    with Sampler(vocab) as sampler:
        for presence, frequency in ((0.5, 0), (0, 0.3), (1.5, -0.7), (-2, 1.3)):
            settings = sampling(presence_penalty=presence, frequency_penalty=frequency)
            wide = [float(np.float32(x)) for x in (presence, frequency)]
            expected = logits - wide[1] * times - wide[0] * (times > 0)
            size = np.abs(logits) + abs(wide[1]) * times + abs(wide[0])
            found = sampler.adjust(settings, logits, text)
            assert (np.abs(found - expected) <= 3 * 2.0**-24 * size).all()
            assert found.tobytes() == sampler.adjust(settings, logits, text).tobytes()
            assert count == 0 or (found != logits).any()


def test_order_of_adjustments():
    """Bias before the repetition penalty, whose sides it decides; that before the others."""
    logits = np.array([1, 1, -1, 4], np.float32)
    settings = sampling(
        [(0, -3), (2, 3)], repetition_penalty=2, presence_penalty=1, frequency_penalty=0.5
    )
    text = history([0, 2, 2, 3, 3], 2, banned=[1])
    with Sampler(4) as sampler:
        found = sampler.adjust(settings, logits, text)
        assert found.tolist() == [-4, -np.inf, 1 - 1.5, 2 - 2]
        assert logits.tolist() == [1, 1, -1, 4]
        assert sampler.choose(settings, logits, text) in (0, 2, 3)
        settings.temperature = 0
        assert sampler.choose(settings, logits, text) == 3


def test_extreme_penalties_stay_finite():
    largest = np.finfo(np.float32).max
    logits = np.array([largest, -largest, 5, -np.inf], np.float32)
    with Sampler(4) as sampler:
        for penalty in (1e-30, 1e30):
            settings = sampling([(0, 1e6), (1, -1e6)], repetition_penalty=penalty)
            settings.presence_penalty = settings.frequency_penalty = -100
            found = sampler.adjust(settings, logits, history([0, 1, 2, 3] * 9, 4))
            assert np.isfinite(found[:3]).all() and found[3] == -np.inf
            weights, total = sampler.weigh(settings, found)
            assert np.isfinite(weights).all() and total >= 1 and weights[3] == 0


PLAIN = [
    ({}, [1, 2], True),
    ({"temperature": 1.0}, [1, 2], False),
    ({"top_k": 3, "top_p": 0.5, "min_p": 0.5, "seed": 4}, [1, 2], True),
    ({"bias": [(1, 0.5)]}, [1, 2], False),
    ({"repetition_penalty": 1.1}, [1, 2], False),
    ({"repetition_penalty": 1.1}, [], True),
    ({"presence_penalty": 0.1}, [1, 2], False),
    ({"frequency_penalty": -0.1}, [1, 2], False),
]


@pytest.mark.parametrize("settings,tokens,plain", PLAIN)
def test_plain(settings, tokens, plain):
    call = function("ee_sampling_plain", ct.c_bool, ct.c_void_p, ct.c_void_p)
    made = sampling(**{"temperature": 0, **settings})
    assert call(ct.byref(made), ct.byref(history(tokens, 0))) is plain
    assert call(ct.byref(made), ct.byref(history(tokens, 0, banned=[3]))) is False
    # Without written tokens only what looks at the prompt matters.
    written_only = "presence_penalty" in settings or "frequency_penalty" in settings
    assert call(ct.byref(made), ct.byref(history(tokens))) is (plain or written_only)
    # In that case the logits themselves come back, else a copy does.
    logits = np.zeros(5, np.float32)
    with Sampler(5) as sampler:
        same_logits = sampler.adjust(made, logits, history(tokens, 0)) is logits
    assert same_logits is (plain or "temperature" in settings)


# Distributions

TRUNCATIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50, "temperature": 1.7},
    {"top_k": 10**6},
    {"top_p": 0.95},
    {"top_p": 0.5, "temperature": 2.0},
    {"top_p": 1e-30},
    {"top_p": ALMOST_ONE - 1e-7},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 30, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.2, "temperature": 1.5},
    {"top_p": 0.9, "min_p": 0.01},
]


def _assert_distribution(sampler, settings, logits, p):
    """The kept tokens are those of p, the probabilities within rounding: (logit - largest) / T
    rounds three times, e^x errs by 1e-15 < 5 eps, the sum of blocks by eps / 2 each and 11 more
    inside a block; float64's own softmax the same again."""
    weights, total = sampler.weigh(sampling(**settings), logits)
    assert np.array_equal(weights > 0, p > 1e-300), settings
    kept = p > 1e-300
    x = (logits.max() - logits[kept].astype(np.float64)) / settings.get("temperature", 1.0)
    bound = 2 * EPS * (3 * x + 5 + len(logits) / 64 + 11)
    assert (np.abs(weights[kept] / total - p[kept]) <= bound * p[kept]).all(), settings


@pytest.mark.parametrize("vocab,spread", [(1, 1), (7, 2), (64, 3), (257, 0.01), (50257, 3)])
def test_probabilities_like_transformers(vocab, spread):
    """Without ties both keep the same tokens."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    rng = np.random.default_rng(vocab)
    with Sampler(vocab) as sampler:
        for settings in TRUNCATIONS:
            logits = np.unique(rng.normal(0, spread, 2 * vocab).astype(np.float32))
            logits = rng.permutation(logits)[:vocab]
            logits[rng.permutation(vocab)[: vocab // 10]] = -np.inf
            p = transformers_distribution(logits, **settings)
            _assert_distribution(sampler, settings, logits, p)
            q = expected_distribution(logits, **settings)
            assert np.array_equal(p > 1e-300, q > 1e-300), settings


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 129, 1000, 4099])
@pytest.mark.parametrize("levels", [1, 3, 20])
def test_ties(vocab, levels):
    """The smaller of equal tokens comes first, also where a tie is cut."""
    rng = np.random.default_rng(vocab)
    logits = (rng.integers(0, levels, vocab) * 0.37).astype(np.float32)
    with Sampler(vocab) as sampler:
        for top_k in {1, 2, vocab // 3, vocab - 1, vocab} - {0}:
            for top_p in (0.123, 0.61, 1.0):
                settings = {"top_k": top_k, "top_p": top_p, "temperature": 1.3}
                p = expected_distribution(logits, **settings)
                _assert_distribution(sampler, settings, logits, p)


def test_ties_where_transformers_keeps_all():
    logits = np.zeros(8, np.float32)
    with Sampler(8) as sampler:
        weights, total = sampler.weigh(sampling(top_k=3), logits)
        assert weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0] and total == 3
        weights, total = sampler.weigh(sampling(top_p=0.5), logits)
        assert weights.tolist() == [1, 1, 1, 1, 0, 0, 0, 0] and total == 4
        assert sampler.weigh(sampling(min_p=1.0), logits)[1] == 8
        zeros = np.array([0.0, -0.0] * 4, np.float32)
        assert sampler.weigh(sampling(top_k=3), zeros)[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert (transformers_distribution(logits, top_k=3) > 0).all()


def test_cut_at_any_place():
    """Each top_k, and each top_p between two sums, keeps just so many."""
    rng = np.random.default_rng(8)
    for vocab in (2, 65, 200):
        logits = rng.normal(0, 3, vocab).astype(np.float32)
        p = softmax(logits.astype(np.float64))
        order = np.argsort(-p)
        sums = np.append(0, np.cumsum(p[order]))
        with Sampler(vocab) as sampler:
            for kept in range(1, vocab + 1):
                weights, _ = sampler.weigh(sampling(top_k=kept), logits)
                assert set(np.flatnonzero(weights)) == set(order[:kept])
                middle = np.float32((sums[kept - 1] + sums[kept]) / 2)
                if sums[kept - 1] + 1e-12 < middle < min(sums[kept] - 1e-12, 1):
                    weights, _ = sampler.weigh(sampling(top_p=middle), logits)
                    assert set(np.flatnonzero(weights)) == set(order[:kept])


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6, 1e6])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_extremes(temperature, truncation):
    """Any logits, any temperature: something is kept, the likeliest, and no part of it is NaN."""
    largest = np.finfo(np.float32).max
    rows = [
        [largest, -largest, 0, 1],
        [-largest, -largest, -largest, -np.inf],
        [-np.inf, -np.inf, 3, -np.inf],
        [1e-40, 2e-40, -1e-40, 0],
        [1e30, 1e30, np.float32(1e30) * 0.999, -1e30],
    ]
    with Sampler(4) as sampler:
        for row in rows:
            logits = np.array(row, np.float32)
            weights, total = sampler.weigh(sampling(temperature=temperature, **truncation), logits)
            assert weights[logits.argmax()] == 1 and 1 <= total <= 4
            assert (weights[logits == -np.inf] == 0).all()
            assert math.isclose(total, weights.sum(), rel_tol=4 * EPS)
            for u in (0.0, 0.5, ALMOST_ONE):
                assert weights[draw(weights, total, u)] > 0


def test_weights_are_equal_on_every_machine():
    """The digest is of IEEE operations in a fixed order: no compiler, library or instruction set
    may change it."""
    i = np.arange(3001)
    logits = (i * i * 7919 % 3001).astype(np.float32) / 64 - 20
    digest = hashlib.sha256()
    with Sampler(3001) as sampler:
        for settings in (*TRUNCATIONS, {"temperature": 0.05}):
            weights, total = sampler.weigh(sampling(**settings), logits)
            digest.update(weights.tobytes() + np.float64(total).tobytes())
    assert digest.hexdigest()[:16] == "9ceb46eb9eb29dac"


def test_exponentials():
    """Within 1e-15 of themselves down to the smallest normal numbers, against longer floats."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("needs a long double of 64 bits or more")
    rng = np.random.default_rng(0)
    logits = np.append(-rng.uniform(0, 708, 100_000), [0, -708.1, -1e9, -np.inf])
    logits = logits.astype(np.float32)
    exact = np.exp(logits.astype(np.longdouble))
    with Sampler(len(logits)) as sampler:
        weights, _ = sampler.weigh(sampling(), logits)
    normal = logits > -708
    assert (np.abs(weights - exact)[normal] <= 1e-15 * exact[normal]).all()
    assert (weights[~normal] == 0).all() and weights[-4] == 1


# Draws


def test_draw():
    """The token at which the sum first exceeds u * total."""
    rng = np.random.default_rng(5)
    for vocab in (1, 2, 63, 64, 65, 200, 5000):
        weights = rng.exponential(1, vocab) * (rng.random(vocab) < 0.6)
        weights[vocab // 2] = 1
        sums = np.cumsum(weights)
        total = sums[-1]
        kept = np.flatnonzero(weights)
        assert draw(weights, total, 0.0) == kept[0]
        assert draw(weights, total, ALMOST_ONE) == kept[-1]
        assert draw(weights, total * 1.01, ALMOST_ONE) == kept[-1]
        for u in rng.random(300):
            token = np.searchsorted(sums, u * total, side="right")
            if np.abs(sums - u * total).min() > vocab * EPS * total:
                assert draw(weights, total, u) == token


def test_numbers_have_keys():
    """A number depends on seed, sample, position and purpose, and on nothing else."""
    keys = [
        (seed, sample, position, purpose)
        for seed in (0, 1, 2**63, 2**64 - 1)
        for sample in (0, 1, 2, 1000)
        for position in (0, 1, 2, 5000, 2**31)
        for purpose in range(4)
    ]

    def number(seed, sample, position, purpose, **others):
        return uniform(sampling(seed=seed, sample=sample, **others), position, purpose)

    found = [number(*key) for key in keys]
    assert len(set(found)) == len(keys)
    assert all(0 <= u < 1 for u in found)
    assert all(u * 2**53 == int(u * 2**53) for u in found)
    assert found == [number(*key, top_k=3, presence_penalty=0.5) for key in keys]


def test_numbers_are_even():
    """Of 64 equal parts of [0, 1), along each part of the key, and of pairs of purposes."""
    count = 20_000
    even = np.full(64, 1 / 64)
    plain = sampling(seed=3)
    streams = {
        **{f"purpose {p}": [uniform(plain, i, p) for i in range(count)] for p in range(4)},
        "seed": [uniform(sampling(seed=i), 7, 0) for i in range(count)],
        "sample": [uniform(sampling(sample=i), 7, 0) for i in range(count)],
    }
    for name, numbers in streams.items():
        parts = np.bincount((np.array(numbers) * 64).astype(int), minlength=64)
        assert g_test(parts, even) > LEVEL, name
    for one in range(4):
        for other in range(one):
            pair = (np.array(streams[f"purpose {one}"]) * 8).astype(int) * 8
            pair += (np.array(streams[f"purpose {other}"]) * 8).astype(int)
            assert g_test(np.bincount(pair, minlength=64), even) > LEVEL


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_choices_follow_the_distribution(settings):
    rng = np.random.default_rng(17)
    logits = rng.normal(0, 2, 43).astype(np.float32)
    with Sampler(43) as sampler:
        counts = choices(sampler, sampling(seed=5, **settings), logits, history(), 20_000)
    assert g_test(counts, expected_distribution(logits, **settings)) > LEVEL
    wrong = {**settings, "temperature": settings.get("temperature", 1.0) * 1.1}
    wrong = expected_distribution(logits, **wrong)
    assert counts[wrong == 0].sum() > 0 or g_test(counts, wrong) < LEVEL


def test_choice_after_adjustments():
    """The distribution is that of the adjusted logits, and the key the text's length alone."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1, 20).astype(np.float32)
    settings = sampling(
        [(4, 1.5)], seed=9, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.2
    )
    text = history([1, 2, 3, 3, 4, 5, 5, 5], 3, banned=[7])
    with Sampler(20) as sampler:
        adjusted = sampler.adjust(settings, logits, text)
        counts = choices(sampler, settings, logits, text, 20_000)
        assert g_test(counts, expected_distribution(adjusted)) > LEVEL
        assert counts[7] == 0
        assert g_test(counts + 1, expected_distribution(logits)) < LEVEL
        plain = sampling(seed=9)
        for sample in range(50):
            settings.sample = plain.sample = sample
            other = history(rng.integers(0, 20, 8), 2)
            assert sampler.choose(settings, logits, text) == sampler.choose(plain, adjusted, other)


def test_greedy():
    """The smallest of the largest, wherever it stands."""
    rng = np.random.default_rng(1)
    for vocab in (1, 2, 15, 16, 17, 33, 100):
        with Sampler(vocab) as sampler:
            for _ in range(50):
                logits = rng.integers(-3, 3, vocab).astype(np.float32)
                logits[rng.random(vocab) < 0.3] = -np.inf
                settings = sampling(temperature=0)
                assert sampler.choose(settings, logits, history()) == logits.argmax()


# Speculation

SPECULATION = [
    {},
    {"temperature": 0.7, "top_k": 4},
    {"top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.15, "presence_penalty": 0.7, "repetition_penalty": 1.4},
]


@contextmanager
def _speculation(settings, seed):
    """Sampler, settings, text, logits and draft logits, and the distributions p and q."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, 7).astype(np.float32)
    draft_logits = (logits + rng.normal(0, 1.2, 7)).astype(np.float32)
    text = history([0, 1, 2, 1], 2)
    made = sampling(seed=seed, **settings)
    truncation = {
        name: settings[name]
        for name in ("temperature", "top_k", "top_p", "min_p")
        if name in settings
    }
    with Sampler(7) as sampler:
        p, q = (
            expected_distribution(sampler.adjust(made, row, text), **truncation)
            for row in (logits, draft_logits)
        )
        yield sampler, made, text, logits, draft_logits, p, q


@pytest.mark.parametrize("case", range(len(SPECULATION)))
def test_verified_drafts_have_the_distribution(case):
    """200,000 drafts and their verification give p; two broken rules are refused."""
    count = 200_000
    with _speculation(SPECULATION[case], 31 + case) as made:
        sampler, settings, text, logits, draft_logits, p, q = made
        right, always, redrawn, accepts = (np.zeros(7, np.int64) for _ in range(4))
        logits, draft_logits = (ct.c_void_p(x.ctypes.data) for x in (logits, draft_logits))
        text = ct.byref(text)
        for settings.sample in range(count):
            draft = sampler.choose(settings, draft_logits, text, DRAFT)
            accepted, token = sampler.verify(settings, logits, draft_logits, draft, text)
            right[token] += 1
            always[draft] += 1
            accepts[draft] += accepted
            again = draft if accepted else sampler.choose(settings, logits, text, RESIDUAL)
            redrawn[again] += 1
            assert accepted or token != draft
    assert g_test(right, p) > LEVEL
    assert g_test(always, q) > LEVEL
    # Accepted drafts have min(p, q), and nothing else is accepted.
    rate = np.minimum(p, q)
    assert (
        g_test(np.append(accepts, count - accepts.sum()), np.append(rate, 1 - rate.sum())) > LEVEL
    )
    for broken in (always, redrawn):
        assert broken[p == 0].sum() > 0 or g_test(broken, p) < LEVEL


def test_verification_of_equal_and_disjoint_distributions():
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, 130).astype(np.float32)
    text = history([1])
    with Sampler(130) as sampler:
        for truncation in ({}, {"top_k": 9}, {"top_p": 0.9}):
            settings = sampling(seed=2, **truncation)
            for settings.sample in range(500):
                draft = sampler.choose(settings, logits, text, DRAFT)
                assert sampler.verify(settings, logits, logits, draft, text) == (True, draft)
        settings = sampling(seed=2, top_k=5)
        p = expected_distribution(logits, top_k=5)
        counts = np.zeros(130, np.int64)
        for settings.sample in range(5000):
            draft = sampler.choose(settings, -logits, text, DRAFT)
            accepted, token = sampler.verify(settings, logits, -logits, draft, text)
            assert not accepted
            counts[token] += 1
        assert g_test(counts, p) > LEVEL


def test_greedy_verification():
    rng = np.random.default_rng(6)
    settings = sampling(temperature=0, repetition_penalty=3)
    with Sampler(30) as sampler:
        for _ in range(200):
            logits, draft_logits = rng.normal(0, 2, (2, 30)).astype(np.float32)
            text = history(rng.integers(0, 30, 20), 9, banned=[4])
            token = sampler.choose(settings, logits, text)
            assert token == sampler.adjust(settings, logits, text).argmax()
            for draft in (token, (token + 1) % 30):
                found = sampler.verify(settings, logits, draft_logits, draft, text)
                assert found == (draft == token, token)


# Settings and memory

GOOD = [
    {"temperature": 0.0},
    {"temperature": 1e6},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5},
    {"top_k": 2**31 - 1},
    {"top_p": 1e-45},
    {"min_p": 1.0},
    {"repetition_penalty": 1e-45},
    {"repetition_penalty": 3e38},
    {"presence_penalty": -100.0, "frequency_penalty": 100.0},
    {"bias": [(9, 1e6), (0, -1e6), (4, 0.0)]},
    {"bias": [(i, 1.0) for i in range(10)]},
]
BAD = [
    ({"temperature": -0.1}, "temperature must lie between 0 .* and 1e6, got -0.1"),
    ({"temperature": math.nan}, "temperature .* got nan"),
    ({"temperature": math.inf}, "temperature .* got inf"),
    ({"temperature": 2e6}, r"temperature .* got 2e\+06"),
    ({"top_k": -1}, "top_k must be positive, or 0 for no limit, got -1"),
    ({"top_p": 0.0}, "top_p must lie above 0 .* got 0"),
    ({"top_p": 1.1}, "top_p .* got 1.1"),
    ({"top_p": math.nan}, "top_p .* got nan"),
    ({"min_p": -0.1}, "min_p must lie between 0 .* got -0.1"),
    ({"min_p": 1.1}, "min_p .* got 1.1"),
    ({"min_p": math.nan}, "min_p .* got nan"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 .* got 0"),
    ({"repetition_penalty": -1.0}, "repetition_penalty .* got -1"),
    ({"repetition_penalty": math.inf}, "repetition_penalty .* got inf"),
    ({"repetition_penalty": math.nan}, "repetition_penalty .* got nan"),
    ({"presence_penalty": 100.5}, "presence_penalty must lie between -100 and 100 .* got 100.5"),
    ({"presence_penalty": math.nan}, "presence_penalty .* got nan"),
    ({"frequency_penalty": -101.0}, "frequency_penalty must lie .* got -101"),
    ({"frequency_penalty": math.inf}, "frequency_penalty .* got inf"),
    ({"bias": [(10, 1.0)]}, "logit_bias: tokens must lie between 0 and 9, got 10"),
    ({"bias": [(-1, 1.0)]}, "logit_bias: tokens .* got -1"),
    ({"bias": [(3, math.inf)]}, "logit_bias of token 3 must lie .* got inf"),
    ({"bias": [(3, math.nan)]}, "logit_bias of token 3 .* got nan"),
    ({"bias": [(3, -2e6)]}, r"logit_bias of token 3 .* got -2e\+06; -1e6 keeps"),
    ({"bias": [(3, 1.0), (1, 1.0), (3, 2.0)]}, "logit_bias must name a token once, token 3"),
    ({"bias": [(3, 1.0), (3, 1.0)]}, "logit_bias must name a token once, token 3"),
    ({"bias": [(i % 10, 1.0) for i in range(11)]}, "logit_bias must have .* 10 .*, got 11"),
]


def _check(settings):
    call = function("ee_sampling_check", ct.c_int, ct.c_void_p, ct.c_int32)
    return call(ct.byref(settings), 10)


@pytest.mark.parametrize("fields", GOOD)
def test_good_settings(fields):
    assert _check(sampling(**fields)) == OK


@pytest.mark.parametrize("fields,message", BAD)
def test_bad_settings(fields, message):
    assert _check(sampling(**fields)) == INVALID
    with pytest.raises(ValueError, match=message):
        raise ValueError(function("ee_last_error", ct.c_char_p)().decode())


def test_memory():
    """Nothing is allocated but on creation, and all of that goes back."""
    stats = _core.alloc_stats()
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 500).astype(np.float32)
    text = history(rng.integers(0, 500, 100), 20, banned=[3])
    with Sampler(500) as sampler:
        made = _core.alloc_stats()
        assert made[0] == stats[0] + 1
        assert made[2] - stats[2] >= 500 * (3 * 4 + 4 + 2 * 8)
        for truncation in TRUNCATIONS:
            settings = sampling([(3, 1.0)], **truncation)
            settings.repetition_penalty, settings.frequency_penalty = 1.2, 0.5
            assert _check(settings) == OK
            draft = sampler.choose(settings, -logits, text, DRAFT)
            sampler.verify(settings, logits, -logits, draft, text)
        for name in ("seen", "count"):
            array = (ct.c_int32 * 500).from_address(getattr(sampler.memory, name))
            assert not any(array)
        assert _core.alloc_stats() == made
    assert _core.alloc_stats()[1:] == stats[1:]
    function("ee_alloc_fail_at", None, ct.c_uint64)(1)
    failed = Sampler(500)
    assert failed.status == NOMEM
    assert b"the memory for choosing tokens" in function("ee_last_error", ct.c_char_p)()
    failed.__exit__()
    assert _core.alloc_stats()[1:] == stats[1:]


# In an engine


@pytest.fixture(scope="module")
def model():
    core, wide, _ = make("softcaps")
    return core, wide


def _counts(core, prompt, **settings):
    """How often each token comes first in SAMPLES samples of one prompt."""
    engine = _core.Engine(core, max_sequences=64)
    counts = np.zeros(VOCAB, np.int64)
    for start in range(0, SAMPLES, 64):
        for sample in range(start, min(start + 64, SAMPLES)):
            engine.add(prompt, max_new_tokens=1, sample=sample, **settings)
        while engine.active:
            counts += np.bincount(engine.step()["token"], minlength=VOCAB)
    assert counts.sum() == SAMPLES
    return counts


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 3.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": 100},
    ],
)
def test_distribution(model, settings):
    core, wide = model
    prompt = random_tokens(4, 6)
    logits = wide.logits(prompt)[-1, -1]
    counts = _counts(core, prompt, seed=11, engine="full", **settings)
    assert g_test(counts, expected_distribution(logits, **settings)) > LEVEL
    # Another temperature is told apart.
    wrong = {**settings, "temperature": settings["temperature"] * 1.5}
    wrong = expected_distribution(logits, **wrong)
    if (wrong > 0).sum() > 1:
        assert counts[wrong == 0].sum() > 0 or g_test(counts, wrong) < LEVEL


def test_low_temperature_is_greedy(model):
    core, _ = model
    prompt = random_tokens(4, 6)
    cold = run(core, prompt, 30, temperature=1e-6, seed=3)
    assert same(cold, run(core, prompt, 30))


def test_keys(model):
    """A text depends on its seed and its number, not on its neighbours, slot or engine."""
    core, _ = model
    prompt = random_tokens(4, 6)
    settings = {"temperature": 1.0, "top_p": 0.95}
    alone = [run(core, prompt, 30, seed=5, sample=i, **settings) for i in range(4)]
    assert len({each["token"].tobytes() for each in alone}) == 4
    engine = _core.Engine(core, max_sequences=6)
    numbers = {
        i: engine.add(prompt, max_new_tokens=30, seed=5, sample=i, **settings) for i in (3, 1)
    }
    engine.step()
    # Events handed out above are the first ones of samples 3 and 1.
    numbers |= {
        i: engine.add(prompt, max_new_tokens=30, seed=5, sample=i, **settings) for i in (2, 0)
    }
    found = {i: [] for i in numbers}
    back = {number: i for i, number in numbers.items()}
    while engine.active:
        for event in engine.step():
            found[back[int(event["sequence"])]].append(event["token"])
    for i, tokens in found.items():
        assert tokens == alone[i]["token"].tolist()[-len(tokens) :]
        assert len(tokens) >= 29
    full = run(core, prompt, 30, seed=5, sample=2, engine="full", **settings)
    assert same(full, alone[2])
    assert not same(run(core, prompt, 30, seed=6, sample=2, **settings), alone[2])


def test_logprob_and_confidence_are_raw(model):
    """Both belong to the raw logits, whatever the temperature; the exit decides by them too."""
    core, wide = model
    prompt = random_tokens(4, 6)
    thresholds = thresholds_for(wide, random_tokens(5, 60))
    events = run(core, prompt, 40, temperature=2.0, seed=1, thresholds=thresholds)
    text = np.concatenate([prompt, events["token"]])[:-1]
    p = softmax(wide.logits(text)[:, len(prompt) - 1 :])
    at = np.arange(40)
    assert np.abs(events["confidence"] - p.max(-1)[events["exit"], at]).max() < 1e-5
    assert np.abs(events["logprob"] - np.log(p[events["exit"], at, events["token"]])).max() < 1e-4
    early = events["exit"] < len(thresholds)
    assert early.any() and not early.all()
    assert (events["confidence"][early] >= np.float32(thresholds)[events["exit"][early]]).all()
    assert (events["token"] != p.argmax(-1)[events["exit"], at]).any()
    greedy = drain(engine := _core.Engine(core), [engine.add(prompt, max_new_tokens=3)])[0]
    assert np.abs(np.exp(greedy["logprob"]) - greedy["confidence"]).max() < 1e-6
