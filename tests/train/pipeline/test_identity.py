"""Losses, norms, weights and evaluation of every layout and schedule, equal to one rank's."""

import functools

import numpy as np
import pytest

from eellm import _core
from eellm.pipeline import Schedule
from tests.parity.cases import exit_, gpt2_config
from tests.train.pipeline.common import (
    MODELS,
    Layout,
    check_same,
    data_of,
    run_ranks,
    train,
    values_of,
)

STEPS = 2
UNEVEN = {2: [0, 3, 8], 3: [0, 1, 6, 8], 4: [0, 1, 3, 7, 8]}
LAYOUTS = [
    *(Layout(p, 1, name) for p in (2, 4) for name in ("gpipe", "1f1b", "zero_bubble")),
    *(Layout(p, v, "interleaved") for p, v in ((1, 4), (2, 2), (4, 2), (2, 3))),
    *(Layout(8, 1, name) for name in ("1f1b", "zero_bubble")),
    *(Layout(p, 1, "1f1b") for p in (3, 5)),
    *(Layout(p, 1, "1f1b", earlier=True) for p in (2, 4, 8)),
    *(Layout(p, 1, "zero_bubble", bounds) for p, bounds in UNEVEN.items()),
    Layout(2, 2, "interleaved", [0, 1, 4, 6, 8], earlier=True, recompute="attention"),
    Layout(3, 1, "1f1b", UNEVEN[3], earlier=True, recompute="full"),
    Layout(2, 1, "gpipe", recompute="full"),
    Layout(4, 1, "1f1b", recompute="attention"),
    Layout(1, 1, "zero_bubble", defer=True),
    Layout(2, 1, "zero_bubble", recompute="full", defer=True),
    Layout(4, 1, "zero_bubble", recompute="attention", defer=True, earlier=True),
    Layout(8, 1, "zero_bubble", defer=True),
]


def name_of(layout):
    parts = [f"{layout.ranks}x{layout.chunks}", layout.schedule, layout.recompute]
    parts += ["defer"] * layout.defer + ["earlier"] * layout.earlier
    return "-".join(parts + ["uneven"] * bool(layout.bounds))


@functools.cache
def inputs_of(model, microbatches):
    config = MODELS[model]
    steps = [data_of(config, microbatches, seed) for seed in range(STEPS)]
    return config, values_of(config), steps, data_of(config, microbatches, 99)


@functools.cache
def one_rank(model, microbatches, **options):
    config, values, steps, more = inputs_of(model, microbatches)
    layout = Layout(options=dict(options))
    outcome = train(config, values, layout, steps, evaluate=more)
    assert all(each["updated"] for each in outcome.results)
    return outcome


