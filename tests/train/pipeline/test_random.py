"""Random models, splits, exits and lists: whatever the walk accepts, runs to the same bits."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eellm import _core
from eellm.pipeline import Schedule
from tests.parity.cases import base_config, exit_, gpt2_config
from tests.train.pipeline.common import Layout, check_same, data_of, train, values_of

FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)


def settings_for(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@st.composite
def models(draw, layers):
    """A model with exits of any kind at any depths."""
    parallel = draw(st.booleans())
    branches = ["none", "block"] if parallel else ["none", "block", "mlp"]
    exits, depth = [], -1
    for layer in range(1, layers + 1):
        for before in (True, False):
            branch = draw(st.sampled_from(branches))
            half = branch == "mlp"
            place = 2 * layer - 2 * before - half
            if not draw(st.integers(0, 4)) or place <= depth or (half and before):
                continue
            if len(exits) == 6 or draw(st.booleans()):
                continue
            norm = draw(st.sampled_from(["none", "own", "final"]))
            # An output matrix of an exit before this one, its own, the embedding, the final one.
            output = draw(st.integers(-3, len(exits) - 1))
            exits.append(exit_(layer, before=before, branch=branch, norm=norm, output=output))
            depth = place
    make = draw(st.sampled_from([base_config, gpt2_config]))
    gated = make is base_config and draw(st.booleans())
    options = dict(
        family="eellm", num_layers=layers, exits=exits, parallel_residual=parallel, gated=gated,
        shared_norm=parallel and draw(st.booleans()), tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()), residual_dropout=draw(st.sampled_from([0.0, 0.1])),
    )  # fmt: skip
    return make(**options)


@st.composite
def bounds_of(draw, parts, layers):
    cuts = draw(st.sets(st.integers(1, layers - 1), min_size=parts - 1, max_size=parts - 1))
    return [0, *sorted(cuts), layers]


def split_backwards(random, actions, share):
    """Some backwards in two parts, the weight part somewhere behind the input part."""
    found, late = [], {}
    for action in actions:
        chunk = int(action["chunk"])
        waiting = late.setdefault(chunk, [])
        if action["kind"] == BACKWARD and (waiting or random.random() < share):
            first, second = action.copy(), action.copy()
            first["kind"], second["kind"], second["flags"] = BACKWARD_INPUT, BACKWARD_WEIGHT, 0
            found.append(first)
            waiting.append(second)
        else:
            found.append(action)
        while waiting and random.random() < 0.5:
            found.append(waiting.pop(0))
    return np.array(found + [each for waiting in late.values() for each in waiting],
                    actions.dtype)  # fmt: skip


def is_valid(schedule):
    try:
        schedule.validate()
    except ValueError:
        return False
    return True


def shuffled(schedule, seed, swaps, share):
    """Another schedule with the same work: neighbours swapped where that can be run, unless both
    are backwards, so that sums keep their order."""
    random = np.random.default_rng(seed)
    lists = [split_backwards(random, each, share) for each in schedule.lists]

    def with_lists(lists):
        return Schedule(schedule.name, schedule.ranks, schedule.microbatches, schedule.chunks,
                        fill=schedule.fill, exits=schedule.exits, lists=lists)  # fmt: skip

    assert is_valid(with_lists(lists))
    for _ in range(swaps):
        rank = random.integers(len(lists))
        if len(lists[rank]) < 2:
            continue
        i = random.integers(len(lists[rank]) - 1)
        if (lists[rank]["kind"][[i, i + 1]] == BACKWARD).all():
            continue
        changed = [each.copy() for each in lists]
        changed[rank][[i, i + 1]] = changed[rank][[i + 1, i]]
        if is_valid(with_lists(changed)):
            lists = changed
    return with_lists(lists)


@st.composite
def cases(draw):
    layers = draw(st.integers(2, 6))
    name = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero_bubble"]))
    ranks = draw(st.integers(1, min(layers, 4)))
    chunks = draw(st.integers(1, layers // ranks)) if name == "interleaved" else 1
    microbatches = draw(st.integers(1, 7))
    schedule = Schedule(name, ranks, microbatches, chunks)
    share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    schedule = shuffled(schedule, draw(st.integers(0, 999)), draw(st.integers(0, 60)), share)
    layout = Layout(
        ranks, chunks, schedule, draw(bounds_of(ranks * chunks, layers)), draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "attention", "full"])), defer=draw(st.booleans()),
    )  # fmt: skip
    return draw(models(layers)), layout, microbatches, draw(st.integers(0, 999))


def check(case):
    config, layout, microbatches, seed = case
    values = values_of(config, seed)
    steps = [data_of(config, microbatches, seed + i) for i in range(2)]
    more = data_of(config, microbatches, seed + 9)
    wanted = train(config, values, Layout(), steps, evaluate=more, clip=0.0)
    check_same(train(config, values, layout, steps, evaluate=more, clip=0.0), wanted)


@settings_for(80)
@given(cases())
def test_random_lists(case):
    check(case)


@pytest.mark.long
@settings_for(3000)
@given(cases())
def test_many_random_lists(case):
    check(case)


def finds_places(config, values, layout):
    model = layout.model(config, 0, values)
    try:
        layout.trainer(model, _core.comm_local(layout.ranks)[0], layout.schedule.microbatches)
    except NotImplementedError:
        return False
    return True


@st.composite
def fillings(draw):
    layers = draw(st.integers(4, 6))
    ranks = draw(st.integers(2, 4))
    fill = (draw(st.integers(0, ranks - 1)), draw(st.integers(0, ranks - 1)))
    ends = draw(st.sets(st.integers(0, ranks - 1)))
    schedule = Schedule("1f1b", ranks, draw(st.integers(1, 6)), fill=fill, exits=ends)
    other = shuffled(schedule, draw(st.integers(0, 999)), draw(st.integers(10, 60)), 0.0)
    bounds = draw(bounds_of(ranks, layers))
    return draw(models(layers)), ranks, bounds, schedule, other, draw(st.integers(0, 999))


def check_filling(case):
    """Other lists with the same fillings."""
    config, ranks, bounds, schedule, other, seed = case
    values = values_of(config, seed)
    # An output whose activations are not kept has one place: it may not wait for another.
    assume(finds_places(config, values, Layout(ranks, 1, other, bounds)))
    steps = [data_of(config, schedule.total, seed + i) for i in range(2)]
    runs = [train(config, values, Layout(ranks, 1, each, bounds), steps, clip=0.0)
            for each in (schedule, other)]  # fmt: skip
    check_same(*runs)


@settings_for(40)
@given(fillings())
def test_random_fillings(case):
    check_filling(case)


@pytest.mark.long
@settings_for(1000)
@given(fillings())
def test_many_random_fillings(case):
    check_filling(case)


def test_the_lists_are_random():
    """Negative control: shuffling leaves neither the lists nor the split of backwards alone."""
    schedule = Schedule("1f1b", 4, 6)
    other = shuffled(schedule, 1, 60, 0.5)
    assert other.custom
    kinds = np.concatenate([each["kind"] for each in other.lists])
    assert set(kinds.tolist()) == {0, 1, 2, 3}
    moved = [not np.array_equal(mine[mine["kind"] == FORWARD], theirs[theirs["kind"] == FORWARD])
             or len(mine) != len(theirs) for mine, theirs in zip(schedule.lists, other.lists,
                                                                 strict=True)]  # fmt: skip
    assert any(moved)
