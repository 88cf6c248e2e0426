"""Handles: threads, Ctrl-C, objects that were never or twice initialised, no subclasses."""

import copy
import ctypes
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import eellm
from eellm import _core
from tests.parity.cases import HEADS, base_config
from tests.python.common import CONFIG, batch, equal, make, make_model, run_step, values_of

pytestmark = pytest.mark.usefixtures("collected")

# A step that takes long enough for another thread to get in between.
LONG = base_config(hidden_size=128, intermediate_size=512, num_layers=4, vocab_size=2048,
                   exits=HEADS["norm"])  # fmt: skip
LONG_ROWS, LONG_BATCHES = 64, 24


def long_data(config=LONG):
    rng = np.random.default_rng(2)
    shape = (LONG_BATCHES, LONG_ROWS)
    tokens = rng.integers(0, config["vocab_size"], shape, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": tokens[:, ::-1].copy(),
        "positions": np.tile(np.arange(LONG_ROWS, dtype=np.int32), (LONG_BATCHES, 1)),
        "row_ids": np.zeros(shape, np.uint64),
        "segments": np.tile(np.array([0, LONG_ROWS], np.int32), LONG_BATCHES),
        "segment_counts": np.ones(LONG_BATCHES, np.int32),
    }


def make_long():
    return make(LONG, rows=LONG_ROWS, microbatches=LONG_BATCHES)


def while_running(call, action):
    """Runs `call` in a thread, and `action` again and again until it has ended; their results."""
    results, errors = [], []

    def run():
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    actions = []
    while thread.is_alive():
        actions.append(action())
        time.sleep(0.001)
    thread.join()
    assert not errors, errors
    return results[0], actions


def refused(call):
    """What the error of a busy handle says; None where the call went through."""
    try:
        call()
    except eellm.Error as error:
        return str(error)
    return None


def test_another_thread_runs_during_a_step():
    _, trainer = make_long()
    result, ticks = while_running(lambda: run_step(trainer, LONG, long_data()), lambda: True)
    assert result["updated"] and len(ticks) > 5


def test_a_call_that_keeps_the_gil_is_noticed():
    """The negative control: one call of C that holds the lock, as long as a step."""
    spin = ctypes.PyDLL(None).usleep
    _, ticks = while_running(lambda: spin(300000), time.monotonic)
    assert len(ticks) < 5


def test_a_busy_model_refuses_a_second_thread():
    model, trainer = make_long()
    alone_model, alone = make_long()
    expected = run_step(alone, LONG, long_data())
    tokens, out = np.zeros((1, 2), np.int32), np.zeros((3, 1, 2, 2048), np.float32)
    data = long_data()
    evaluation = {name: array for name, array in data.items() if name != "row_ids"}
    calls = {
        "step": lambda: run_step(trainer, LONG, data),
        "evaluate": lambda: trainer.evaluate(**evaluation),
        "zero_gradients": trainer.zero_gradients,
        "forward": lambda: model.forward(tokens, out),
        "initialize": lambda: model.initialize(0.02, 1),
        "initialize_parameter": lambda: model.initialize_parameter("model.norm.weight", 0.02, 1),
        "Trainer": lambda: _core.Trainer(model, rows=1, microbatches=1),
        "Engine": lambda: _core.Engine(model),
    }
    seen, ended = {}, threading.Event()

    def run():
        """The step, from the moment at which no call of the other thread is in its way."""
        while True:
            try:
                result = run_step(trainer, LONG, long_data())
            except eellm.Error:
                continue
            ended.set()
            return result

    def action():
        if refused(trainer.zero_gradients):
            for name, call in calls.items():
                if name not in seen and not ended.is_set():
                    seen[name] = refused(call)

    result, _ = while_running(run, action)
    assert set(seen) == set(calls)
    for name, text in seen.items():
        assert text and "in use by another thread" in text, name
    assert result == expected
    assert equal(values_of(model), values_of(alone_model))
    assert refused(trainer.zero_gradients) is None


def test_reading_needs_no_claim():
    model, trainer = make_long()

    def read():
        assert len(model.table) > 3 and model.threads == 1 and trainer.steps >= 0
        assert trainer.memory["scratch"] >= 0 and trainer.gradient("model.norm.weight").shape
        return np.asarray(model.parameter("model.norm.weight"))[0]

    _, reads = while_running(lambda: run_step(trainer, LONG, long_data()), read)
    assert len(reads) > 5


def test_two_models_run_at_a_time():
    first, second = make_long()[1], make_long()[1]
    _, others = while_running(
        lambda: run_step(first, LONG, long_data()),
        lambda: run_step(second, LONG, long_data())["updated"],
    )
    assert all(others)


def test_the_last_reference_may_go_while_a_step_runs():
    base = _core.alloc_stats()[1]
    holder = list(make_long())
    step = holder[1].step

    def run(step=step):
        return step(*long_data().values(), exit_weights=[1, 1], learning_rate=0)

    del step
    result, _ = while_running(run, holder.clear)
    assert result["finite"]
    del run
    assert _core.alloc_stats()[1] == base


def test_ctrl_c_between_steps():
    """A signal during a step is served after it, and all is as after a whole number of steps."""
    model, trainer = make_long()
    timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = 0
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100000):
                run_step(trainer, LONG, long_data())
                steps += 1
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)
    assert trainer.steps in (steps, steps + 1)
    other_model, other = make_long()
    while other.steps < trainer.steps:
        run_step(other, LONG, long_data())
    assert equal(values_of(model), values_of(other_model))
    assert run_step(trainer, LONG, long_data()) == run_step(other, LONG, long_data())


