"""The engine's contract: limits, errors, allocation, sequences that come and go."""

import numpy as np
import pytest

from eellm import _core
from tests.infer.models import SIZES, drain, make, random_tokens, run, same

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
    engine = _core.Engine(core)
    before = _core.alloc_stats()[1]
    with pytest.raises(error, match=match):
        engine.add(np.array(tokens, np.int32), **{"max_new_tokens": 4, **settings})
    assert engine.active == 0
    assert _core.alloc_stats()[1] == before


def test_errors_say_what_to_do(core):
    _refused(core, "prompt has 161 tokens, the context holds 160; shorten", tokens=[1] * 161)
    _refused(core, "no tokens", tokens=[])
    _refused(core, r"token 1 must lie between 0 and 42, got 43", tokens=[1, 43])
    _refused(core, r"token 0 must lie between 0 and 42, got -1", tokens=[-1])
    _refused(core, r"threshold 0 must lie between 0 .* got 7", thresholds=[7.0])
    _refused(core, r"threshold.*3.* got nan", thresholds=[0.5, 0.5, 0.5, float("nan")])
    _refused(core, r"one for each of the 4 early exits .* got 3", thresholds=[0.5] * 3)
    _refused(core, "max_new_tokens must be at least 1, got 0", max_new_tokens=0)
    _refused(core, "max_deferred must lie between 0 and 1024, got -1", max_deferred=-1)
    _refused(core, "temperature must lie", temperature=-1.0)
    _refused(core, "temperature must lie", temperature=float("nan"))
    _refused(core, "top_k must be positive", top_k=-1)
    _refused(core, "top_p must lie", top_p=0.0)
    _refused(core, "unknown engine 'fast'", engine="fast")
    _refused(core, "stop token 0 must lie", stop_tokens=[99])
    _refused(core, "stop token 0 must lie", stop_tokens=[2**40])
    with pytest.raises(ValueError, match="must be of dtype int32, got int64"):
        _core.Engine(core).add(np.array([1]), max_new_tokens=1)
    with pytest.raises(ValueError, match="unknown dtype of the weights 'int4'"):
        _core.Engine(core, dtype="int4")
    with pytest.raises(ValueError, match="max_sequences must lie"):
        _core.Engine(core, max_sequences=0)
    with pytest.raises(ValueError, match="context of 160, got 161"):
        _core.Engine(core, max_length=161)
    with pytest.raises(TypeError, match=r"must be an eellm\._core\.Model"):
        _core.Engine(None)


def test_room(core):
    engine = _core.Engine(core, max_sequences=2)
    first = engine.add(random_tokens(1, 3), max_new_tokens=3)
    second = engine.add(random_tokens(2, 3), max_new_tokens=9)
    with pytest.raises(_core.Error, match="all 2 sequences"):
        engine.add(random_tokens(3, 3), max_new_tokens=3)
    assert engine.active == 2
    engine.remove(first)
    third = engine.add(random_tokens(3, 3), max_new_tokens=3)
    assert len({first, second, third}) == 3
    with pytest.raises(ValueError, match=f"no sequence {first} is in flight"):
        engine.remove(first)
    events = drain(engine, [second, third])
    assert same(events[0], run(core, random_tokens(2, 3), 9))
    assert same(events[1], run(core, random_tokens(3, 3), 3))
    assert engine.step().shape == (0,)


