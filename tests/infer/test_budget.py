"""The memory budget: places, pages, and who gets them."""

import numpy as np
import pytest

from eellm import _core
from tests.infer.models import drain, make, random_tokens, run, same, score

ENGINES = ("full", "deferred", "recompute", "speculative")


@pytest.fixture(scope="module")
def core():
    return make("llama_heads")[0]


def test_room(core):
    engine = _core.Engine(core, max_sequences=2)
    first = engine.add(random_tokens(1, 3), max_new_tokens=3)
    second = engine.add(random_tokens(2, 3), max_new_tokens=9)
    with pytest.raises(_core.BusyError, match="all 2 sequences"):
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
    with pytest.raises(_core.BusyError, match="room for 0 more positions"):
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


def test_what_a_sequence_takes(core):
    """Pages for all tokens but the last one, which has no row, whatever the engine."""
    for engine in (*ENGINES, "score"):
        for length in (63, 64, 65, 127, 128, 129):
            pool = _core.Engine(core, max_sequences=3, positions=192)
            if engine == "score":
                pool.score(random_tokens(1, length + 1))
            else:
                pool.add(random_tokens(1, 5), max_new_tokens=length - 4, engine=engine)
            pages = -(-length // 64)
            if pages < 3:
                pool.add(random_tokens(1, 5), max_new_tokens=64 * (3 - pages) - 4)
            with pytest.raises(_core.BusyError, match="room for 0 more positions"):
                pool.add(random_tokens(1, 1), max_new_tokens=1)


@pytest.mark.parametrize("engine", [*ENGINES, "score"])
def test_too_small_for_one(core, engine):
    """What can never fit is an error of the call, what does not fit now is not."""
    pool = _core.Engine(core, max_sequences=2, positions=64)

    def add(length):
        if engine == "score":
            return pool.score(random_tokens(1, length + 1))
        return pool.add(random_tokens(1, length - 9), max_new_tokens=10, engine=engine)

    with pytest.raises(ValueError, match="65 positions does not fit the cache of 64"):
        add(65)
    number = add(64)
    with pytest.raises(ValueError, match="65 positions does not fit the cache of 64"):
        add(65)
    with pytest.raises(_core.BusyError, match="room for 0 more"):
        add(10)
    pool.remove(number)
    events = drain(pool, [add(64)])[0]
    assert len(events) == (64 if engine == "score" else 10)
    # Nothing that a larger cache would not have given.
    alone = score(core, random_tokens(1, 65)) if engine == "score" else None
    if alone is None:
        alone = run(core, random_tokens(1, 55), 10, engine=engine)
    assert same(events, alone)


def test_memory_is_what_the_stats_say(core):
    sizes = []
    for positions in (64, 192, 640):
        before = _core.alloc_stats()[2]
        engine = _core.Engine(core, max_sequences=4, positions=positions)
        stats, live = engine.stats, _core.alloc_stats()[2] - before
        assert stats["cache_bytes"] == 2 * 5 * positions * 2 * 6 * 4
        assert stats["cache_bytes"] + stats["weight_bytes"] <= live
        sizes.append(live - stats["cache_bytes"])
        assert sizes[-1] - stats["weight_bytes"] < 64 * 1024
        del engine
        assert _core.alloc_stats()[2] == before
    # More than the sequences could need is not taken.
    assert _core.Engine(core, positions=10**9).stats["cache_bytes"] == 2 * 5 * 192 * 2 * 6 * 4


def _wave(core, seed, count):
    rng = np.random.default_rng(seed)
    for i in range(count):
        prompt = random_tokens(seed + i, int(rng.integers(1, 70)))
        settings = {
            "engine": ENGINES[rng.integers(4)],
            "max_new_tokens": int(rng.integers(1, 40)),
            "thresholds": [float(rng.choice([0.0, 0.3, 1.0]))],
            "max_deferred": int(rng.integers(0, 9)),
            "full_depth": bool(rng.integers(2)),
            "temperature": float(rng.choice([0.0, 1.0])),
            "sample": i,
        }
        yield prompt, settings


def test_waves_of_sequences(core):
    """More requests than the budget holds: each waits for pages, and gets what it has alone."""
    pool = _core.Engine(core, max_sequences=5, positions=320)
    waiting, alone, events, busy = list(_wave(core, 3, 60)), [], [], 0
    numbers = []
    while waiting or pool.active:
        while waiting:
            prompt, settings = waiting[0]
            try:
                numbers.append(pool.add(prompt, **settings))
            except _core.BusyError:
                busy += 1
                break
            waiting.pop(0)
            single = _core.Engine(core)
            alone.append(drain(single, [single.add(prompt, **settings)])[0])
        events.append(pool.step())
    assert busy > 20
    assert numbers == list(range(60))
    for found, wanted in zip(drain(pool, numbers, events), alone, strict=True):
        assert same(found, wanted)


def test_removing_in_the_middle(core):
    """Sequences are taken out at every stage; the others, and the pages, are as before."""
    pool = _core.Engine(core, max_sequences=4, positions=256)
    stay = {"max_new_tokens": 60, "thresholds": [0.3], "max_deferred": 6}
    wanted = run(core, random_tokens(9, 20), 60, thresholds=[0.3], max_deferred=6)
    number, events = pool.add(random_tokens(9, 20), **stay), []
    for i, (prompt, settings) in enumerate(_wave(core, 5, 40)):
        other = pool.add(prompt, **{**settings, "max_new_tokens": 60})
        if not any(len(each) and number in each["sequence"] for each in events[-1:]) and i:
            break
        for _ in range(i % 3):
            events.append(pool.step())
        pool.remove(other)
    assert same(drain(pool, [number], events)[0], wanted)
    for _ in range(2):
        numbers = [pool.add(random_tokens(i, 30), max_new_tokens=30) for i in range(4)]
        for i, found in enumerate(drain(pool, numbers)):
            assert same(found, run(core, random_tokens(i, 30), 30))
