"""Self-speculation: greedy text is that of full depth, sampled text has its exact distribution."""

import itertools

import numpy as np
import pytest

from eellm import _core
from eellm.config import ExitConfig, ModelConfig
from tests.infer import rules
from tests.infer.models import (
    CASES,
    drain,
    fill,
    make,
    random_tokens,
    run,
    same,
    thresholds_for,
)
from tests.infer.reference import Reference

PROMPT, COUNT = 9, 40
PROMPTS = [random_tokens(i, PROMPT) for i in range(2)]


# -- Greedy --


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_that_of_full_depth(case):
    core, wide, _ = make(case)
    prompt = random_tokens(1, PROMPT)
    full = run(core, prompt, COUNT, engine="full")
    chosen = thresholds_for(wide, np.concatenate([prompt, full["token"]])[:-1])
    accepted = rejected = 0
    for thresholds in (chosen, [0.0], [1.0]):
        for cap in (0, 1, 2, 5, 15, 20):
            engine = _core.Engine(core)
            options = {"thresholds": thresholds, "max_deferred": cap, "max_new_tokens": COUNT}
            events = drain(engine, [engine.add(prompt, engine="speculative", **options)])[0]
            for name in ("kind", "position", "token", "logprob", "done"):
                assert events[name].tobytes() == full[name].tobytes()
            stats, final = engine.stats, len(wide.c["exits"])
            assert stats["accepted"] == (events["exit"] < final).sum()
            assert stats["accepted"] <= stats["drafts"]
            accepted += stats["accepted"]
            rejected += stats["drafts"] - stats["accepted"]
            if cap == 0 or thresholds == [1.0]:
                assert same(events, full)
                assert stats["drafts"] == 0
    assert rejected > 0 or not wide.c["exits"]
    assert accepted > 0 or case in ("no_exits", "no_positions")


def test_drafts_share_steps():
    """Accepted drafts come together with the token of the row that verified them."""
    core, _, _ = make("llama")
    engine = _core.Engine(core)
    # One draft more than verified ones can't be: replay accepts all of them.
    number = engine.add(
        random_tokens(1, PROMPT),
        max_new_tokens=24,
        engine="speculative",
        thresholds=[0.0],
        max_deferred=3,
        replay=np.ones(24, np.int32),
    )
    counts = []
    while engine.active:
        counts.append(len(engine.step()))
    assert counts == [0, 0, 0, 4] * 6
    assert engine.stats["drafts"] == engine.stats["accepted"] == 18
    with pytest.raises(ValueError, match="no sequence"):
        engine.remove(number)


def test_replayed_acceptance():
    core, wide, _ = make("llama_heads")
    prompt = random_tokens(1, PROMPT)
    replay = random_tokens(3, 30, 2)
    events = run(
        core, prompt, 30, engine="speculative", thresholds=[0.0], max_deferred=2, replay=replay
    )
    final = len(wide.c["exits"])
    behind = 0
    for i, event in enumerate(events):
        # The token after two drafts, and the last one, are not drafted.
        drafted = behind < 2 and i < 29
        assert (event["exit"] < final) == (drafted and bool(replay[i]))
        behind = behind + 1 if drafted and replay[i] else 0
        text = np.concatenate([prompt, events["token"][:i]])
        exit = event["exit"] if event["exit"] < final else -1
        (fresh,) = run(core, text, 1, engine="full", all_confidences=True)
        assert event["token"] == fresh["exits"]["token"][exit]


def test_many_drafts():
    """More rows than an output matrix takes at a time are verified in one pass."""
    core, _, _ = make("llama", max_position_embeddings=400)
    options = {"engine": "speculative", "thresholds": [0.0], "max_deferred": 150}
    # Drafts that are all accepted are the tokens of the exit.
    replay = np.ones(200, np.int32)
    events = run(core, PROMPTS[0], 200, replay=replay, **options)
    deferred = run(core, PROMPTS[0], 150, thresholds=[0.0])
    for name in ("token", "exit", "confidence"):
        assert events[name][:150].tobytes() == deferred[name].tobytes()
    assert np.flatnonzero(events["exit"] > 0).tolist() == [150, 199]
    full = run(core, PROMPTS[0], 200, engine="full")
    assert run(core, PROMPTS[0], 200, **options)["token"].tolist() == full["token"].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_exit_that_is_the_final_one(temperature):
    """The head of the final exit as an early one behind the last layer: every draft is accepted."""
    exits = [ExitConfig(4, norm="final", output="final")]
    core, _, _ = make("llama", exits=exits)
    options = {"temperature": temperature, "top_p": 0.95, "frequency_penalty": 0.3, "seed": 3}
    for cap in (1, 4):
        engine = _core.Engine(core)
        settings = {**options, "engine": "speculative", "thresholds": [0.0], "max_deferred": cap}
        events = drain(engine, [engine.add(PROMPTS[0], max_new_tokens=COUNT, **settings)])[0]
        assert engine.stats["drafts"] == engine.stats["accepted"] >= COUNT // 2
        # Every so many tokens, and at the end, one comes with the verification.
        final = [(i + 1) % (cap + 1) == 0 for i in range(COUNT - 1)] + [True]
        assert events["exit"].tolist() == [int(each) for each in final]