def test_pages(core):
    """A cache with fewer positions than the sequences might need: admission waits for pages."""
    engine = _core.Engine(core, max_sequences=3, positions=192)
    numbers = [engine.add(random_tokens(i, 60), max_new_tokens=30 - i) for i in range(1)]
    numbers.append(engine.add(random_tokens(9, 10), max_new_tokens=5))
    with pytest.raises(_core.Error, match="room for 0 more positions"):
        engine.add(random_tokens(7, 3), max_new_tokens=3)
    events = drain(engine, numbers)
    assert same(events[0], run(core, random_tokens(0, 60), 30))
    # Pages come back, in another order than before.
    numbers = [engine.add(random_tokens(i, 20), max_new_tokens=30) for i in range(3)]
    for i, found in enumerate(drain(engine, numbers)):
        assert same(found, run(core, random_tokens(i, 20), 30))
    # A long sequence, then a short one in its place: each page is given back once.
    for length in (120, 5):
        drain(engine, [engine.add(random_tokens(1, length), max_new_tokens=5)])
    numbers = [engine.add(random_tokens(i, 40), max_new_tokens=20) for i in range(3)]
    for i, found in enumerate(drain(engine, numbers)):
        assert same(found, run(core, random_tokens(i, 40), 20))
    small = _core.Engine(core, positions=64)
    with pytest.raises(ValueError, match="does not fit the cache of 64"):
        small.add(random_tokens(1, 60), max_new_tokens=30)
    assert len(drain(small, [small.add(random_tokens(1, 60), max_new_tokens=5)])[0]) == 5


@pytest.mark.parametrize("threshold", [1.0, 0.5, 0.0])
def test_no_allocation_per_token(core, threshold):
    engine = _core.Engine(core, max_sequences=3)
    for i in range(3):
        engine.add(
            random_tokens(i, 30 + 20 * i),
            max_new_tokens=40,
            thresholds=[threshold],
            temperature=0.5 * i,
            top_p=0.9,
        )
    engine.step()  # the first tokens warm up
    before = _core.alloc_stats()[0]
    while engine.active:
        engine.step()
    assert _core.alloc_stats()[0] == before
    engine.add(random_tokens(1, 3), max_new_tokens=1)
    assert _core.alloc_stats()[0] > before


def test_failed_allocations(core):
    """Each allocation fails in turn: MemoryError, nothing leaks, the next call works."""
    prompt = random_tokens(1, 150)
    wanted = run(core, prompt, 5, thresholds=[0.5])
    live = _core.alloc_stats()[1]

    def attempt():
        engine = _core.Engine(core)
        number = engine.add(prompt, max_new_tokens=5, thresholds=[0.5])
        return drain(engine, [number])[0]

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


def test_a_failed_admission_leaves_the_others_alone(core):
    prompt = random_tokens(1, 20)
    wanted = run(core, prompt, 9, thresholds=[0.5], max_deferred=1)
    for n in range(1, 20):
        engine = _core.Engine(core, max_sequences=2)
        number = engine.add(prompt, max_new_tokens=9, thresholds=[0.5], max_deferred=1)
        events = list(engine.step())
        _core._alloc_fail_at(n)
        try:
            engine.add(prompt, max_new_tokens=2, max_deferred=1000)
            failed = False
        except MemoryError:
            failed = True
        _core._alloc_fail_at(0)
        while engine.active:
            events.extend(event for event in engine.step() if event["sequence"] == number)
        assert same(np.array(events), wanted)
        if not failed:
            break
    assert n > 2


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


def test_memory_is_returned(core):
    live = _core.alloc_stats()[1]
    engine = _core.Engine(core, max_sequences=4)
    for i in range(4):
        engine.add(random_tokens(i, 5), max_new_tokens=9)
    engine.step()
    del engine
    assert _core.alloc_stats()[1] == live


def test_stats(core):
    engine = _core.Engine(core)
    assert engine.stats["steps"] == 0
    engine.add(random_tokens(1, 5), max_new_tokens=3)
    while engine.active:
        engine.step()
    stats = engine.stats
    assert stats["steps"] == 3
    assert stats["head_rows"] == 3
    # Keys and values of five layers (one is that of a block) for three pages of 64 positions.
    assert stats["cache_bytes"] == 2 * 5 * 3 * 64 * 2 * 6 * 4
    narrow = _core.Engine(core, dtype="bfloat16").stats
    assert stats["weight_bytes"] / 2 < narrow["weight_bytes"] < stats["weight_bytes"]


def test_a_shared_matrix_is_packed_once():
    sizes = [
        _core.Engine(make("gpt2", tie_word_embeddings=tied)[0]).stats["weight_bytes"]
        for tied in (True, False)
    ]
    # 43 rows take one panel of 64.
    assert sizes[1] - sizes[0] == 64 * SIZES["hidden_size"] * 4
