"""The engine's contract: limits, errors, allocation, sequences that come and go."""

import numpy as np
import pytest

from eellm import _core
from tests.infer.models import SIZES, drain, make, random_tokens, run, same, score

CONTEXT, VOCAB = SIZES["max_position_embeddings"], SIZES["vocab_size"]


@pytest.fixture(scope="module")
def core():
    return make("llama_heads")[0]


def test_stop_tokens_and_length(core):
    prompt = random_tokens(1, 6)
    events = run(core, prompt, 20)
    assert list(events["done"]) == [0] * 19 + [1]
    stop = int(events["token"][7])
    first = int(np.argmax(events["token"] == stop))
    stopped = run(core, prompt, 20, stop_tokens=[stop])
    assert len(stopped) == first + 1
    assert stopped["done"][-1] == 2
    assert same(stopped[:-1], events[:first])
    # A stop token that is also the last one allowed counts as a stop.
    assert run(core, prompt, first + 1, stop_tokens=[stop])["done"][-1] == 2


def test_the_context_ends_a_sequence(core):
    prompt = random_tokens(1, CONTEXT - 3)
    events = run(core, prompt, 100)
    # The token past the last position is still predicted.
    assert len(events) == 4
    assert events["done"][-1] == 1
    assert len(run(core, random_tokens(1, CONTEXT), 100)) == 1


def _refused(core, match, tokens=(1, 2, 3), error=ValueError, **settings):
    """Refused, and the next call works as if nothing had been."""
    engine = _core.Engine(core)
    before = _core.alloc_stats()[1:]
    with pytest.raises(error, match=match):
        engine.add(np.array(tokens, np.int32), **{"max_new_tokens": 4, **settings})
    assert engine.active == 0
    assert _core.alloc_stats()[1:] == before
    number = engine.add(np.array([1, 2, 3], np.int32), max_new_tokens=4)
    assert same(drain(engine, [number])[0], run(core, [1, 2, 3], 4))


REFUSED = [
    ("prompt has 161 tokens, the context holds 160; shorten", {"tokens": [1] * 161}),
    ("no tokens", {"tokens": []}),
    ("token 1 must lie between 0 and 42, got 43", {"tokens": [1, 43]}),
    ("token 0 must lie between 0 and 42, got -1", {"tokens": [-1]}),
    ("threshold 0 must lie between 0 .* got 7", {"thresholds": [7.0]}),
    ("threshold 0 must lie between 0 .* got -0.1", {"thresholds": [-0.1]}),
    ("threshold.*3.* got nan", {"thresholds": [0.5, 0.5, 0.5, float("nan")]}),
    (r"thresholds\[0\] .* got inf", {"thresholds": [float("inf")]}),
    ("one for each of the 4 early exits .* got 3", {"thresholds": [0.5] * 3}),
    ("one for each of the 4 early exits .* got 5", {"thresholds": [0.5] * 5}),
    ("max_new_tokens must be at least 1, got 0", {"max_new_tokens": 0}),
    ("max_new_tokens must be at least 1, got -1", {"max_new_tokens": -1}),
    ("min_new_tokens must lie between 0 and max_new_tokens = 4, got 5", {"min_new_tokens": 5}),
    ("min_new_tokens must lie between 0 and .*, got -1", {"min_new_tokens": -1}),
    ("max_deferred must lie between 0 and 1024, got -1", {"max_deferred": -1}),
    ("max_deferred must lie between 0 and 1024, got 1025", {"max_deferred": 1025}),
    ("temperature must lie", {"temperature": -1.0}),
    ("temperature must lie", {"temperature": float("nan")}),
    ("top_k must be positive", {"top_k": -1}),
    ("top_p must lie", {"top_p": 0.0}),
    ("min_p must lie", {"min_p": -0.5}),
    ("min_p must lie", {"min_p": 1.5}),
    ("repetition_penalty must", {"repetition_penalty": 0.0}),
    ("repetition_penalty must", {"repetition_penalty": float("nan")}),
    ("presence_penalty must", {"presence_penalty": float("inf")}),
    ("frequency_penalty must", {"frequency_penalty": float("nan")}),
    ("43", {"logit_bias": {43: 1.0}}),
    ("-1", {"logit_bias": {-1: 1.0}}),
    ("got nan", {"logit_bias": {1: float("nan")}}),
    ("unknown engine 'fast'", {"engine": "fast"}),
    ("unknown engine 'score'", {"engine": "score"}),
    ("stop token 0 must lie", {"stop_tokens": [99]}),
    ("stop token 0 must lie", {"stop_tokens": [2**40]}),
    ("stop token 1 must lie .* got -1", {"stop_tokens": [1, -1]}),
    ("all 43 are stop tokens", {"stop_tokens": range(43), "min_new_tokens": 1}),
    ("all 43 are stop tokens", {"stop_tokens": [*range(43), 5], "min_new_tokens": 1}),
    ("forced token 1 must lie between 0 and 42, got 43", {"forced": np.array([1, 43], np.int32)}),
    ("forced token 0 .* got -1", {"forced": np.array([-1], np.int32)}),
    ("replay 1 must lie between 0 and 4, got 5", {"replay": np.array([4, 5], np.int32)}),
    ("replay 0 .* got -1", {"replay": np.array([-1], np.int32)}),
    (
        "replay 1 must lie between 0 and 1, got 2",
        {"replay": np.array([1, 2], np.int32), "engine": "speculative"},
    ),
    (
        "forced tokens leave nothing to speculate about",
        {"forced": np.array([1], np.int32), "engine": "speculative"},
    ),
    ("int32", {"forced": np.array([1])}),
    ("int32", {"replay": np.array([1])}),
]


