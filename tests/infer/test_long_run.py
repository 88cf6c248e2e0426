"""A service that runs for days: nothing is allocated for a token, nothing is left of a text."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from eellm import _core
from tests.infer.models import drain, make, random_tokens, run, same

ENGINES = ("full", "deferred", "recompute", "speculative")


@pytest.fixture(scope="module")
def core():
    return make("llama_heads")[0]


def _settings(engine, i):
    return {
        "engine": engine,
        "thresholds": [(1.0, 0.4, 0.0)[i % 3]],
        "max_deferred": (15, 3)[i % 2],
        "full_depth": bool(i % 2),
        "all_confidences": bool(i % 3),
        "temperature": 0.5 * (i % 3),
        "top_p": 0.9,
        "top_k": 7 * (i % 2),
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "logit_bias": {3: 1.0},
        "stop_tokens": [5],
        "min_new_tokens": 30,
        "sample": i,
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_no_allocation_per_token(core, engine):
    pool = _core.Engine(core, max_sequences=8)
    for i in range(6):
        prompt = random_tokens(i, 30 + 20 * i)
        pool.add(prompt, max_new_tokens=40, **_settings(engine, i))
    for i in range(2):
        pool.score(random_tokens(i, 100 + i))
    pool.step()  # the first tokens warm up
    before, tokens = _core.alloc_stats()[0], 0
    while pool.active:
        tokens += len(pool.step())
    assert tokens > 200
    assert _core.alloc_stats()[0] == before
    pool.add(random_tokens(1, 3), max_new_tokens=1)
    assert _core.alloc_stats()[0] > before


def test_admission_allocates_no_more_and_no_more(core):
    """The second text of a kind takes no more allocations than its own memory."""
    pool = _core.Engine(core, max_sequences=2)
    counts = []
    for _ in range(4):
        before = _core.alloc_stats()
        number = pool.add(random_tokens(1, 60), max_new_tokens=40, **_settings("deferred", 1))
        drain(pool, [number])
        after = _core.alloc_stats()
        counts.append(after[0] - before[0])
        assert len(counts) == 1 or after[1:] == before[1:]
    assert counts[1] == counts[2] == counts[3] <= min(counts[0], 4)


def test_memory_is_returned(core):
    live = _core.alloc_stats()[1:]
    engine = _core.Engine(core, max_sequences=6)
    for i, kind in enumerate(ENGINES):
        engine.add(random_tokens(i, 5), max_new_tokens=9, **{"engine": kind, "thresholds": [0.0]})
    engine.score(random_tokens(1, 9))
    engine.step()
    del engine
    assert _core.alloc_stats()[1:] == live


def _resident():
    """Kilobytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return pytest.skip("needs /proc/self/status")


def _generate(core, generations, length, at_once=50):
    """Live bytes and resident memory after each tenth of so many generations, and all counted."""
    pool = _core.Engine(core, max_sequences=at_once)
    prompts = [random_tokens(i, 1 + 3 * i % 40) for i in range(at_once)]
    measured, tokens, start = [], 0, 0
    for tenth in range(10):
        while start < generations * (tenth + 1) // 10:
            for i in range(at_once):
                kind = ENGINES[(start // at_once + i) % 4]
                options = {**_settings(kind, i), "min_new_tokens": 0}
                pool.add(prompts[i], max_new_tokens=length, **options)
            if start % 3 == 0:
                pool.step()
                with suppress(ValueError):  # where it is done already
                    pool.remove(start + at_once - 1)
            while pool.active:
                tokens += len(pool.step())
            start += at_once
        measured.append((*_core.alloc_stats()[1:], _resident()))
    assert tokens > generations
    return np.array(measured)


def _is_flat(measured):
    # Live allocations of the core do not change at all; the process may take a little for itself.
    assert (measured[1:, :2] == measured[1, :2]).all()
    assert measured[-1, 2] - measured[1, 2] < 2048


def test_ten_thousand_generations(core):
    _is_flat(_generate(core, 10_000, 6))


@pytest.mark.long
def test_ten_thousand_longer_generations():
    core, _, _ = make("llama_heads", hidden_size=96, intermediate_size=256, vocab_size=1000)
    _is_flat(_generate(core, 10_000, 60))


def test_growth_is_noticed():
    """Negative control: memory that stays behind."""
    flat = np.array([[40, 10_000, 50_000]] * 10)
    _is_flat(flat)
    for column, much in ((0, 1), (1, 8), (2, 300)):
        growing = flat.copy()
        growing[:, column] += much * np.arange(10)
        with pytest.raises(AssertionError):
            _is_flat(growing)


def test_an_engine_serves_many_texts_alike(core):
    """The thousandth text is the first one."""
    pool = _core.Engine(core, max_sequences=3)
    prompt = random_tokens(1, 20)
    for kind in ENGINES:
        wanted = run(core, prompt, 9, engine=kind, thresholds=[0.3])
        options = {"engine": kind, "thresholds": [0.3], "max_new_tokens": 9}
        for _ in range(100):
            numbers = [pool.add(prompt, **options) for _ in range(3)]
            for found in drain(pool, numbers):
                assert same(found, wanted)