@pytest.mark.parametrize("case", CASES)
def test_sampling_with_nothing_to_choose(case):
    """Of one token that is left, and of logits that are far apart, speculation makes full depth's
    text, drawn or not."""
    core, _, _ = make(case)
    for penalties in ({}, {"repetition_penalty": 1.5, "logit_bias": {2: 1.0}}):
        for choice in (
            {"temperature": 1.0, "top_k": 1},
            {"temperature": 1.0, "top_p": 1e-6},
            {"temperature": 2.0, "min_p": 1.0},
            {"temperature": 1e-6},
        ):
            options = {**penalties, "engine": "full"}
            full = run(core, PROMPTS[1], COUNT, **options)
            drawn = run(core, PROMPTS[1], COUNT, **options, **choice)
            assert same(full, drawn)
            options |= {"engine": "speculative", "thresholds": [0.1], "max_deferred": 4}
            drawn = run(core, PROMPTS[1], COUNT, **options, **choice)
            assert drawn["token"].tolist() == full["token"].tolist()
            assert same(drawn, run(core, PROMPTS[1], COUNT, **options))


# -- Sampled: three tokens of a tiny model, all texts enumerated --

VOCAB, DRAWS, LENGTH, AT_ONCE = 6, 200_000, 3, 200


def _tiny(scale):
    """A model whose exit differs from the final one; `scale` of the exit's matrix says how much."""
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        exits=[ExitConfig(1, output="own")],
    )
    core = _core.Model(config.to_core(), threads=1)
    fill(core, 3, scale=0.6)
    np.asarray(core.parameter("exits.0.head.weight"))[...] *= scale
    parameters = {row["name"]: np.asarray(core.parameter(row["name"])) for row in core.table}
    return core, Reference(config.to_core(), parameters)


def _enumerate(wide, prompt, exit=-1, *, stop_tokens=(), min_new_tokens=0, **sampling):
    """The probability of every text, by float64: {tokens: probability}."""
    found = {}

    def grow(written, probability):
        stopped = written and written[-1] in stop_tokens and len(written) > min_new_tokens
        if len(written) == LENGTH or stopped:
            found[written] = probability
            return
        logits = wide.logits([*prompt, *written])[exit, -1]
        banned = stop_tokens if len(written) < min_new_tokens else ()
        p = rules.distribution(logits, prompt, written, banned=banned, **sampling)
        for token in np.flatnonzero(p):
            grow((*written, int(token)), probability * p[token])

    grow((), 1.0)
    assert abs(sum(found.values()) - 1) < 1e-12
    return found


def _draw(core, prompt, draws=DRAWS, **settings):
    """How often each text comes: {tokens: count}; and the share of accepted drafts."""
    engine = _core.Engine(core, max_sequences=AT_ONCE)
    prompt = np.array(prompt, np.int32)
    totals = np.zeros((VOCAB + 1) ** LENGTH, np.int64)
    for start in range(0, draws, AT_ONCE):
        numbers = [
            engine.add(prompt, max_new_tokens=LENGTH, sample=sample, **settings)
            for sample in range(start, start + AT_ONCE)
        ]
        assert numbers == list(range(numbers[0], numbers[0] + AT_ONCE))
        texts = np.full((AT_ONCE, LENGTH), VOCAB)
        while engine.active:
            events = engine.step()
            texts[events["sequence"] - numbers[0], events["position"] - len(prompt)] = events[
                "token"
            ]
        totals += np.bincount(texts @ (VOCAB + 1) ** np.arange(LENGTH), minlength=totals.size)
    counts = {}
    for text in itertools.product(range(VOCAB + 1), repeat=LENGTH):
        count = totals[np.array(text) @ (VOCAB + 1) ** np.arange(LENGTH)]
        if count:
            counts[tuple(token for token in text if token < VOCAB)] = int(count)
    stats = engine.stats
    return counts, stats["accepted"] / max(stats["drafts"], 1)


def _g_test(counts, expected):
    """The statistic, and the bound that a right sampler passes but once in a thousand."""
    assert set(counts) <= set(expected)
    draws = sum(counts.values())
    pairs = [(counts.get(text, 0), p * draws) for text, p in expected.items()]
    rare = [pair for pair in pairs if pair[1] < 10]
    pairs = [pair for pair in pairs if pair[1] >= 10]
    if sum(pair[1] for pair in rare) >= 10:
        pairs.append((sum(pair[0] for pair in rare), sum(pair[1] for pair in rare)))
    statistic = 2 * sum(count * np.log(count / p) for count, p in pairs if count)
    # Without the cells left out the totals differ a little.
    statistic -= 2 * sum(count - p for count, p in pairs)
    freedom = len(pairs) - 1
    # Wilson and Hilferty: the cube root is nearly normal; 3.09 deviations are one in a thousand.
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 3.0902 * np.sqrt(spread)) ** 3