@pytest.mark.parametrize("i", range(len(REFUSED)))
def test_errors_say_what_to_do(core, i):
    match, settings = REFUSED[i]
    _refused(core, match, **settings)


def test_wrong_types(core):
    with pytest.raises(ValueError, match="must be of dtype int32, got int64"):
        _core.Engine(core).add(np.array([1]), max_new_tokens=1)
    with pytest.raises(ValueError, match="must be of dtype int32, got int64"):
        _core.Engine(core).score(np.array([1, 2]))
    with pytest.raises(ValueError, match="unknown dtype of the weights 'int4'"):
        _core.Engine(core, dtype="int4")
    with pytest.raises(ValueError, match="max_sequences must lie"):
        _core.Engine(core, max_sequences=0)
    with pytest.raises(ValueError, match="context of 160, got 161"):
        _core.Engine(core, max_length=161)
    with pytest.raises(ValueError, match=r"positions .* must not be negative, got -1"):
        _core.Engine(core, positions=-1)
    with pytest.raises(TypeError, match=r"must be an eellm\._core\.Model"):
        _core.Engine(None)
    for settings in ({"stop_tokens": ["x"]}, {"thresholds": ["x"]}, {"logit_bias": {"x": 1.0}}):
        _refused(core, "number|int|token|str", error=TypeError, **settings)


def test_texts_that_cannot_be_scored(core):
    engine = _core.Engine(core, max_length=20)
    for tokens, match in (
        ([], "2 tokens or more, got 0"),
        ([1], "2 tokens or more, got 1"),
        ([1] * 21, "text has 21 tokens, the context holds 20; shorten"),
        ([1, 43], "token 1 must lie between 0 and 42, got 43"),
    ):
        with pytest.raises(ValueError, match=match):
            engine.score(np.array(tokens, np.int32))
        assert engine.active == 0
    text = random_tokens(1, 20)
    assert same(drain(engine, [engine.score(text)])[0], score(core, text))


def test_sequences_that_are_not_there(core):
    engine = _core.Engine(core)
    done = engine.add(np.array([1], np.int32), max_new_tokens=1)
    assert len(engine.step()) == 1
    for number in (done, 7, -1, 2**31 - 1, 2**40):
        for call in (engine.remove, engine.finish, lambda number: engine._cache(number, 0)):
            with pytest.raises((ValueError, OverflowError), match=r"no sequence|too large|greater"):
                call(number)
    number = engine.add(np.array([1], np.int32), max_new_tokens=2)
    for layer in (-1, 5, 2**31 - 1):
        with pytest.raises(ValueError, match=f"has 5 layers, got layer {layer}"):
            engine._cache(number, layer)
    engine.remove(number)
    with pytest.raises(ValueError, match="no sequence"):
        engine.remove(number)