def check(model, layout, microbatches, **options):
    config, values, steps, more = inputs_of(model, microbatches)
    layout = Layout(**{**layout.__dict__, "options": options})
    wanted = one_rank(model, microbatches, **options)
    check_same(train(config, values, layout, steps, evaluate=more), wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout(model, layout):
    """P does not divide the five microbatches."""
    check(model, layout, 5)


@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("model", ["gpt2", "apart"])
def test_every_number_of_microbatches(model, name, microbatches):
    layout = Layout(4, 2 if name == "interleaved" else 1, name, defer=microbatches == 2)
    check(model, layout, microbatches)


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_temperature_and_dynamic_weights(name):
    exits = len(MODELS["llama"]["exits"])
    temperature = tuple(0.8 + 0.1 * e for e in range(exits))
    layout = Layout(4, 1, name, defer=True)
    check("llama", layout, 5, exit_temperature=temperature, dynamic_weights=True)


def test_tied_matrices_of_several_messages():
    """Larger than what one message of their sums holds, 2**18 elements."""
    exits = [exit_(1), exit_(2, norm="final", output=-3)]
    config = gpt2_config(num_layers=2, hidden_size=64, head_dim=16, vocab_size=4200, exits=exits)
    values, steps = values_of(config), [data_of(config, 2, seed) for seed in range(2)]
    wanted = train(config, values, Layout(), steps)
    check_same(train(config, values, Layout(2), steps), wanted)


def test_the_comparison_sees_one_bit():
    """Negative control."""
    wanted = one_rank("apart", 5)
    config, values, steps, more = inputs_of("apart", 5)
    values = {name: value.copy() for name, value in values.items()}
    values["lm_head.weight"][3, 4] = np.nextafter(values["lm_head.weight"][3, 4], np.float32(9))
    with pytest.raises(AssertionError):
        check_same(train(config, values, Layout(2), steps, evaluate=more), wanted)


@pytest.mark.parametrize("model", ["gpt2", "qk_norm"])
def test_initial_values_depend_on_no_layout(model):
    config = MODELS[model]
    whole = _core.Model(config, 1)
    whole.initialize(0.02, 7)
    names = set()
    for rank in range(3):
        part = _core.Model(config, 1, part=(3, 2, rank, None, False, True))
        part.initialize(0.02, 7)
        for row in part.table:
            if row["held"]:
                value = np.asarray(part.parameter(row["name"]))
                assert np.array_equal(value, np.asarray(whole.parameter(row["name"])))
                names.add(row["name"])
    assert names == {row["name"] for row in whole.table}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks,chunks", [(2, 1), (4, 2), (8, 1)])
def test_every_parameter_is_owned_once(model, ranks, chunks):
    """By the rank that uses it first, whatever the edge; parts are as small as they can be."""
    config = MODELS[model]
    for earlier in (False, True):
        tables = [
            _core.Model(config, 1, weights=False, part=(ranks, chunks, rank, None, earlier, True))
            .table
            for rank in range(ranks)
        ]  # fmt: skip
        for rows in zip(*tables, strict=True):
            assert sum(row["owned"] for row in rows) == 1, rows[0]["name"]
            assert all(row["held"] for row in rows if row["owned"])
            held = sum(row["held"] for row in rows)
            assert held == 1 or rows[0]["tied"], rows[0]["name"]


def test_an_exit_between_two_ranks():
    """Exit 1, behind layer 4 of 8, and its block."""
    config = MODELS["apart"]
    for earlier, holder in ((False, 1), (True, 0)):
        for rank in range(2):
            model = _core.Model(config, 1, part=(2, 1, rank, None, earlier, True))
            rows = [row for row in model.table if row["exit"] == 1]
            assert rows and all(row["held"] == (rank == holder) for row in rows)


@pytest.mark.parametrize("model", ["gpt2", "parallel"])
def test_one_rank_needs_no_exact_ties(model):
    """On one rank the order of the sums is one whatever the schedule, also without them."""
    config, values, steps, more = inputs_of(model, 5)
    wanted = train(config, values, Layout(exact=False), steps, evaluate=more)
    for name in ("gpipe", "zero_bubble"):
        layout = Layout(1, 1, name, exact=False)
        check_same(train(config, values, layout, steps, evaluate=more), wanted)


def test_models_without_ties_do_not_know_exact_ties():
    config, values, steps, more = inputs_of("apart", 5)
    found = train(config, values, Layout(4, exact=False), steps, evaluate=more)
    check_same(found, one_rank("apart", 5))


def test_more_evaluations():
    """Evaluations of any number of microbatches, before and between steps, change nothing."""
    config, values, steps, _ = inputs_of("gpt2", 5)
    layout = Layout(4, 1, "1f1b")
    wanted = one_rank("gpt2", 5)
    many = [data_of(config, count, 7 + count) for count in (1, 3, 11)]

    def evaluate(trainer):
        inputs = ([each[name] for name in each if name != "row_ids"] for each in many)
        return [trainer.evaluate(*each) for each in inputs]

    def work(rank, comm, layout=layout):
        model = layout.model(config, rank, values)
        trainer = layout.trainer(model, comm, 5)
        before = evaluate(trainer)
        settings = dict(exit_weights=[0.3 + 0.1 * e for e in range(8)], learning_rate=1e-2,
                        clip=1.0, dropout_seed=5)  # fmt: skip
        losses = []
        for data in steps:
            losses.append(trainer.step(*data.values(), **settings)["losses"])
            evaluate(trainer)
        return before, losses

    ((alone, _),) = run_ranks(1, lambda rank, comm: work(rank, comm, Layout()))
    for before, losses in run_ranks(4, work):
        assert losses == [each["losses"] for each in wanted.results]
        for mine, theirs in zip(before, alone, strict=True):
            assert all(np.array_equal(mine[key], theirs[key]) for key in theirs)


def test_schedules_are_told_apart():
    """Negative control of the lists: other lists of the name give other orders, and equal bits."""
    lists = [Schedule(name, 4, 5).lists for name in ("gpipe", "1f1b", "zero_bubble")]
    assert not any(np.array_equal(lists[0][1], other[1]) for other in lists[1:])
