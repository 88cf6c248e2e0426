"""Memory: nothing leaks, nothing is allocated in a step after warm-up, and every allocation may
fail."""

import gc
import resource
from functools import partial

import numpy as np
import pytest

from eellm import _core
from tests.parity.cases import HEADS, B, M, T, base_config
from tests.python.common import (
    CONFIG,
    CONFIGS,
    batch,
    equal,
    make,
    make_trainer,
    run_step,
    values_of,
)

pytestmark = pytest.mark.usefixtures("collected")


def resident():
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def one_life(kept=None):
    model = _core.Model(CONFIG, 1)
    model.initialize(0.02, 3)
    trainer = make_trainer(model)
    run_step(trainer)
    if kept is not None:
        kept.append(trainer)


def growth(rounds, kept=None):
    """(bytes the process grew by, live allocations and bytes that are new) over the rounds."""
    for _ in range(50):
        one_life()
    gc.collect()
    start, before = resident(), _core.alloc_stats()[1:]
    for _ in range(rounds):
        one_life(kept)
    gc.collect()
    after = _core.alloc_stats()[1:]
    return resident() - start, (after[0] - before[0], after[1] - before[1])


def test_a_thousand_lives_leave_nothing():
    grown, live = growth(1000)
    # One life takes about 300 kB; the allocator of C may keep pages, but not one a life.
    assert live == (0, 0) and grown < 1000 * 1024


def test_a_leak_is_seen():
    kept = []
    _, live = growth(20, kept)
    assert live[0] >= 20 and live[1] > 0


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_allocates_nothing_after_warm_up(name, recompute, schedule):
    config = CONFIGS[name]
    _, trainer = make(config, threads=2, recompute=recompute, schedule=schedule)
    data = batch(config)
    evaluation = {key: array for key, array in data.items() if key != "row_ids"}
    for _ in range(2):
        run_step(trainer, config, data)
        trainer.evaluate(**evaluation)
    before = _core.alloc_stats()
    for seed in range(4):
        run_step(trainer, config, data, dropout_seed=seed)
        trainer.evaluate(**evaluation)
    assert _core.alloc_stats() == before


# Large enough for the scratch memory that a model starts with not to suffice.
LARGE_ROWS = 192


def make_large(head, **changes):
    config = base_config(
        exits=HEADS[head], hidden_size=256, intermediate_size=768, num_layers=4, vocab_size=3000
    )
    return make(config, rows=LARGE_ROWS, microbatches=1, **changes)


def large_step(trainer, head):
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 3000, (1, LARGE_ROWS), dtype=np.int32)
    data = {
        "tokens": tokens,
        "targets": tokens[:, ::-1].copy(),
        "positions": np.arange(LARGE_ROWS, dtype=np.int32)[None] % 64,
        "row_ids": np.zeros((1, LARGE_ROWS), np.uint64),
        "segments": np.array([0, 64, 128, LARGE_ROWS], np.int32),
        "segment_counts": np.array([3], np.int32),
    }
    return run_step(trainer, {"exits": HEADS[head]}, data)


def test_a_first_step_does_allocate():
    """The negative control: the counter sees what the warm-up takes."""
    _, trainer = make_large("norm")
    before = _core.alloc_stats()
    large_step(trainer, "norm")
    assert _core.alloc_stats() > before


def failures(make_it, scratch_grows=False):
    """Lets the n-th allocation of a call fail, n = 1, 2, ... until the call succeeds; returns
    what the successful call gave, and the number of failures. Nothing may stay allocated, except
    that the scratch memory of a model may become larger where it is used."""
    kept = slice(1, 2) if scratch_grows else slice(1, 3)
    live = _core.alloc_stats()[kept]
    for n in range(1, 10000):
        _core._alloc_fail_at(n)
        try:
            made = make_it()
        except MemoryError as error:
            assert "no memory for" in str(error)
            del error
            assert _core.alloc_stats()[kept] == live, n
        else:
            _core._alloc_fail_at(0)
            return made, n - 1
    raise AssertionError("the call never succeeds")


@pytest.fixture(autouse=True)
def no_failure_is_left():
    yield
    _core._alloc_fail_at(0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_allocation_of_creation_may_fail(name):
    config = CONFIGS[name]
    base = _core.alloc_stats()[1:]
    model, count = failures(lambda: _core.Model(config, 2))
    assert count >= 6
    for changes in ({}, {"recompute": "full"}, {"schedule": "gpipe", "recompute": "attention"}):
        trainer, count = failures(partial(make_trainer, model, **changes))
        assert count >= 6 and run_step(trainer, config)["updated"]
        del trainer
    del model
    assert _core.alloc_stats()[1:] == base


def test_a_failed_init_can_be_repeated():
    model = _core.Model.__new__(_core.Model)
    _, count = failures(lambda: model.__init__(CONFIG, 2))
    assert count >= 6 and model.table


@pytest.mark.parametrize(("head", "recompute"), [("mlp", "none"), ("block", "full")])
def test_every_allocation_of_a_step_may_fail(head, recompute):
    """A step that finds no memory changes nothing, and the next one is as if it had not been."""
    expected_model, expected_trainer = make_large(head, recompute=recompute)
    initial, expected = values_of(expected_model), large_step(expected_trainer, head)
    failed = 0
    for n in range(1, 1000):
        model, trainer = make_large(head, recompute=recompute)
        live = _core.alloc_stats()[1]
        _core._alloc_fail_at(n)
        try:
            large_step(trainer, head)
        except MemoryError:
            failed += 1
        else:
            break
        assert equal(values_of(model), initial), n
        assert not any(array.any() for array in values_of(model, trainer.gradient).values())
        assert trainer.steps == 0 and _core.alloc_stats()[1] == live
        assert large_step(trainer, head) == expected
        assert equal(values_of(model), values_of(expected_model))
    # The loop may end with the failed growth of the scratch memory, which is no error.
    assert failed >= 1 and large_step(trainer, head)["updated"]


def test_forward_and_evaluate_may_fail():
    model, trainer = make_large("norm")
    tokens, out = np.zeros((2, 64), np.int32), np.zeros((3, 2, 64, 3000), np.float32)
    _, count = failures(lambda: model.forward(tokens, out), scratch_grows=True)
    assert count >= 3
    shape = (1, LARGE_ROWS)
    zeros = np.zeros(shape, np.int32)
    edges, counts = np.array([0, LARGE_ROWS], np.int32), np.ones(1, np.int32)
    _, trainer = make_large("norm")
    data = (zeros, zeros, zeros, edges, counts)
    _, count = failures(lambda: trainer.evaluate(*data), scratch_grows=True)
    assert count >= 1


def test_memory_adds_up():
    model, trainer = make()
    memory = trainer.memory
    elements = sum(row["shape"][0] * (row["shape"] + (1,))[1] for row in model.table)
    assert memory["parameters"] >= 4 * elements
    assert memory["gradients"] == memory["parameters"] == memory["moments"] / 2
    less = make_trainer(model, recompute="full").memory["activations"]
    assert 0 < less < memory["activations"]
    assert M * B * T > 0
    assert sum(memory.values()) <= _core.alloc_stats()[2]
