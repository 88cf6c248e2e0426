"""Decoding against brute force: by the engine itself from scratch (to the bit) and in float64."""

import numpy as np
import pytest

from eellm import _core
from tests.infer.models import (
    CASES,
    SIZES,
    drain,
    isas,
    make,
    random_tokens,
    run,
    same,
    thresholds_for,
)
from tests.infer.reference import Reference, softmax

PROMPT, COUNT = 9, 32


def _settings(case, seed=0, **changes):
    core, wide, narrow = make(case, seed, **changes)
    prompt = random_tokens(seed + 1, PROMPT)
    text = np.concatenate([prompt, run(core, prompt, COUNT, engine="full")["token"]])
    return core, wide, narrow, prompt, thresholds_for(wide, text[:-1])


def _undecided(wide, narrow, prompt, events, thresholds):
    """Checks every event against float64 and returns how many lie too near a tie to tell.

    The bound on our rounding is twice what NumPy's float32 errs on the same text.
    """
    text = np.concatenate([prompt, events["token"]])[:-1]
    exact = wide.logits(text)
    bound = 2 * np.abs(narrow.logits(text) - exact).max()
    exact = exact[:, len(prompt) - 1 :]
    confidence = softmax(exact).max(-1)
    # d p = p (1 - p) (difference of two logit errors), and the rounding of p itself.
    slack = bound / 2 + 2.0**-22
    unsure = 0
    for i, event in enumerate(events):
        expected = len(exact) - 1
        for e, threshold in enumerate(thresholds):
            if threshold < 1 and abs(confidence[e, i] - threshold) <= slack:
                expected = None
                break
            if threshold < 1 and confidence[e, i] >= threshold:
                expected = e
                break
        row = np.sort(exact[event["exit"], i])
        if expected is None or row[-1] - row[-2] <= 2 * bound:
            unsure += 1
            continue
        assert event["exit"] == expected
        assert event["token"] == exact[expected, i].argmax()
        assert abs(event["confidence"] - confidence[expected, i]) <= slack
        logprob = np.log(softmax(exact[expected, i])[event["token"]])
        assert abs(event["logprob"] - logprob) <= 2 * bound + 2.0**-21 * (1 + abs(logprob))
    return unsure


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_deferred", [0, 3, 15])
def test_from_scratch_to_the_bit(case, max_deferred):
    core, _, _, prompt, thresholds = _settings(case)
    options = {"thresholds": thresholds, "max_deferred": max_deferred}
    events = run(core, prompt, COUNT, **options)
    text = prompt
    for event in events:
        # The prompt runs at full depth, so nothing here has ever been deferred.
        (fresh,) = run(core, text, 1, thresholds=thresholds)
        for field in ("token", "exit", "confidence", "logprob"):
            assert event[field].tobytes() == fresh[field].tobytes()
        text = np.append(text, event["token"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_float64(case, seed):
    core, wide, narrow, prompt, thresholds = _settings(case, seed)
    exits = set()
    for share in (1.0, 0.0, None):
        chosen = thresholds if share is None else [share] * len(thresholds)
        events = run(core, prompt, COUNT, thresholds=chosen)
        exits |= set(events["exit"])
        assert _undecided(wide, narrow, prompt, events, chosen) <= COUNT // 10
    assert len(exits) >= min(len(thresholds) + 1, 3)


@pytest.mark.parametrize("seed", range(60))
def test_random_configs(seed):
    """Options mixed at random: float64, from scratch to the bit, and beside other sequences."""
    core, wide, narrow = make(seed)
    vocab = wide.c["vocab_size"]
    prompt = random_tokens(seed, 1 + seed % 12, vocab)
    text = random_tokens(seed + 1, 40, vocab)
    settings = {"thresholds": thresholds_for(wide, text), "max_deferred": seed % 6}
    events = run(core, prompt, COUNT, **settings)
    assert _undecided(wide, narrow, prompt, events, settings["thresholds"]) <= COUNT // 4
    (fresh,) = run(core, np.concatenate([prompt, events["token"][:-1]]), 1, **settings)
    for field in ("token", "exit", "confidence", "logprob"):
        assert events[-1][field].tobytes() == fresh[field].tobytes()
    engine = _core.Engine(core, max_sequences=3)
    engine.add(text, max_new_tokens=50, thresholds=[0.1], temperature=1.0)
    engine.step()
    number = engine.add(prompt, max_new_tokens=COUNT, **settings)
    found = []
    while engine.active:
        found.extend(event for event in engine.step() if event["sequence"] == number)
    assert same(np.array(found), events)


def test_float64_notices_a_fault():
    core, wide, narrow, prompt, thresholds = _settings("window")
    events = run(core, prompt, COUNT, thresholds=thresholds)
    faults = [
        {"window": [w + (w > 0) for w in wide.c["window"]]},
        {"rope_interleaved": True},
        {"norm_eps": 1e-2},
        {"exits": [{**e, "norm": "final"} for e in wide.c["exits"]]},
        {"exits": [{**e, "before": True, "branch": "none"} for e in wide.c["exits"]]},
    ]
    for fault in faults:
        broken = Reference({**wide.c, **fault}, wide.p)
        with pytest.raises(AssertionError):
            _undecided(broken, narrow, prompt, events, thresholds)
            # A fault may also drown in the bound; then the texts must still differ somewhere.
            text = np.concatenate([prompt, events["token"]])[:-1]
            assert np.abs(broken.logits(text) - wide.logits(text)).max() == 0


@pytest.mark.parametrize("case", CASES)
def test_threshold_one_is_full_depth(case):
    core, _, _, prompt, thresholds = _settings(case)
    full = run(core, prompt, COUNT, engine="full")
    assert same(run(core, prompt, COUNT, thresholds=[1.0] * len(thresholds)), full)
    assert same(run(core, prompt, COUNT), full)
    # The engine `full` looks at no exit, whatever the thresholds.
    assert same(run(core, prompt, COUNT, engine="full", thresholds=[0.0]), full)
    if thresholds:
        assert not same(run(core, prompt, COUNT, thresholds=thresholds), full)


@pytest.mark.parametrize("case", ["llama_heads", "parallel", "gpt2_mlp", "qk_norm"])
def test_bits_do_not_depend_on_company(case):
    core, _, _, _, thresholds = _settings(case)
    prompts = [random_tokens(10 + i, 1 + 7 * i % 40) for i in range(17)]
    settings = [
        {
            "thresholds": [[1.0] * len(thresholds), thresholds, [0.0] * len(thresholds)][i % 3],
            "max_deferred": (0, 2, 15)[i // 3 % 3],
            "max_new_tokens": 8 + i,
            "engine": "full" if i == 5 else "deferred",
            "temperature": 0.8 * (i % 2),
            "seed": i,
        }
        for i in range(17)
    ]
    engine = _core.Engine(core, max_sequences=17)
    numbers, events = [], {}
    for i, (prompt, setting) in enumerate(zip(prompts, settings, strict=True)):
        numbers.append(engine.add(prompt, **setting))
        if i % 4 == 3:  # sequences come while others are under way
            for event in engine.step():
                events.setdefault(int(event["sequence"]), []).append(event)
    for number, rest in zip(numbers, drain(engine, numbers), strict=True):
        events[number] = np.array([*events.get(number, []), *rest])
    for number, prompt, setting in zip(numbers, prompts, settings, strict=True):
        assert same(events[number], drain_alone(core, prompt, setting))


def drain_alone(core, prompt, setting):
    engine = _core.Engine(core)
    return drain(engine, [engine.add(prompt, **setting)])[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama_heads", "gpt2_mlp", "softcaps", "grouped_odd"])
def test_bits_do_not_depend_on_threads_or_instructions(case, dtype):
    runs = []
    prompt = random_tokens(3, 70)
    for isa in isas():
        for threads in (1, 2, 3):
            core, _, _ = make(case, threads=threads, isa=isa)
            runs.append(run(core, prompt, COUNT, thresholds=[0.6], dtype=dtype))
    assert all(same(each, runs[0]) for each in runs)
    core, _, _ = make(case, seed=1)
    assert not same(run(core, prompt, COUNT, thresholds=[0.6], dtype=dtype), runs[0])


@pytest.mark.parametrize("case", ["llama_heads", "window"])
def test_long_prompts_come_in_pieces(case):
    """A prompt longer than a step reads, alone and beside another one, against float64."""
    core, wide, narrow = make(case, max_position_embeddings=700)
    prompt = random_tokens(5, 600)
    exits = len(wide.c["exits"])
    alone = run(core, prompt, 12, thresholds=[0.5])
    assert _undecided(wide, narrow, prompt, alone, [0.5] * exits) <= 2
    engine = _core.Engine(core, max_sequences=2)
    numbers = [engine.add(random_tokens(6, 333), max_new_tokens=40, thresholds=[0.5])]
    numbers.append(engine.add(prompt, max_new_tokens=12, thresholds=[0.5]))
    assert same(drain(engine, numbers)[1], alone)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_float32_of_rounded_weights(case):
    core, wide, _ = make(case)
    rounded, _, _ = make(case)
    for row in rounded.table:
        if len(row["shape"]) == 2 and row["name"] != "model.embed_positions.weight":
            view = np.asarray(rounded.parameter(row["name"]))
            bits = view.view(np.uint32).astype(np.uint64)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
            view[...] = bits.astype(np.uint32).view(np.float32)
    prompt = random_tokens(2, PROMPT)
    thresholds = thresholds_for(wide, prompt)
    narrow = run(core, prompt, COUNT, thresholds=thresholds, dtype="bfloat16")
    assert same(narrow, run(rounded, prompt, COUNT, thresholds=thresholds))
    assert not same(narrow, run(core, prompt, COUNT, thresholds=thresholds))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_deferred", [2, 15])
def test_cache_is_that_of_the_full_run(case, max_deferred):
    core, wide, narrow, prompt, thresholds = _settings(case)
    names = [f"model.layers.{layer}.self_attn" for layer in range(SIZES["num_hidden_layers"])]
    for i, each in enumerate(wide.c["exits"]):
        if each["branch"] == "block":
            names.append(f"exits.{i}.block.self_attn")
    layers = len(names)
    text = np.concatenate([prompt, run(core, prompt, COUNT, thresholds=thresholds)["token"]])
    other = _core.Engine(core)
    reference = other.add(text, max_new_tokens=2, engine="full")
    other.step()
    wanted = [other._cache(reference, layer) for layer in range(layers)]
    wide.logits(text)
    narrow.logits(text)
    for pair, name in zip(wanted, names, strict=True):
        found, exact, rounded = (np.array(each) for each in (pair, wide.kv[name], narrow.kv[name]))
        error = np.linalg.norm(found - exact)
        assert error <= 2 * np.linalg.norm(rounded - exact) + 2.0**-24 * np.linalg.norm(exact)

    engine = _core.Engine(core)
    options = {"thresholds": thresholds, "max_deferred": max_deferred}
    number = engine.add(prompt, max_new_tokens=COUNT + 1, **options)
    partly = 0
    for i in range(COUNT):
        (event,) = engine.step()
        assert event["token"] == text[PROMPT + i]
        fills = []
        for layer in range(layers):
            k, v = engine._cache(number, layer)
            fills.append(len(k))
            assert k.tobytes() == wanted[layer][0][: len(k)].tobytes()
            assert v.tobytes() == wanted[layer][1][: len(v)].tobytes()
        if event["exit"] == len(thresholds):
            assert set(fills) == {PROMPT + i}
        partly += min(fills) < PROMPT + i
        if event["exit"] == len(thresholds) or wide.c["exits"][event["exit"]]["layer"] > 1:
            assert max(fills) == PROMPT + i
        assert max(fills) - min(fills) <= max_deferred
    assert partly > 0 or not thresholds


@pytest.mark.parametrize("max_deferred", [0, 1, 4, 15])
def test_cap_forces_full_passes(max_deferred):
    core, _, _ = make("llama")
    engine = _core.Engine(core)
    number = engine.add(
        random_tokens(1, 5), max_new_tokens=60, thresholds=[0.0], max_deferred=max_deferred
    )
    last = SIZES["num_hidden_layers"] - 1
    for i in range(50):
        (event,) = engine.step()
        assert event["exit"] == 0
        rows = 5 + i
        behind = (i + 1) % (max_deferred + 1)
        assert len(engine._cache(number, 0)[0]) == rows
        assert len(engine._cache(number, last)[0]) == rows - behind


def _half_layers(exits, events, max_deferred):
    """What the rule costs: each row runs each half layer once, and none that nobody needs."""
    end = 2 * SIZES["num_hidden_layers"]
    depths = [_depth(each) for each in exits] + [end]
    filled = end if any(e["branch"] == "block" and _depth(e) == end for e in exits) else end - 1
    total, deferred = (PROMPT - 1) * filled, []
    for event in events:
        depth = depths[event["exit"]]
        runs_on = event["exit"] == len(exits) or len(deferred) >= max_deferred
        goal = filled if runs_on and not (event["done"] and event["exit"] < len(exits)) else depth
        total += max(depth, goal)
        total += sum(max(0, min(goal, filled) - each) for each in deferred)
        deferred = [max(each, goal) for each in [*deferred, depth]]
        if goal >= filled:
            deferred = []
    return total


def _depth(exit):
    if exit["branch"] == "mlp":
        return 2 * exit["layer"] - 1
    return 2 * exit["layer"] - 2 * exit["before"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_deferred", [0, 4, 15])
def test_no_layer_is_computed_twice(case, max_deferred):
    core, wide, _, prompt, thresholds = _settings(case)
    for options in ({"engine": "full"}, {"thresholds": thresholds}, {"thresholds": [0.0]}):
        for count in (COUNT, COUNT - 3):
            engine = _core.Engine(core)
            options = {**options, "max_deferred": max_deferred, "max_new_tokens": count}
            events = drain(engine, [engine.add(prompt, **options)])[0]
            wanted = _half_layers(wide.c["exits"], events, max_deferred)
            assert engine.stats["half_layers"] == wanted
