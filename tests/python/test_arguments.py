"""Every array and every number that enters is checked, and the message names it and the remedy."""

import re

import numpy as np
import pytest

from eellm import _core
from tests.parity.cases import B, M, T
from tests.python.common import CONFIG, batch, make, run_step, settings

NAMES = ("tokens", "targets", "positions", "row_ids", "segments", "segment_counts")
EVALUATE = tuple(name for name in NAMES if name != "row_ids")


@pytest.fixture(scope="module")
def made():
    return make()


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    copy = memory[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def strided(array):
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


FAULTS = {
    "none": (lambda a: None, TypeError, r"NumPy array of (u?int\d+|float32), got NoneType; use"),
    "list": (lambda a: a.tolist(), TypeError, "got list; use np.asarray"),
    "scalar": (lambda a: 3, TypeError, "got int; use np.asarray"),
    "buffer": (lambda a: memoryview(a), TypeError, "got memoryview; use np.asarray"),
    "float64": (lambda a: a.astype(np.float64), ValueError, r"got float64; use \.astype\(np\."),
    "int16": (lambda a: a.astype(np.int16), ValueError, r"got int16; use \.astype\(np\."),
    "objects": (lambda a: a.astype(object), ValueError, r"got object; use \.astype\(np\."),
    "swapped": (
        lambda a: a.astype(a.dtype.newbyteorder()),
        ValueError,
        r"dtype \w+, got >\w+; use \.astype",
    ),
    "rank": (lambda a: a[None], ValueError, r"must have \d dimensions, got \d; use \.reshape"),
    "rank 0": (lambda a: a.reshape(-1)[0:1].reshape(()), ValueError, "dimensions, got 0"),
    "strided": (strided, ValueError, "contiguous; use np.ascontiguousarray"),
    "unaligned": (unaligned, ValueError, r"aligned in memory; use \.copy\(\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_a_step(made, name, fault):
    _, trainer = made
    break_it, error, text = FAULTS[fault]
    data = batch(CONFIG)
    for call, names in ((run_step_of(trainer), NAMES), (trainer.evaluate, EVALUATE)):
        if name in names:
            given = {each: data[each] for each in names}
            given[name] = break_it(data[name])
            with pytest.raises(error, match=f"^{name} .*{text}"):
                call(**given)


def run_step_of(trainer):
    return lambda **data: trainer.step(**data, **settings())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["tokens", "out"])
def test_arrays_of_forward(made, name, fault):
    model, _ = made
    break_it, error, text = FAULTS[fault]
    given = {
        "tokens": np.zeros((2, 5), np.int32),
        "out": np.zeros((3, 2, 5, CONFIG["vocab_size"]), np.float32),
    }
    if fault == "float64" and name == "out":
        text = r"dtype float32, got float64; use \.astype\(np\.float32\)"
    given[name] = break_it(given[name])
    with pytest.raises(error, match=f"^{name} .*{text}"):
        model.forward(*given.values())


def test_what_is_right_passes(made):
    """The negative control: the arrays before they are broken, read-only, of an equal type, and of
    a subclass."""
    model, trainer = made
    data = batch(CONFIG)
    data["row_ids"] = data["row_ids"].astype(np.ulonglong)
    data["tokens"] = data["tokens"].astype(np.dtype("<i4")).view(type("Mine", (np.ndarray,), {}))
    for array in data.values():
        array.flags.writeable = False
    assert run_step(trainer, data=data, update=False)["finite"]
    trainer.zero_gradients()
    for shape in ((0, 5), (2, 0), (1, 1), (2, CONFIG["max_positions"])):
        out = np.full((3, *shape, CONFIG["vocab_size"]), np.nan, np.float32)
        model.forward(np.zeros(shape, np.int32), out)
        assert np.isfinite(out).all()


def test_out_must_be_writable(made):
    model, _ = made
    out = np.zeros((3, 1, 2, CONFIG["vocab_size"]), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out must be writable; use \.copy\(\)"):
        model.forward(np.zeros((1, 2), np.int32), out)
    assert not out.any()


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("tokens", (M + 1, B * T), f"tokens: dimension 0 must be {M}, got {M + 1}"),
        ("tokens", (M, B * T - 1), f"tokens: dimension 1 must be {B * T}, got {B * T - 1}"),
        ("targets", (M, B * T + 1), "targets: dimension 1 must be"),
        ("positions", (1, B * T), "positions: dimension 0 must be"),
        ("row_ids", (M, 0), "row_ids: dimension 1 must be"),
        ("segment_counts", (M + 1,), f"segment_counts: dimension 0 must be {M}, got {M + 1}"),
        ("segment_counts", (0,), "segment_counts: dimension 0 must be"),
        ("segments", (0,), "segments must have 7 boundaries .*, got 0"),
        ("segments", (8,), "segments must have 7 boundaries .*, got 8"),
    ],
)
def test_shapes_of_a_step(made, name, shape, text):
    _, trainer = made
    data = batch(CONFIG)
    data[name] = np.zeros(shape, data[name].dtype)
    with pytest.raises(ValueError, match=f"^{text}"):
        run_step(trainer, data=data)


@pytest.mark.parametrize("counts", [[0, 5], [-1, 6], [3, B * T + 1], [2**31 - 1, 2], [3, -(2**31)]])
def test_counts_of_segments(made, counts):
    _, trainer = made
    data = batch(CONFIG)
    data["segment_counts"] = np.array(counts, np.int32)
    with pytest.raises(ValueError, match=r"^segment_counts\[\d\] must lie between 1 and"):
        run_step(trainer, data=data)


def test_shape_of_out(made):
    model, _ = made
    tokens = np.zeros((2, 5), np.int32)
    for shape in ((2, 2, 5, 67), (3, 1, 5, 67), (3, 2, 4, 67), (3, 2, 5, 66)):
        with pytest.raises(ValueError, match=r"^out: dimension \d must be \d+, got \d+"):
            model.forward(tokens, np.zeros(shape, np.float32))
    long = np.zeros((1, CONFIG["max_positions"] + 1), np.int32)
    with pytest.raises(ValueError, match=r"max_position_embeddings \(64\)"):
        model.forward(long, np.zeros((3, *long.shape, 67), np.float32))


@pytest.mark.parametrize("token", [-1, CONFIG["vocab_size"], 2**31 - 1, -(2**31)])
def test_tokens_of_forward(made, token):
    model, _ = made
    tokens = np.full((1, 4), token, np.int32)
    with pytest.raises(ValueError, match=str(token)):
        model.forward(tokens, np.zeros((3, 1, 4, 67), np.float32))


def test_unknown_parameters(made):
    model, trainer = made
    calls = [model.parameter, trainer.gradient, trainer.moment1, trainer.moment2]
    calls.append(lambda name: model.initialize_parameter(name, 0.02, 1))
    for call in calls:
        for name in ("", "model.norm", "é" * 200):
            with pytest.raises(KeyError, match="the model has no parameter"):
                call(name)
        for wrong in (None, 3, b"model.norm.weight"):
            with pytest.raises(TypeError):
                call(wrong)
        with pytest.raises(ValueError, match="null character"):
            call("model.norm.weight\0")


NUMBERS = {
    "exit_weights": [
        (None, TypeError, "exit_weights must be a sequence of numbers, got NoneType"),
        (0.5, TypeError, "exit_weights must be a sequence of numbers, got float"),
        ({0: 1.0, 1: 2.0}, TypeError, "exit_weights must be a sequence of numbers, got dict"),
        ([0.5], ValueError, "exit_weights must have 2 numbers, got 1"),
        ([0.5, "1"], TypeError, r"exit_weights\[1\] must be a number, got '1'"),
        ([float("nan"), 1], ValueError, r"exit_weights\[0\] must be a finite number, got nan"),
        ([1, 1e39], ValueError, r"exit_weights\[1\] must be a finite number, got 1e\+39"),
    ],
    "learning_rate": [
        (-1.0, ValueError, "learning_rate"),
        (float("inf"), ValueError, "learning_rate"),
        (float("nan"), TypeError, "learning_rate"),
        ("1", TypeError, ""),
    ],
    "beta1": [(1.0, ValueError, "beta1"), (-0.1, ValueError, "beta1")],
    "beta2": [(float("nan"), ValueError, "beta2")],
    "eps": [(-1e-8, ValueError, "eps")],
    "weight_decay": [(float("inf"), ValueError, "weight_decay")],
    "dropout_seed": [
        (-1, ValueError, r"a seed must lie between 0 and 2\*\*64 - 1, got -1"),
        (2**64, ValueError, "a seed must lie between"),
        (0.5, TypeError, "a seed must be an integer, got float"),
    ],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_a_step(name):
    _, trainer = make()
    for value, error, text in NUMBERS[name]:
        with pytest.raises(error) as raised:
            run_step(trainer, **{name: value})
        assert re.search(text, str(raised.value)), value
    assert trainer.steps == 0 and run_step(trainer)["updated"]


def test_exit_weights_and_learning_rate_are_needed(made):
    _, trainer = made
    for missing in ("exit_weights", "learning_rate"):
        given = settings()
        del given[missing]
        with pytest.raises(TypeError, match="exit_weights and learning_rate"):
            trainer.step(*batch(CONFIG).values(), **given)
    assert run_step(trainer, exit_weights=np.array([0.5, 0.25]))["finite"]
    assert run_step(trainer, exit_weights=(1, 2), dropout_seed=np.uint64(2**64 - 1))["finite"]


def test_seeds_of_initial_values(made):
    model, _ = made
    matrix = "model.layers.0.mlp.down_proj.weight"
    for call in (model.initialize, lambda *a: model.initialize_parameter(matrix, *a)):
        call(0.02, 2**64 - 1)
        for seed in (-1, 2**64, 10**30):
            with pytest.raises(ValueError, match="a seed must lie"):
                call(0.02, seed)
        with pytest.raises(TypeError, match="a seed must be an integer, got NoneType"):
            call(0.02, None)
        for scale in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="std must be"):
                call(scale, 1)


TRAINERS = [
    ({"rows": 0}, ValueError, "a microbatch holds 1 to 2147483647 tokens, got 0"),
    ({"rows": -(2**62)}, ValueError, "a microbatch holds 1 to"),
    ({"microbatches": 0}, ValueError, "a step needs 1 to 16777216 microbatches, got 0"),
    ({"microbatches": 2**30}, ValueError, "a step needs 1 to"),
    ({"microbatches": 2**40}, OverflowError, ""),
    ({"rows": 2**62}, ValueError, "rows must lie between 1 and 2147483647, got 46116860184"),
    ({"rows": 2**31 - 1, "microbatches": 999, "schedule": "gpipe"}, MemoryError, "activations"),
    ({"recompute": "some"}, ValueError, "recompute must be none, attention or full, got 'some'"),
    ({"schedule": "zb"}, ValueError, r"unknown schedule 'zb' \(expected gpipe, 1f1b"),
    ({"schedule": 3}, TypeError, "spec must be a tuple, got int"),
    ({"comm": 3}, TypeError, "comm must be"),
    ({"fault": ("crash", 0, 0, 0.0)}, ValueError, "a fault is none, kill, delay or corrupt"),
    ({"recompute": None}, TypeError, ""),
    ({"exit_temperature": [1.0]}, ValueError, "exit_temperature must have 2 numbers, got 1"),
    ({"exit_temperature": 3}, TypeError, "exit_temperature must be a sequence of numbers, got int"),
    ({"exit_temperature": [1.0, 0.0]}, ValueError, "the temperature of exit 1 must be above 0"),
    ({"exit_temperature": [-1.0, 1.0]}, ValueError, "the temperature of exit 0 must be above 0"),
    ({"exit_temperature": ["a", 1]}, TypeError, r"exit_temperature\[0\] must be a number"),
    ({"model": None}, TypeError, "Model"),
]


@pytest.mark.parametrize(("changes", "error", "text"), TRAINERS)
def test_arguments_of_a_trainer(made, collected, changes, error, text):
    model, _ = made
    live = _core.alloc_stats()[1:]
    given = {"model": model, "rows": 8, "microbatches": 1, **changes}
    with pytest.raises(error) as raised:
        _core.Trainer(**given)
    assert re.search(text, str(raised.value))
    assert _core.alloc_stats()[1:] == live


def test_a_trainer_needs_rows_and_microbatches(made):
    model, _ = made
    for given in ({}, {"rows": 8}, {"microbatches": 1}):
        with pytest.raises(TypeError, match="needs rows and microbatches"):
            _core.Trainer(model, **given)
    with pytest.raises(TypeError):
        _core.Trainer(model, 8, 1)
    assert _core.Trainer(model, rows=8, microbatches=1, exit_temperature=None).steps == 0


def test_steps_can_be_set_but_not_wrongly(made):
    _, trainer = made
    start = trainer.steps
    trainer.steps = 41
    assert trainer.steps == 41
    for value, error in ((-1, ValueError), (2**63, OverflowError), ("3", TypeError)):
        with pytest.raises(error):
            trainer.steps = value
    with pytest.raises(AttributeError):
        del trainer.steps
    assert trainer.steps == 41
    trainer.steps = start
    for name in ("memory", "flops"):
        with pytest.raises(AttributeError):
            setattr(trainer, name, 0)


def test_measurements_check_their_arguments():
    for threads in (-1, 100000):
        with pytest.raises(ValueError, match="threads must lie between"):
            _core.measure_bandwidth(threads, 1)
        with pytest.raises(ValueError, match="threads must lie between"):
            _core.measure_flops(threads, "")
    for size in (0, -5, 1 << 17):
        with pytest.raises(ValueError, match="mebibytes must lie between"):
            _core.measure_bandwidth(1, size)
    with pytest.raises(ValueError, match="sse9"):
        _core.measure_flops(1, "sse9")
    assert _core.measure_bandwidth(1, 8) > 1e8


def test_a_name_cut_within_a_character_still_makes_a_message():
    with pytest.raises(ValueError, match=r"é+"):
        _core.measure_flops(1, "é" * 4000)
    with pytest.raises(ValueError, match=r"aé+"):
        _core.measure_flops(1, "a" + "é" * 4000)


def test_build_info():
    info = _core.build_info()
    assert set(info) == {"compiler", "isa", "isa_levels", "cpus", "cuda", "mpi"}
    assert info["isa"] == info["isa_levels"][-1] and info["cpus"] >= 1