@pytest.mark.parametrize("engine", ["deferred", "recompute", "speculative"])
def test_engines_on_a_model_without_exits(engine):
    core, _, _ = make("no_exits")
    full = run(core, [1, 2, 3], 9, engine="full")
    assert same(run(core, [1, 2, 3], 9, engine=engine), full)
    # One threshold for all of no exits is as good as none.
    assert same(run(core, [1, 2, 3], 9, engine=engine, thresholds=[0.0], full_depth=True), full)
    with pytest.raises(ValueError, match="each of the 0 early exits"):
        run(core, [1], 9, engine=engine, thresholds=[0.0, 0.0])


def test_huge_numbers(core):
    """Lengths that nothing could hold end at the context, without an overflow on the way."""
    most = 2**63 - 1
    for engine in ("full", "deferred", "recompute", "speculative"):
        options = {"engine": engine, "thresholds": [0.3], "stop_tokens": [5]}
        free = run(core, [1, 2, 3], 158, **{**options, "min_new_tokens": 158})
        events = run(core, [1, 2, 3], most, min_new_tokens=most, **options)
        assert len(events) == 158 and 5 not in events["token"]
        assert same(events, free)


# -- Weights that come later --


def _bits16(values):
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama_heads", "gpt2_mlp", "no_positions"])
def test_loaded_weights(case, dtype):
    core, _, _ = make(case)
    prompt = random_tokens(1, 6)
    for source in (np.float32, np.float16, np.uint16):
        engine = _core.Engine(core, dtype=dtype, empty=True)
        rounded, _, _ = make(case)
        for row in core.table:
            values = np.asarray(core.parameter(row["name"])).copy()
            given = _bits16(values) if source is np.uint16 else values.astype(source)
            with pytest.raises(ValueError, match="no weights for"):
                engine.add(prompt, max_new_tokens=1)
            engine.load(row["name"], given)
            wide = given.astype(np.uint32) << 16 if source is np.uint16 else given
            wide = wide.view(np.float32) if source is np.uint16 else wide.astype(np.float32)
            np.asarray(rounded.parameter(row["name"]))[...] = wide
        number = engine.add(prompt, max_new_tokens=12, thresholds=[0.5])
        wanted = run(rounded, prompt, 12, thresholds=[0.5], dtype=dtype)
        assert same(drain(engine, [number])[0], wanted)


def test_weights_in_any_order_in_memory(core):
    """Columns first, as a transposed matrix of a file is, and parts of larger arrays."""
    wanted = run(core, [1, 2, 3], 9, thresholds=[0.5])
    engine = _core.Engine(core, empty=True)
    for i, row in enumerate(core.table):
        values = np.asarray(core.parameter(row["name"]))
        if i % 2:
            values = np.asfortranarray(values)
        else:
            part = tuple(slice(2, 2 + n) for n in values.shape)
            wide = np.zeros([n + 5 for n in values.shape], np.float32)
            wide[part] = values
            values = wide[part]
        engine.load(row["name"], values)
    number = engine.add(np.array([1, 2, 3], np.int32), max_new_tokens=9, thresholds=[0.5])
    assert same(drain(engine, [number])[0], wanted)


def test_weights_that_cannot_be_loaded(core):
    engine = _core.Engine(core, empty=True)
    name = core.table[0]["name"]
    values = np.asarray(core.parameter(name)).copy()
    with pytest.raises((KeyError, ValueError), match="no_such"):
        engine.load("no_such", values)
    for wrong in (values[:-1], values.T.copy(), values.ravel()):
        with pytest.raises(ValueError, match=r"shape|dimension"):
            engine.load(name, wrong)
    with pytest.raises(ValueError, match=r"float64|dtype"):
        engine.load(name, values.astype(np.float64))
    full = _core.Engine(core)
    full.add(np.array([1], np.int32), max_new_tokens=5)
    with pytest.raises(_core.BusyError, match="in flight"):
        full.load(name, values)


# -- Failures --


ENGINES = ("full", "deferred", "recompute", "speculative")


def _request(engine, **changes):
    settings = {"thresholds": [0.5], "max_deferred": 3, "full_depth": True, "stop_tokens": [1]}
    return {"engine": engine, "max_new_tokens": 9, "temperature": 0.5, **settings, **changes}