SETTINGS = {
    "plain": {"temperature": 1.0},
    "truncated": {"temperature": 1.6, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    "penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.6,
        "logit_bias": {1: 0.7, 4: -0.5},
    },
    "stops": {"temperature": 1.3, "stop_tokens": [2, 5], "min_new_tokens": 1, "top_p": 0.95},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_distribution(name):
    """Drafts from the exit whatever its confidence, one or two in a row."""
    core, wide = _tiny(0.3)
    prompt, settings = [3, 1], SETTINGS[name]
    expected = _enumerate(wide, prompt, **settings)
    cap = {"plain": 2, "truncated": 2, "penalties": 1, "stops": 2}[name]
    options = {"engine": "speculative", "thresholds": [0.0], "max_deferred": cap, "seed": 17}
    counts, accepted = _draw(core, prompt, **options, **settings)
    assert 0.2 < accepted < 0.8
    statistic, bound = _g_test(counts, expected)
    assert statistic <= bound


@pytest.mark.parametrize("scale", [0.0, 6.0])
def test_distribution_far_from_the_drafts(scale):
    """An exit that knows nothing, and one that is sure of other tokens."""
    core, wide = _tiny(scale)
    expected = _enumerate(wide, [4], temperature=1.0)
    drafts = _enumerate(wide, [4], 0, temperature=1.0)
    distance = sum(abs(expected[text] - drafts[text]) for text in expected) / 2
    assert distance > 0.4
    options = {"engine": "speculative", "thresholds": [0.0], "temperature": 1.0, "seed": 5}
    counts, accepted = _draw(core, [4], **options)
    assert 0.05 < accepted < 0.8
    statistic, bound = _g_test(counts, expected)
    assert statistic <= bound


def test_distribution_with_thresholds():
    """Whether a token is drafted depends on the text before it: that must not show."""
    core, wide = _tiny(0.3)
    prompt = [3, 1]
    confidences = [
        max(rules.distribution(wide.logits([*prompt, a, b])[0, -1]))
        for a in range(VOCAB)
        for b in range(VOCAB)
    ]
    options = {"engine": "speculative", "thresholds": [float(np.median(confidences))]}
    counts, accepted = _draw(core, prompt, **options, temperature=1.0, seed=23)
    assert 0.1 < accepted < 0.9
    statistic, bound = _g_test(counts, _enumerate(wide, prompt, temperature=1.0))
    assert statistic <= bound


def test_a_broken_rule_is_refused():
    """Negative control: three rules that accept too many drafts."""
    core, wide = _tiny(0.3)
    prompt, settings = [3, 1], SETTINGS["plain"]
    full, drafted = (_enumerate(wide, prompt, exit, **settings) for exit in (-1, 0))
    options = {"thresholds": [0.0], "seed": 17, **settings}
    # Every draft accepted: tokens of the exit, which have the exit's distribution.
    counts, _ = _draw(core, prompt, engine="deferred", **options)
    statistic, bound = _g_test(counts, drafted)
    assert statistic <= bound
    statistic, bound = _g_test(counts, full)
    assert statistic > 2 * bound
    # The first draft accepted, the second one not.
    replay = np.array([1, 0], np.int32)
    counts, _ = _draw(core, prompt, engine="speculative", replay=replay, **options)
    statistic, bound = _g_test(counts, full)
    assert statistic > 2 * bound
    # Every draft accepted in a tenth of the texts.
    counts, _ = _draw(core, prompt, engine="full", draws=180_000, **options)
    mixed, _ = _draw(core, prompt, engine="deferred", draws=20_000, **options)
    statistic, bound = _g_test(counts, full)
    assert statistic <= bound
    for text, count in mixed.items():
        counts[text] = counts.get(text, 0) + count
    statistic, bound = _g_test(counts, full)
    assert statistic > bound


def test_sampled_text_knows_no_company():
    core, _ = _tiny(0.3)
    options = {"engine": "speculative", "thresholds": [0.3], "temperature": 1.0, "seed": 2}
    alone = [run(core, [1, 2], 9, sample=i, **options) for i in range(5)]
    assert len({each["token"].tobytes() for each in alone}) > 1
    engine = _core.Engine(core, max_sequences=5)
    prompt = np.array([1, 2], np.int32)
    numbers, events = [], []
    for i in range(5):
        numbers.append(engine.add(prompt, max_new_tokens=9, sample=i, **options))
        events.append(engine.step())
    for found, wanted in zip(drain(engine, numbers, events), alone, strict=True):
        assert same(found, wanted)
