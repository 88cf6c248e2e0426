"""Every engine against the rules of rules.py, which look at each text from scratch: through our own
full-depth path (to the bit) and in float64 (where no tie is near). Then the engines against one
another, on random models and requests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm import _core
from tests.infer import rules
from tests.infer.models import (
    CASES,
    SIZES,
    Scratch,
    drain,
    follow,
    isas,
    make,
    make_config,
    random_tokens,
    run,
    same,
    thresholds_for,
)

PROMPT, COUNT = 9, 24
EARLY = ("deferred", "recompute", "speculative")
ENGINES = ("full", *EARLY)


def _case(case, seed=0, **changes):
    """A model, its config, a prompt, and thresholds that about 0.4 of its rows reach."""
    core, wide, narrow = make(case, seed, **changes)
    prompt = random_tokens(seed + 1, PROMPT, wide.c["vocab_size"])
    text = np.concatenate([prompt, run(core, prompt, COUNT, engine="full")["token"]])
    return core, wide, narrow, prompt, thresholds_for(wide, text[:-1])


# -- Against the rules, to the bit --

CHOICES = [
    {},
    {"max_deferred": 2},
    {"max_deferred": 0},
    {"share": 0.0},
    {"share": 0.0, "max_deferred": 3, "all_confidences": True},
    {"all_confidences": True, "full_depth": True, "max_deferred": 4},
]


@pytest.mark.parametrize("choice", range(len(CHOICES)))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_to_the_bit(case, engine, choice):
    core, wide, _, prompt, thresholds = _case(case)
    options = {"engine": engine, "max_new_tokens": COUNT, "thresholds": thresholds}
    options |= CHOICES[choice]
    if "share" in options:
        options["thresholds"] = [options.pop("share")] * len(thresholds)
    view = Scratch(core, prompt)
    events = follow(core, wide.c, view, prompt, options, cache=choice < 4)
    tokens = events[events["kind"] == rules.TOKEN]
    assert len(tokens) == COUNT


def test_the_layout_of_events():
    core, _, _ = make("llama")
    assert run(core, [1, 2], 2).dtype == rules.event_dtype(3)
    assert _core.Engine(core).step().dtype == rules.event_dtype(3)
    assert _core.Engine(core).step().shape == (0,)


def test_following_notices_a_fault():
    """Negative control: rules that differ in one place are refused."""
    core, wide, _, prompt, _ = _case("llama")

    class Later(rules.Decoder):
        def _may_draft(self):
            return self.behind < self.cap - 1 and super()._may_draft()

    class Deeper(rules.Shape):
        def __init__(self, config):
            super().__init__(config)
            self.depths[0] += 1

    options = {"max_new_tokens": COUNT, "thresholds": [0.0], "max_deferred": 3}
    view = Scratch(core, prompt)
    for engine, name, fault in (
        ("speculative", "Decoder", Later),
        ("deferred", "Shape", Deeper),
        ("recompute", "Shape", Deeper),
    ):
        follow(core, wide.c, view, prompt, {**options, "engine": engine})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(rules, name, fault)
            follow(core, wide.c, view, prompt, {**options, "engine": engine})


SAMPLING = {
    "temperature": {"temperature": 0.9, "seed": 4, "sample": 2},
    "truncated": {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "seed": 1},
    "penalties": {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "logit_bias": {3: 1.5, 7: -2.0},
    },
    "all": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "top_p": 0.9},
    "minimum": {"min_new_tokens": 11, "stop_tokens": list(range(0, SIZES["vocab_size"], 3))},
}


# Sampled speculation keeps the distribution, not the tokens.
SAMPLED = [
    (engine, kind)
    for engine in ENGINES
    for kind in SAMPLING
    if engine != "speculative" or "temperature" not in SAMPLING[kind]
]


@pytest.mark.parametrize("engine, kind", SAMPLED)
def test_sampling_to_the_bit(engine, kind):
    """The choice depends on the text and the exit alone, whatever the engine."""
    core, wide, _, prompt, thresholds = _case("llama_heads")
    options = {"engine": engine, "max_new_tokens": COUNT, "thresholds": thresholds}
    options |= {"max_deferred": 3, **SAMPLING[kind]}
    events = follow(core, wide.c, Scratch(core, prompt, **options), prompt, options)
    plain = run(core, prompt, COUNT, engine=engine, thresholds=thresholds, max_deferred=3)
    assert events["token"].tolist() != plain["token"].tolist()
    if kind == "minimum":
        stops = set(options["stop_tokens"])
        assert not stops & set(events["token"][:11])
        assert events["done"][-1] == rules.STOP and events["token"][-1] in stops


@pytest.mark.parametrize("engine", EARLY)
def test_min_new_tokens_at_every_length(engine):
    core, wide, _, prompt, thresholds = _case("llama")
    stops = list(range(SIZES["vocab_size"] - 1))
    for least in range(6):
        options = {"engine": engine, "max_new_tokens": 9, "min_new_tokens": least}
        options |= {"thresholds": thresholds, "stop_tokens": stops}
        events = follow(core, wide.c, Scratch(core, prompt, **options), prompt, options)
        # Only one token does not stop: it fills the minimum.
        assert (events["token"][:least] == SIZES["vocab_size"] - 1).all()
        assert least < len(events) or events["token"][least] == SIZES["vocab_size"] - 1


@pytest.mark.parametrize("engine", EARLY)
@pytest.mark.parametrize("case", ["gpt2", "llama_heads", "window", "no_positions"])
def test_stop_tokens(case, engine):
    """Each token of a text as the stop token: it is the last one, wherever it was chosen."""
    core, wide, _, prompt, thresholds = _case(case)
    options = {"engine": engine, "max_new_tokens": COUNT, "thresholds": thresholds}
    view = Scratch(core, prompt)
    events = follow(core, wide.c, view, prompt, options, cache=False)
    for token in np.unique(events["token"]):
        stopped = {**options, "stop_tokens": [int(token)]}
        found = follow(core, wide.c, view, prompt, stopped, cache=False)
        end = int(np.argmax(events["token"] == token))
        assert found["token"].tolist() == events["token"][: end + 1].tolist()
        assert found["done"].tolist() == [0] * end + [rules.STOP]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 127, 129, 255, 256, 257, 258, 259, 515])
def test_prompt_lengths(length):
    """Around the blocks of 64 positions and the 256 prompt rows of a step."""
    core, wide, _ = make("window", max_position_embeddings=540)
    prompt = random_tokens(length, length)
    thresholds = thresholds_for(wide, random_tokens(1, 40))
    view = Scratch(core, prompt)
    for engine in ENGINES:
        options = {"engine": engine, "max_new_tokens": 6, "thresholds": thresholds}
        follow(core, wide.c, view, prompt, {**options, "max_deferred": 2})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_max_length(engine, room):
    core, wide, _, prompt, thresholds = _case("llama")
    options = {"engine": engine, "max_new_tokens": 50, "thresholds": thresholds}
    view = Scratch(core, prompt)
    events = follow(core, wide.c, view, prompt, options, max_length=PROMPT - 1 + room)
    # The token past the last position is still predicted.
    assert len(events) == room
    assert events["done"][-1] == rules.LENGTH


@pytest.mark.parametrize("engine", ["deferred", "recompute"])
def test_many_rows_behind(engine):
    """More rows than an output matrix takes at a time are looked back at in one pass."""
    core, wide, _ = make("llama", max_position_embeddings=400)
    prompt = random_tokens(1, 5)
    options = {"engine": engine, "thresholds": [0.0], "max_deferred": 150, "full_depth": True}
    options |= {"max_new_tokens": 200}
    events = follow(core, wide.c, Scratch(core, prompt), prompt, options, cache=False)
    assert (events["kind"] == rules.FULL_DEPTH).sum() == 200


@pytest.mark.parametrize("engine", ["deferred", "recompute"])
@pytest.mark.parametrize("case", ["llama_heads", "gpt2_mlp", "qk_norm", "no_positions"])
def test_replayed_exits(case, engine):
    core, wide, _, prompt, thresholds = _case(case)
    replay = random_tokens(5, 18, len(thresholds) + 1)
    options = {"engine": engine, "max_new_tokens": COUNT, "thresholds": thresholds}
    options |= {"replay": replay, "max_deferred": 4, "full_depth": True}
    view = Scratch(core, prompt)
    events = follow(core, wide.c, view, prompt, options)
    tokens = events[events["kind"] == rules.TOKEN]
    assert tokens["exit"][:18].tolist() == replay.tolist()
    # Its own exits replayed give the same text; `full` has nothing to replay.
    own = run(core, prompt, COUNT, engine=engine, thresholds=thresholds)
    again = run(core, prompt, COUNT, engine=engine, replay=own["exit"].astype(np.int32))
    for name in ("token", "exit", "confidence", "logprob"):
        assert own[name].tobytes() == again[name].tobytes()
    full = run(core, prompt, COUNT, engine="full")
    assert same(run(core, prompt, COUNT, engine="full", replay=replay), full)


@pytest.mark.parametrize("engine", ["full", "deferred", "recompute"])
def test_forced_tokens(engine):
    """The events tell the choices, and the text goes on with what was given."""
    core, wide, _, prompt, thresholds = _case("llama_heads")
    forced = random_tokens(8, 15)
    options = {"engine": engine, "max_new_tokens": COUNT, "thresholds": thresholds}
    options |= {"max_deferred": 4, "forced": forced}
    events = follow(core, wide.c, Scratch(core, prompt), prompt, options)
    assert (events["token"][:15] != forced).any()
    # A forced stop token ends the text, a chosen one does not.
    chosen = next(int(t) for t in events["token"] if t not in forced)
    assert len(run(core, prompt, COUNT, **{**_without(options), "stop_tokens": [chosen]})) >= 15
    ended = run(core, prompt, COUNT, **{**_without(options), "stop_tokens": [int(forced[6])]})
    first = int(np.argmax(forced == forced[6]))
    assert len(ended) == first + 1 and ended["done"][-1] == rules.STOP
    # Too many are as good as enough.
    long = {**_without(options), "forced": random_tokens(8, 60)}
    assert len(run(core, prompt, COUNT, **long)) == COUNT


def _without(options):
    return {name: value for name, value in options.items() if name != "max_new_tokens"}


@pytest.mark.parametrize("engine", EARLY)
def test_all_confidences_change_nothing_else(engine):
    core, _, _, prompt, thresholds = _case("llama_heads")
    thresholds = [1.0, thresholds[1], 1.0, thresholds[3]]
    options = {"engine": engine, "thresholds": thresholds}
    few = run(core, prompt, COUNT, **options)
    all_ = run(core, prompt, COUNT, **options, all_confidences=True)
    for name in ("token", "exit", "confidence", "logprob", "done"):
        assert few[name].tobytes() == all_[name].tobytes()
    # Exits with threshold 1 are not run, unless that is asked for.
    assert (few["exits"]["token"][:, [0, 2]] == -1).all()
    if engine == "speculative":  # where a draft was not accepted, the exits behind it had no turn
        all_ = all_[all_["exit"] < 4]
    passed = np.arange(5) <= all_["exit"][:, None]
    assert (all_["exits"]["token"][passed] >= 0).all()
    assert np.isfinite(all_["exits"]["confidence"][passed]).all()


# -- Against float64 --


def _compare(found, view, decoder):
    """How many events were compared before the rules could not tell."""
    found, count = list(found), 0
    try:
        for step in decoder.run():
            for event in step.events:
                ours = found.pop(0)
                for name in ("kind", "position", "token", "exit", "done"):
                    assert ours[name] == getattr(event, name), name
                assert abs(ours["confidence"] - event.confidence) <= view.slack
                slack = view.logprob_slack(event.logprob)
                assert abs(ours["logprob"] - event.logprob) <= slack
                for e, (confidence, logprob, _) in event.said.items():
                    assert abs(ours["exits"][e]["confidence"] - confidence) <= view.slack
                    if np.isfinite(logprob):
                        slack = view.logprob_slack(logprob)
                        assert abs(ours["exits"][e]["logprob"] - logprob) <= slack
                count += 1
    except rules.Unsure:
        return count
    assert not found
    return count


def _against_float64(model, prompt, options):
    core, wide, narrow = model
    shape, context = rules.Shape(wide.c), wide.c["max_positions"]
    events = run(core, prompt, options["max_new_tokens"], **_without(options))
    tokens = events["token"][events["kind"] == rules.TOKEN]
    view = rules.Wide(wide, narrow, prompt.tolist(), **options)
    view.read([*prompt, *tokens][:-1])
    decoder = rules.Decoder(view, shape, prompt, max_length=context, **options)
    return _compare(events[np.argsort(events["position"], kind="stable")], view, decoder), events


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_float64(case, engine):
    compared = total = 0
    for seed in (0, 1):
        core, wide, narrow, prompt, thresholds = _case(case, seed)
        for share in (None, 0.0):
            chosen = thresholds if share is None else [share] * len(thresholds)
            options = {"engine": engine, "max_new_tokens": COUNT, "thresholds": chosen}
            options |= {"max_deferred": 3 + seed, "all_confidences": bool(seed)}
            if seed and share is None:
                options |= {"min_new_tokens": 12, "stop_tokens": [1, 2, 3, 4]}
                options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.2}
            count, events = _against_float64((core, wide, narrow), prompt, options)
            compared, total = compared + count, total + len(events)
    assert compared >= 0.75 * total


@pytest.mark.parametrize("seed", range(100, 120))
def test_float64_on_random_models(seed):
    model = make(seed)
    vocab = model[1].c["vocab_size"]
    prompt = random_tokens(seed, 1 + seed % 7, vocab)
    thresholds = thresholds_for(model[1], random_tokens(seed + 1, 40, vocab))
    for engine in EARLY:
        options = {"engine": engine, "max_new_tokens": COUNT, "thresholds": thresholds}
        _against_float64(model, prompt, {**options, "max_deferred": seed % 5})


def test_float64_notices_a_fault():
    """Negative control: another threshold, cap, or exit is told apart."""
    core, wide, narrow, prompt, thresholds = _case("llama")
    options = {"engine": "speculative", "max_new_tokens": COUNT, "thresholds": thresholds}
    _, events = _against_float64((core, wide, narrow), prompt, options)
    for change in (
        {"thresholds": [1.0] * len(thresholds)},
        {"max_deferred": 0},
        {"engine": "deferred"},
        {"max_new_tokens": COUNT - 1},
    ):
        broken = {**options, **change}
        view = rules.Wide(wide, narrow, prompt.tolist())
        decoder = rules.Decoder(view, rules.Shape(wide.c), prompt, max_length=160, **broken)
        with pytest.raises(AssertionError):
            _compare(events, view, decoder)


# -- Random models and requests, among others and alone --


@st.composite
def requests(draw, exits, vocab, context):
    """Settings of a request, and its prompt."""
    near = [1, 2, 3, 9, 62, 63, 64, 65, 127, 128, 129, 254, 255, 256, 257, 258]
    length = draw(st.sampled_from([n for n in near if n <= context]))
    values = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])
    uniform = draw(st.booleans())
    thresholds = [draw(values)] if uniform else [draw(values) for _ in range(exits)]
    request = {
        "engine": draw(st.sampled_from(EARLY)),
        "thresholds": thresholds,
        "max_deferred": draw(st.integers(0, 20)),
        "max_new_tokens": draw(st.integers(1, 24)),
        "all_confidences": draw(st.booleans()),
        "full_depth": draw(st.booleans()),
        "stop_tokens": draw(st.lists(st.integers(0, vocab - 1), max_size=3)),
    }
    if draw(st.booleans()):
        request["min_new_tokens"] = draw(st.integers(0, request["max_new_tokens"]))
    if draw(st.booleans()):
        request |= {"temperature": 1.0, "top_k": draw(st.integers(0, 9))}
        request |= {"seed": draw(st.integers(0, 9)), "sample": draw(st.integers(0, 9))}
    if draw(st.booleans()):
        request |= {"repetition_penalty": 1.3, "presence_penalty": 0.2, "logit_bias": {0: 1.0}}
    return random_tokens(draw(st.integers(0, 9)), length, vocab), request


def _alone(core, prompt, request, **options):
    return run(core, prompt, request["max_new_tokens"], **{**_without(request), **options})


def _check_alone(core, prompt, request, dtype):
    """One request under every engine."""
    found = {
        engine: _alone(core, prompt, request, engine=engine, dtype=dtype) for engine in ENGINES
    }
    assert same(found["deferred"], found["recompute"])
    never = {"thresholds": [1.0], "dtype": dtype, "all_confidences": False}
    full = _alone(core, prompt, request, engine="full", dtype=dtype, all_confidences=False)
    for engine in EARLY:
        assert same(_alone(core, prompt, request, engine=engine, **never), full)
    if not request.get("temperature"):
        for name in ("token", "position", "logprob", "done"):
            assert found["speculative"][name].tobytes() == full[name].tobytes()
    for name in ("token", "position", "exit", "confidence", "logprob", "done"):
        assert found["full"][name].tobytes() == full[name].tobytes()
    if request["full_depth"]:
        without = _alone(core, prompt, request, engine="deferred", dtype=dtype, full_depth=False)
        tokens = found["deferred"][found["deferred"]["kind"] == rules.TOKEN]
        for name in ("token", "exit", "confidence", "logprob"):
            assert tokens[name].tobytes() == without[name].tobytes()
    return found[request["engine"]]


def _check_together(core, wanted, arrivals, dtype, positions=0):
    """Requests that come at different steps: each has the events that it has alone."""
    engine = _core.Engine(core, dtype=dtype, max_sequences=len(wanted), positions=positions)
    waiting, numbers, events = list(zip(arrivals, wanted, strict=True)), [], []
    waiting.sort(key=lambda each: each[0])
    order = [alone for _, (_, _, alone) in waiting]
    clock = 0
    while waiting or engine.active:
        while waiting and (waiting[0][0] <= clock or not engine.active):
            prompt, request, _ = waiting[0][1]
            try:
                numbers.append(engine.add(prompt, **request))
            except _core.BusyError:
                assert engine.active
                break
            waiting.pop(0)
        events.append(engine.step())
        clock += 1
    for found, alone in zip(drain(engine, numbers, events), order, strict=True):
        assert same(found, alone)


def _engines_agree(data):
    isa = data.draw(st.sampled_from(isas()))
    threads = data.draw(st.sampled_from([1, 2]))
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    seed = data.draw(st.integers(0, 10**6))
    config = make_config(seed, max_position_embeddings=300)
    core = make(seed, isa=isa, threads=threads, max_position_embeddings=300)[0]
    base = make(seed, max_position_embeddings=300)[0]
    count = data.draw(st.integers(1, 5))
    vocab, exits = config.vocab_size, len(config.exits)
    wanted = []
    for _ in range(count):
        prompt, request = data.draw(requests(exits, vocab, 280))
        wanted.append((prompt, request, _check_alone(base, prompt, request, dtype)))
    arrivals = data.draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    positions = data.draw(st.sampled_from([0, 320, 512]))
    _check_together(core, wanted, arrivals, dtype, positions)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_engines_agree(data):
    _engines_agree(data)


@pytest.mark.long
@settings(max_examples=5000, deadline=None, database=None, print_blob=True)
@given(st.data())
def test_engines_agree_on_many(data):
    _engines_agree(data)


def _follows_the_rules(data):
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    seed = data.draw(st.integers(0, 10**6))
    core, wide, _ = make(seed, max_position_embeddings=300)
    vocab, exits = wide.c["vocab_size"], len(wide.c["exits"])
    prompt, request = data.draw(requests(exits, vocab, 128))
    if request["engine"] == "speculative":
        request.pop("temperature", None)
    view = Scratch(core, prompt, dtype=dtype, **request)
    max_length = data.draw(st.sampled_from([0, len(prompt), len(prompt) + 5]))
    follow(core, wide.c, view, prompt, request, dtype=dtype, max_length=max_length)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_requests_to_the_bit(data):
    _follows_the_rules(data)


@pytest.mark.long
@settings(max_examples=5000, deadline=None, database=None, print_blob=True)
@given(st.data())
def test_many_random_requests_to_the_bit(data):
    _follows_the_rules(data)