@pytest.mark.parametrize("engine", [*ENGINES, "score"])
def test_failed_allocations(core, engine):
    """Each allocation fails in turn: MemoryError, nothing leaks, the next call works."""
    prompt = random_tokens(1, 100)

    def attempt():
        pool = _core.Engine(core)
        number = pool.score(prompt) if engine == "score" else pool.add(prompt, **_request(engine))
        return drain(pool, [number])[0]

    wanted = attempt()
    live = _core.alloc_stats()[1]
    for n in range(1, 200):
        found = None
        _core._alloc_fail_at(n)
        try:
            found = attempt()
        except MemoryError:
            pass
        _core._alloc_fail_at(0)
        assert _core.alloc_stats()[1] == live
        if found is not None:
            assert same(found, wanted)
            break
    assert n > 10


@pytest.mark.parametrize("engine", [*ENGINES, "score"])
def test_a_failed_admission_leaves_the_others_alone(core, engine):
    prompt = random_tokens(1, 20)
    requests = [_request(kind) for kind in ENGINES]
    wanted = [run(core, prompt, 9, **_but(each, "max_new_tokens")) for each in requests]
    for n in range(1, 30):
        pool = _core.Engine(core, max_sequences=6)
        numbers = [pool.add(prompt, **each) for each in requests] + [pool.score(prompt)]
        events = [pool.step()]
        _core._alloc_fail_at(n)
        try:
            if engine == "score":
                pool.score(random_tokens(2, 120))
            else:
                pool.add(prompt, **_request(engine, max_deferred=1000))
            failed = False
        except MemoryError:
            failed = True
        _core._alloc_fail_at(0)
        assert pool.active == len(numbers) - 1 + (not failed)
        found = drain(pool, numbers, events)
        assert all(same(*pair) for pair in zip(found, [*wanted, score(core, prompt)], strict=True))
        if not failed:
            break
    assert n > 2


def _but(settings, name):
    return {key: value for key, value in settings.items() if key != name}


def test_a_failed_step_is_repeated(core):
    """Whatever a step still allocates: where that fails, the next call makes the same events."""
    prompt = random_tokens(1, 20)
    requests = [_request(kind) for kind in ENGINES]

    def attempt(n):
        pool = _core.Engine(core, max_sequences=5)
        numbers = [pool.add(prompt, **each) for each in requests] + [pool.score(prompt)]
        events, failures = [], 0
        while pool.active:
            _core._alloc_fail_at(n)
            try:
                events.append(pool.step())
            except MemoryError:
                failures += 1
                _core._alloc_fail_at(0)
                events.append(pool.step())
        _core._alloc_fail_at(0)
        return drain(pool, numbers, events), failures

    wanted, _ = attempt(0)
    for n in range(1, 9):
        found, failures = attempt(n)
        assert all(same(*pair) for pair in zip(found, wanted, strict=True))
        if not failures:
            break
    assert failures == 0


