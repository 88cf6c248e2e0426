"""Scores of given text, and the final exit's view of tokens that left early."""

import numpy as np
import pytest

from eellm import _core
from tests.infer import rules
from tests.infer.models import (
    CASES,
    Scratch,
    drain,
    follow,
    make,
    random_tokens,
    run,
    same,
    score,
    thresholds_for,
)
from tests.infer.reference import softmax

COUNT = 24


def _check_scores(events, text, wide, narrow):
    """Every number that scoring gives, against float64."""
    exact = wide.logits(text)[:, :-1]
    bound = 2 * np.abs(narrow.logits(text)[:, :-1] - exact).max()
    assert (events["kind"] == rules.SCORE).all()
    assert events["position"].tolist() == list(range(1, len(text)))
    assert events["token"].tolist() == text[1:].tolist()
    assert (events["exit"] == len(exact) - 1).all()
    assert events["done"].tolist() == [0] * (len(text) - 2) + [rules.LENGTH]
    said = events["exits"].T
    assert np.abs(said["confidence"] - softmax(exact).max(-1)).max() <= bound / 2 + 2.0**-22
    logprob = np.log(softmax(exact))[:, np.arange(len(text) - 1), text[1:]]
    slack = 2 * bound + 2.0**-21 * (1 + np.abs(logprob))
    assert (np.abs(said["logprob"] - logprob) <= slack).all()
    second, first = np.moveaxis(np.sort(exact)[..., -2:], -1, 0)
    clear = first - second > 2 * bound
    assert clear.mean() > 0.9
    assert (said["token"] == exact.argmax(-1))[clear].all()
    for name in ("confidence", "logprob"):
        assert events[name].tobytes() == said[name][-1].tobytes()


@pytest.mark.parametrize("case", CASES)
def test_scores(case):
    core, wide, narrow = make(case)
    for length in (2, 3, 41):
        text = random_tokens(length, length)
        events = score(core, text)
        _check_scores(events, text, wide, narrow)
        # To the bit: each prefix is the prompt of an engine of its own.
        assert same(
            events, rules.as_array(rules.scored(Scratch(core, text[:1]), text), wide_count(wide))
        )


def wide_count(wide):
    return len(wide.c["exits"]) + 1