def every_use(kind):
    """Every method with harmless arguments, every property, and what Python does with objects."""
    data = batch(CONFIG)
    tokens, out = np.zeros((1, 2), np.int32), np.zeros((3, 1, 2, 67), np.float32)
    arguments = {
        "forward": (tokens, out),
        "initialize": (0.02, 1),
        "initialize_parameter": ("model.norm.weight", 0.02, 1),
        "step": tuple(data.values()),
        "evaluate": tuple(array for name, array in data.items() if name != "row_ids"),
        "zero_gradients": (),
        "record": (8,),
        "recorded": (),
    }
    keywords = {"step": {"exit_weights": [1, 1], "learning_rate": 0}}
    for name in dir(kind):
        if name.startswith("__"):
            continue
        if callable(getattr(kind, name)):
            given = arguments.get(name, ("model.norm.weight",))
            yield name, lambda x, n=name, g=given: getattr(x, n)(*g, **keywords.get(n, {}))
        else:
            yield name, lambda x, n=name: getattr(x, n)


@pytest.mark.parametrize("kind", [_core.Model, _core.Trainer])
def test_an_object_without_init_raises(kind):
    for name, use in every_use(kind):
        empty = kind.__new__(kind)
        with pytest.raises(eellm.Error, match="is not initialised"):
            use(empty)
        assert repr(empty), name
    if kind is _core.Trainer:
        with pytest.raises(eellm.Error, match="is not initialised"):
            empty.steps = 3


def test_an_object_without_init_serves_nothing_else():
    empty = _core.Model.__new__(_core.Model)
    with pytest.raises(eellm.Error, match="the model is not initialised"):
        _core.Trainer(empty, rows=1, microbatches=1)
    with pytest.raises(eellm.Error, match="the model is not initialised"):
        _core.Engine(empty)


def test_init_fails_and_then_succeeds():
    model = _core.Model.__new__(_core.Model)
    with pytest.raises(ValueError):
        model.__init__(base_config(vocab_size=0))
    with pytest.raises(eellm.Error):
        model.parameter("model.norm.weight")
    model.__init__(CONFIG, 1)
    trainer = _core.Trainer.__new__(_core.Trainer)
    with pytest.raises(ValueError):
        trainer.__init__(model, rows=0, microbatches=1)
    trainer.__init__(model, rows=8, microbatches=1)
    assert trainer.steps == 0


def test_second_init_is_refused():
    model, trainer = make()
    before, live = values_of(model), _core.alloc_stats()[1:]
    with pytest.raises(eellm.Error, match="the model is initialised already"):
        model.__init__(CONFIG)
    with pytest.raises(eellm.Error, match="the trainer is initialised already"):
        trainer.__init__(make_model(), rows=8, microbatches=1)
    assert equal(before, values_of(model)) and _core.alloc_stats()[1:] == live
    assert run_step(trainer)["updated"]


class Reentrant(dict):
    """A config that initialises the model while it is read."""

    def __getitem__(self, key):
        if key == "exits" and self.model:
            model, self.model = self.model, None
            model.__init__(CONFIG, 1)
        return super().__getitem__(key)


def test_init_within_init_is_refused():
    live = _core.alloc_stats()[1:]
    model = _core.Model.__new__(_core.Model)
    config = Reentrant(CONFIG)
    config.model = model
    with pytest.raises(eellm.Error, match="initialised already"):
        model.__init__(config, 1)
    assert model.table
    del model, config
    assert _core.alloc_stats()[1:] == live


def test_init_from_two_threads():
    big = base_config(vocab_size=2048, hidden_size=256, max_positions=1 << 14)
    live = _core.alloc_stats()[1:]
    for _ in range(5):
        model = _core.Model.__new__(_core.Model)
        start, outcomes = threading.Barrier(2), []

        def run(model=model, start=start, outcomes=outcomes):
            start.wait()
            outcomes.append(refused(lambda: model.__init__(big, 1)))

        threads = [threading.Thread(target=run) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert sorted(map(bool, outcomes)) == [False, True] and model.table
        del run
    del model
    assert _core.alloc_stats()[1:] == live


@pytest.mark.parametrize("kind", [_core.Model, _core.Trainer, _core.Engine, _core.Tensor])
def test_subclasses_and_attributes_are_refused(kind):
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Mine", (kind,), {})
    with pytest.raises(TypeError, match="immutable"):
        kind.anything = 1


def test_handles_are_neither_copied_nor_pickled():
    for handle in (*make(), make_model().parameter("model.norm.weight")):
        with pytest.raises(TypeError):
            copy.copy(handle)
        with pytest.raises(TypeError):
            pickle.dumps(handle)
        with pytest.raises(AttributeError):
            handle.anything = 1


def test_a_trainer_keeps_its_model():
    base = _core.alloc_stats()[1]
    model, trainer = make()
    expected = values_of(model)
    again = make_model()
    del model
    assert run_step(trainer, learning_rate=0.0)["updated"]
    other = _core.Trainer(again, rows=26, microbatches=2)
    assert run_step(other, learning_rate=0.0)["losses"] and equal(values_of(again), expected)
    del trainer, other, again
    assert _core.alloc_stats()[1] == base


def test_exceptions():
    assert issubclass(_core.Error, RuntimeError)
    assert eellm.Error is _core.Error and _core.Error.__module__ == "eellm"
    assert pickle.loads(pickle.dumps(_core.NonFiniteError("x"))).args == ("x",)
