"""Sampling: the right distribution, from keys that know nothing of the batch."""

import numpy as np
import pytest

from eellm import _core
from tests.infer.models import SIZES, drain, make, random_tokens, run, same, thresholds_for
from tests.infer.reference import softmax

VOCAB = SIZES["vocab_size"]
SAMPLES = 6000


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


def _expected(logits, temperature, top_k=0, top_p=1.0):
    """The distribution, after temperature, then top-k, then top-p."""
    scaled = logits / temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: top_k or VOCAB]
    p = softmax(scaled[kept])
    kept = kept[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    result = np.zeros(VOCAB)
    result[kept] = softmax(scaled[kept])
    return result


def _chi_square(counts, p):
    """The statistic, and a bound that a right sampler passes but once in a million."""
    expected = p * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    statistic = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    freedom = max(keep.sum() - 1, 1)
    # Wilson and Hilferty: the cube root is nearly normal; 4.75 deviations.
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 4.75 * np.sqrt(spread)) ** 3


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
    p = _expected(logits, **settings)
    counts = _counts(core, prompt, seed=11, engine="full", **settings)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(p))
    statistic, bound = _chi_square(counts, p)
    assert statistic <= bound
    # Another temperature is told apart.
    wrong = _expected(logits, **{**settings, "temperature": settings["temperature"] * 1.5})
    if (p > 0).sum() > 1:
        statistic, bound = _chi_square(counts, wrong)
        assert statistic > bound


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