@pytest.mark.parametrize("length", [2, 63, 64, 65, 66, 255, 256, 257, 258, 300])
def test_lengths(length):
    core, wide, narrow = make("llama_heads", max_position_embeddings=300)
    text = random_tokens(length, length)
    events = score(core, text)
    _check_scores(events, text, wide, narrow)
    # A row knows only what stands before it.
    half = score(core, text[: length // 2 + 2])
    assert same(half[:-1], events[: len(half) - 1])


def test_scores_notice_a_fault():
    """Negative control: a text that is shifted by one, another exit's numbers, a wrong model."""
    core, wide, narrow = make("llama")
    text = random_tokens(3, 50)
    events = score(core, text)
    _check_scores(events, text, wide, narrow)
    for shift in (-1, 1):
        with pytest.raises(AssertionError):
            _check_scores(events, np.roll(text, shift), wide, narrow)
    for name in ("confidence", "logprob", "token"):
        broken = events.copy()
        broken["exits"][name][:, 0] = events["exits"][name][:, 1]
        with pytest.raises(AssertionError):
            _check_scores(broken, text, wide, narrow)
    other, _, _ = make("llama", seed=1)
    with pytest.raises(AssertionError):
        _check_scores(score(other, text), text, wide, narrow)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_beside_others(dtype):
    """Texts of many lengths at once, among sequences that decode."""
    core, wide, _ = make("gpt2_mlp", max_position_embeddings=300)
    texts = [random_tokens(i, n) for i, n in enumerate((2, 65, 300, 258, 7, 64))]
    alone = [score(core, text, dtype=dtype) for text in texts]
    thresholds = thresholds_for(wide, texts[1])
    decoded = {
        engine: run(core, texts[4], 30, engine=engine, thresholds=thresholds, dtype=dtype)
        for engine in ("deferred", "recompute", "speculative")
    }
    engine = _core.Engine(core, max_sequences=9, dtype=dtype)
    numbers, events = [], []
    for kind in decoded:
        numbers.append(engine.add(texts[4], max_new_tokens=30, engine=kind, thresholds=thresholds))
        events.append(engine.step())
    for text in texts:
        numbers.append(engine.score(text))
        events.append(engine.step())
    found = drain(engine, numbers, events)
    for events, wanted in zip(found, [*decoded.values(), *alone], strict=True):
        assert same(events, wanted)


def test_decoding_says_what_scoring_says():
    """The log-probabilities of a text that was decoded, at every exit."""
    core, wide, _ = make("llama_heads")
    prompt = random_tokens(1, 70)
    thresholds = thresholds_for(wide, prompt)
    options = {"thresholds": thresholds, "all_confidences": True}
    for engine in ("full", "deferred", "recompute", "speculative"):
        events = run(core, prompt, 40, engine=engine, **options)
        scores = score(core, np.concatenate([prompt, events["token"]]))[len(prompt) - 1 :]
        known = np.isfinite(events["exits"]["logprob"])
        assert known.any(1).all()
        for name in ("confidence", "logprob"):
            passed = known if name == "logprob" else np.isfinite(events["exits"][name])
            ours, wanted = events["exits"][name][passed], scores["exits"][name][passed]
            assert ours.tobytes() == wanted.tobytes()


# -- Full depth, later --


def _ways_to_end(core, prompt, options):
    """Settings that end a text by its length, and by a stop token that left early."""
    events = run(core, prompt, COUNT, **options)
    early = [int(t) for t in events["token"][events["exit"] < events["exits"].shape[1] - 1]]
    return [{}, *({"stop_tokens": [token]} for token in early[len(early) // 2 :][:1])]


@pytest.mark.parametrize("engine", ["deferred", "recompute"])
@pytest.mark.parametrize("cap", [0, 1, 4, 15])
@pytest.mark.parametrize("case", CASES)
def test_full_depth(case, cap, engine):
    core, wide, _ = make(case)
    prompt, final = random_tokens(1, 9), len(wide.c["exits"])
    for thresholds in (thresholds_for(wide, random_tokens(2, 40)), [0.0] * final):
        options = {"engine": engine, "thresholds": thresholds, "max_deferred": cap}
        for end in _ways_to_end(core, prompt, options):
            plain = run(core, prompt, COUNT, **options, **end)
            settings = {**options, **end, "full_depth": True, "max_new_tokens": COUNT}
            events = follow(core, wide.c, Scratch(core, prompt), prompt, settings, cache=False)
            _check_full_depth(core, prompt, events, plain, final)


def _check_full_depth(core, prompt, events, plain, final):
    """One event for each token that left early, with what scoring says; the last event is done."""
    tokens, later = (events[events["kind"] == kind] for kind in (rules.TOKEN, rules.FULL_DEPTH))
    for name in ("token", "position", "exit", "confidence", "logprob"):
        assert tokens[name].tobytes() == plain[name].tobytes()
    early = tokens[tokens["exit"] < final]
    assert later["position"].tolist() == early["position"].tolist()
    assert later["token"].tolist() == early["token"].tolist()
    scores = score(core, np.concatenate([prompt, tokens["token"]]))
    scores = scores[np.isin(scores["position"], later["position"])]
    for name in ("token", "confidence", "logprob"):
        assert later[name].tobytes() == scores[name].tobytes()
        assert later["exits"][name][:, -1].tobytes() == scores["exits"][name][:, -1].tobytes()
    assert np.flatnonzero(events["done"]).tolist() == [len(events) - 1]
    # A token is told before the final exit's view of it.
    first = {}
    for i, (position, kind) in enumerate(zip(events["position"], events["kind"], strict=True)):
        assert kind == rules.TOKEN or first[position] < i
        first.setdefault(int(position), i)


@pytest.mark.parametrize("engine", ["deferred", "recompute"])
@pytest.mark.parametrize("steps", [1, 2, 5, 6, 7])
def test_finish(engine, steps):
    """Deferred rows run to the end, others are not disturbed."""
    core, wide, _ = make("llama_heads")
    prompt, shape = random_tokens(1, 9), rules.Shape(wide.c)
    other = run(core, random_tokens(2, 5), 20, thresholds=[0.3])
    settings = {"engine": engine, "thresholds": [0.0], "max_deferred": 5, "max_new_tokens": 50}
    settings["full_depth"] = True
    pool = _core.Engine(core, max_sequences=2)
    number = pool.add(prompt, **settings)
    beside = pool.add(random_tokens(2, 5), max_new_tokens=20, thresholds=[0.3])
    decoder = rules.Decoder(Scratch(core, prompt), shape, prompt, max_length=160, **settings)
    wanted, events = [], []
    for _ in range(steps):
        wanted += decoder.step().events
        events.append(pool.step())
    rest = decoder.finish()
    assert pool.finish(number) == len(rest) == steps % 6
    found, company = drain(pool, [number, beside], events)
    kinds = np.argsort(found["kind"], kind="stable")
    expected = rules.as_array(wanted + rest, wide_count(wide))
    assert same(found[kinds], expected[np.argsort(expected["kind"], kind="stable")])
    assert not rest or found["done"][-1] == rules.FINISHED
    assert same(company, other)
    with pytest.raises(ValueError, match=f"no sequence {number} is in flight"):
        pool.finish(number)


@pytest.mark.parametrize("engine", ["full", "deferred", "recompute", "speculative"])
def test_finish_with_nothing_to_tell(engine):
    core, _, _ = make("llama_heads")
    pool = _core.Engine(core, max_sequences=2)
    beside = pool.add(random_tokens(2, 5), max_new_tokens=9)
    options = {"engine": engine, "thresholds": [0.0], "max_new_tokens": 50}
    # Before the prompt is read, and without full_depth.
    for steps, full_depth in ((0, True), (3, False)):
        number = pool.add(random_tokens(1, 9), full_depth=full_depth, **options)
        for _ in range(steps):
            pool.step()
        assert pool.finish(number) == 0
        with pytest.raises(ValueError, match=f"no sequence {number} is in flight"):
            pool.remove(number)
    assert pool.active == 1
    assert pool.finish(pool.score(random_tokens(1, 9))) == 0
    events = drain(pool, [beside])[0]
    assert events["done"][-1] == rules.LENGTH
    assert pool.active == 0


def test_finish_then_remove():
    core, _, _ = make("llama_heads")
    pool = _core.Engine(core)
    options = {"thresholds": [0.0], "max_new_tokens": 50, "full_depth": True}
    number = pool.add(random_tokens(1, 9), **options)
    for _ in range(3):
        pool.step()
    assert pool.finish(number) == 3
    assert pool.finish(number) == 3  # as before: nothing has run since
    pool.remove(number)
    assert pool.active == 0
    assert len(pool.step()) == 0
    events = drain(pool, [pool.add(random_tokens(1, 9), **options)])[0]
    assert same(events, run(core, random_tokens(1, 9), 50, thresholds=[0.0], full_depth=True))