def test_weights_are_copied():
    core, _, _ = make("llama_heads")
    prompt = random_tokens(1, 6)
    engine = _core.Engine(core)
    wanted = run(core, prompt, 10, thresholds=[0.5])
    for row in core.table:
        np.asarray(core.parameter(row["name"]))[...] = 0
    assert same(drain(engine, [engine.add(prompt, max_new_tokens=10, thresholds=[0.5])])[0], wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("thresholds", [[1.0], [0.3]])
def test_logits_that_are_not_finite(value, thresholds):
    core, _, _ = make("llama_heads")
    prompts = [random_tokens(i, 9) for i in (1, 2, 3)]
    wanted = [run(core, prompt, 12, thresholds=thresholds) for prompt in prompts]
    used = {int(t) for each in (*prompts, *(w["token"] for w in wanted)) for t in each}
    bad = next(token for token in range(VOCAB) if token not in used)
    np.asarray(core.parameter("model.embed_tokens.weight"))[bad] = value
    prompts[1][4] = bad
    engine = _core.Engine(core, max_sequences=3)
    numbers = [engine.add(p, max_new_tokens=12, thresholds=thresholds) for p in prompts]
    with pytest.raises(
        _core.NonFiniteError, match=f"logits of sequence {numbers[1]} at position 9"
    ):
        engine.step()
    assert engine.active == 2
    events = drain(engine, numbers)
    assert same(events[0], wanted[0])
    assert same(events[2], wanted[2])
    assert len(events[1]) == 0
    # Alone, where nothing is left to hand out.
    engine = _core.Engine(core)
    engine.add(prompts[1], max_new_tokens=2)
    with pytest.raises(_core.NonFiniteError):
        engine.step()
    assert engine.active == 0
    number = engine.add(prompts[0], max_new_tokens=12, thresholds=thresholds)
    assert same(drain(engine, [number])[0], wanted[0])


def _bad_token(prompts, found, among):
    """A token in the middle of one text that stands in no other, nor among drafts."""
    others = {int(token) for prompt in prompts for token in prompt}
    others |= {int(token) for token in found[among]["token"][:4]}
    for i, events in enumerate(found):
        if i != among:
            others |= {int(t) for t in np.append(events["token"], events["exits"]["token"])}
    return next(int(token) for token in found[among]["token"][4:-4] if int(token) not in others)


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_that_turn_bad_in_the_middle(engine):
    """The token that breaks them comes after a while; the other sequences are not harmed."""
    core, _, _ = make("llama", vocab_size=300)
    prompts = [random_tokens(i, 5) for i in range(5)]
    settings = [{"engine": kind, "thresholds": [0.4]} for kind in (engine, *ENGINES)]
    wanted = [run(core, prompts[i], 20, **settings[i]) for i in range(5)]
    bad = _bad_token(prompts, wanted, 0)
    scored = np.array([token for token in random_tokens(9, 40) if token != bad], np.int32)
    scores = score(core, scored)
    np.asarray(core.parameter("model.embed_tokens.weight"))[bad] = np.nan
    pool = _core.Engine(core, max_sequences=6)
    numbers = [pool.add(prompts[i], max_new_tokens=20, **settings[i]) for i in range(5)]
    numbers.append(pool.score(scored))
    events, messages = [], []
    while pool.active:
        try:
            events.append(pool.step())
        except _core.NonFiniteError as error:
            messages.append(str(error))
    (message,) = messages
    assert f"sequence {numbers[0]} at position" in message
    found = drain(pool, numbers, events)
    assert same(found[0], wanted[0][: len(found[0])])
    assert 0 < len(found[0]) <= np.argmax(wanted[0]["token"] == bad) + 1
    for ours, each in zip(found[1:], [*wanted[1:], scores], strict=True):
        assert same(ours, each)


def test_a_bad_token_in_a_text_that_is_scored():
    core, _, _ = make("llama")
    text = np.delete(random_tokens(1, 300), np.flatnonzero(random_tokens(1, 300) == 7))[:60]
    wanted = score(core, text)
    np.asarray(core.parameter("model.embed_tokens.weight"))[7] = np.nan
    bad = text.copy()
    bad[20] = 7
    pool = _core.Engine(core, max_sequences=3)
    numbers = [pool.score(text), pool.score(bad), pool.score(text)]
    with pytest.raises(_core.NonFiniteError, match=f"sequence {numbers[1]} at position 21"):
        pool.step()
    found = drain(pool, numbers)
    assert same(found[0], wanted) and same(found[2], wanted)
    assert len(found[1]) == 0
    # The last token has no row.
    bad = text.copy()
    bad[-1] = 7
    assert same(drain(pool, [pool.score(bad)])[0][:-1], wanted[:-1])


def test_each_sequence_that_fails_is_named():
    core, _, _ = make("llama")
    np.asarray(core.parameter("model.embed_tokens.weight"))[7] = np.nan
    pool = _core.Engine(core, max_sequences=4)
    prompts = [[7], [1, 2], [3, 7], [7, 1, 2]]
    numbers = [pool.add(np.array(p, np.int32), max_new_tokens=1) for p in prompts]
    named, events = [], []
    for _ in range(9):
        try:
            events.append(pool.step())
        except _core.NonFiniteError as error:
            named += [n for n in numbers if f"sequence {n} at" in str(error)]
    assert sorted(named) == [numbers[0], numbers[2], numbers[3]]
    assert pool.active == 0
    assert [int(each) for each in np.concatenate(events)["sequence"]] == [numbers[1]]


def test_events_of_a_finished_sequence_survive_the_failure_of_another():
    core, _, _ = make("llama_heads")
    np.asarray(core.parameter("model.embed_tokens.weight"))[7] = np.nan
    prompt = np.array([1, 2, 3], np.int32)
    wanted = run(core, prompt, 1)
    engine = _core.Engine(core, max_sequences=2)
    first = engine.add(prompt, max_new_tokens=1)
    engine.add(np.array([7], np.int32), max_new_tokens=1)
    with pytest.raises(_core.NonFiniteError):
        engine.step()
    assert engine.active == 1
    assert same(drain(engine, [first])[0], wanted)
    assert engine.active == 0


def test_events_that_wait_for_a_sequence_that_is_removed():
    """Its events are dropped, those of others stay."""
    core, _, _ = make("llama_heads")
    np.asarray(core.parameter("model.embed_tokens.weight"))[7] = np.nan
    prompt = np.array([1, 2, 3], np.int32)
    pool = _core.Engine(core, max_sequences=4)
    done, going, other = (pool.add(prompt, max_new_tokens=n) for n in (1, 5, 1))
    pool.add(np.array([7], np.int32), max_new_tokens=1)
    with pytest.raises(_core.NonFiniteError):
        pool.step()
    assert pool.active == 3
    pool.remove(done)
    pool.remove(going)
    assert pool.active == 1
    with pytest.raises(ValueError, match="no sequence"):
        pool.remove(done)
    events = pool.step()
    assert events["sequence"].tolist() == [other]
    assert pool.active == 0


def test_stats(core):
    engine = _core.Engine(core)
    assert engine.stats["steps"] == 0
    engine.add(random_tokens(1, 5), max_new_tokens=3)
    while engine.active:
        engine.step()
    stats = engine.stats
    assert stats["steps"] == 3
    assert stats["head_rows"] == 3
    assert stats["drafts"] == stats["accepted"] == 0
    # Keys and values of five layers (one is that of a block) for three pages of 64 positions.
    assert stats["cache_bytes"] == 2 * 5 * 3 * 64 * 2 * 6 * 4
    narrow = _core.Engine(core, dtype="bfloat16").stats
    assert stats["weight_bytes"] / 2 < narrow["weight_bytes"] < stats["weight_bytes"]


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_bytes_read(dtype, size):
    """Each matrix once a product, whatever the number of rows; panels of 64 rows."""
    core, _, _ = make("llama")
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]

    def packed(rows, cols):
        return -(-rows // 64) * 64 * cols * size

    layer = packed(3 * hidden, hidden) + packed(hidden, hidden)
    layer += packed(2 * inner, hidden) + packed(hidden, inner)
    head = packed(VOCAB, hidden)
    for thresholds, all_confidences, layers, heads in (
        ([1.0], False, 4, 1),
        ([0.0], False, 1, 1),
        ([1.0], True, 4, 3),
        ([1.0, 0.0], False, 3, 1),
    ):
        for rows in (1, 5, 16):
            pool = _core.Engine(core, max_sequences=rows, dtype=dtype)
            options = {"thresholds": thresholds, "all_confidences": all_confidences}
            for i in range(rows):
                pool.add(np.array([i], np.int32), max_new_tokens=5, **options)
            for steps in (1, 2, 3):
                pool.step()
                assert pool.stats["bytes_read"] == steps * (layers * layer + heads * head)


def test_stop_tokens_that_are_named_twice(core):
    options = {"engine": "deferred", "thresholds": [0.3], "min_new_tokens": 3}
    wanted = run(core, [1, 2, 3], 20, stop_tokens=[4, 9], **options)
    assert same(run(core, [1, 2, 3], 20, stop_tokens=[4, 9] * 40, **options), wanted)


def test_a_shared_matrix_is_packed_once():
    sizes = [
        _core.Engine(make("gpt2", tie_word_embeddings=tied)[0]).stats["weight_bytes"]
        for tied in (True, False)
    ]
    # 43 rows take one panel of 64.
    assert sizes[1] - sizes[0] == 64 * SIZES["hidden_size"] * 4
