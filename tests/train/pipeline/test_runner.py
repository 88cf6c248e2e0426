"""What the runner holds, sends and records."""

from collections import Counter

import numpy as np
import pytest

from eellm import _core
from eellm.pipeline import Schedule
from tests.parity.cases import base_config, exit_
from tests.train.pipeline.common import (
    MODELS,
    NAMES,
    B,
    Layout,
    T,
    all_well,
    check_same,
    data_of,
    layout_of,
    merge,
    run_ranks,
    settings_of,
    train,
    values_of,
)

FORWARD, _, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)
ACTION, WAIT, SEND, RECEIVE = range(4)


# -- Memory --


def padded(floats):
    return -(-floats // 16) * 16


def layer_floats(config, n):
    """Of the pieces that a slot keeps for a layer, as model/block.h lists them."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv, d = config["num_heads"], config["num_kv_heads"], config["head_dim"]
    stats = n * (2 if config["norm"] == "layernorm" else 1)
    pieces = [n * width, n * (heads + 2 * kv) * d, n * heads * d, n * heads, stats]
    pieces += [n * width, stats, n * inner * (1 + config["gated"])]
    return sum(map(padded, pieces)), max(pieces)


@pytest.mark.parametrize("microbatches", [1, 3, 6])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zero_bubble"])
def test_activations_are_those_of_the_slots_that_the_walk_counted(name, microbatches):
    """Layers and an output for each slot; 4 buffers of gradients where such are sent, 2 where
    they are received alone; 2 of inputs; and for each queue what the layers put off."""
    config, ranks, n = MODELS["apart"], 4, B * T
    values = values_of(config)
    layout = Layout(ranks, 1, name)
    schedule = layout.schedule_of(microbatches)
    slots = schedule.walk(None, False)["slots"]
    message = padded(n * config["hidden_size"])
    layers = len(config["window"]) // ranks
    each, _ = layer_floats(config, n)
    for rank in range(ranks):
        model = layout.model(config, rank, values)
        comm = _core.comm_local(ranks)[rank]
        found = layout.trainer(model, comm, microbatches).memory["activations"] // 4
        gradients = 4 if rank > 0 else 2
        wanted = slots[rank] * (layers * each + message)
        wanted += message * (gradients + (2 if rank > 0 else 0))
        queues = queues_of(schedule.actions(rank))
        spare = 16 * 4 * slots[rank] * layers * 8
        if not queues:
            assert abs(found - wanted) <= spare, rank
        more = 5 * message + padded(n * config["intermediate_size"]) + each - 2 * message
        assert found >= wanted - spare
        assert found <= wanted + spare + queues * layers * (more + message), (rank, queues)


def queues_of(actions):
    held = most = 0
    for kind in actions["kind"]:
        held += int(kind == BACKWARD_INPUT) - int(kind == BACKWARD_WEIGHT)
        most = max(most, held)
    return most


def test_a_slot_more_is_seen():
    """Negative control: the sizes above tell one slot from the next."""
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    found = []
    for microbatches in (1, 2, 3):
        layout = Layout(4, 1, "gpipe")
        model = layout.model(config, 1, values)
        trainer = layout.trainer(model, _core.comm_local(4)[1], microbatches)
        found.append(trainer.memory["activations"] // 4)
    each = layer_floats(config, B * T)[0]
    assert found[2] - found[1] == found[1] - found[0] > 2 * each


@pytest.mark.parametrize("name", NAMES)
def test_steps_allocate_nothing(name):
    """After the first one, whatever the rank does: steps, evaluations, sums over ties."""
    config, values = MODELS["gpt2"], values_of(MODELS["gpt2"])
    layout, data = layout_of(name, defer=True), data_of(MODELS["gpt2"], 5)
    inputs = [data[key] for key in data if key != "row_ids"]

    def work(rank, comm):
        model = layout.model(config, rank, values)
        trainer = layout.trainer(model, comm, 5)
        counts = []
        for _ in range(4):
            trainer.step(*data.values(), **settings_of(config))
            trainer.evaluate(*inputs)
            comm.barrier()
            counts.append(_core.alloc_stats()[0])
            comm.barrier()
        return counts

    for counts in all_well(run_ranks(4, work)):
        assert counts[1] == counts[2] == counts[3]
        assert counts[0] > 0


# -- Messages --

LARGE = {"80 KB": (160, 128), "1.2 MB": (1200, 256)}


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zero_bubble"])
@pytest.mark.parametrize("size", LARGE)
def test_large_messages(size, name):
    """Larger than what a transport copies at once."""
    rows, width = LARGE[size]
    config = base_config(num_layers=2, hidden_size=width, intermediate_size=32, num_heads=2,
                         num_kv_heads=1, exits=[exit_(1), exit_(2, norm="final")])  # fmt: skip
    assert 4 * rows * width > {"80 KB": 1 << 16, "1.2 MB": 1 << 20}[size]
    values, data = values_of(config), data_of(config, 3, rows=rows)
    data["positions"] %= config["max_positions"]
    wanted = train(config, values, Layout(), [data])
    check_same(train(config, values, Layout(2, 1, name), [data]), wanted)


# -- The record --


def record(layout, microbatches=5, capacity=1 << 12, steps=1):
    """The events of every rank."""
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    schedule = layout.schedule_of(microbatches)
    data = data_of(config, schedule.total)

    def work(rank, comm):
        model = layout.model(config, rank, values)
        trainer = layout.trainer(model, comm, microbatches)
        trainer.step(*data.values(), **settings_of(config))
        trainer.record(capacity)
        found = []
        for _ in range(steps):
            trainer.step(*data.values(), **settings_of(config))
            found.append(trainer.recorded())
        trainer.record(0)
        trainer.step(*data.values(), **settings_of(config))
        assert trainer.recorded().shape == (0, 9)
        return found

    return schedule, all_well(run_ranks(layout.ranks, work))


RECORDED = [layout_of(name) for name in NAMES]
RECORDED += [Layout(4, 1, Schedule("1f1b", 4, 5, fill=(2, 2), exits=(0, 1, 2)))]
RECORDED += [Layout(1, 2, "interleaved"), Layout(2, 3, "interleaved")]


@pytest.mark.parametrize("layout", RECORDED, ids=str)
def test_the_record_is_complete(layout):
    """Every action once and in order, every message on both sides, between its actions."""
    schedule, found = record(layout, steps=2)
    message = 4 * B * T * MODELS["apart"]["hidden_size"]
    for step in range(2):
        sent, received = Counter(), Counter()
        for rank in range(layout.ranks):
            events = found[rank][step]
            check_actions(schedule.actions(rank), events)
            for kind, count in ((SEND, sent), (RECEIVE, received)):
                for event in events[events[:, 3] == kind]:
                    size, _, _, _, microbatch, peer, tag = event[2:]
                    assert size == message
                    ends = (rank, int(peer)) if kind == SEND else (int(peer), rank)
                    count[*ends, int(tag), int(microbatch)] += 1
        assert sent == received
        assert all(count == 1 for count in sent.values())
        flags = np.concatenate([schedule.actions(rank)["flags"] for rank in range(layout.ranks)])
        assert sum(sent.values()) == ((flags & 2) > 0).sum() == ((flags & 1) > 0).sum()


def check_actions(actions, events):
    mine = events[events[:, 3] == ACTION]
    keys = ("kind", "chunk", "microbatch")
    assert mine[:, 4:7].tolist() == [[each[key] for key in keys] for each in actions]
    assert (mine[:, 0] <= mine[:, 1]).all() and (mine[1:, 0] >= mine[:-1, 1]).all()
    assert (events[:, 0] <= events[:, 1]).all()
    waits = events[events[:, 3] == WAIT]
    for start, end in waits[:, :2]:
        assert ((mine[:, 1] <= start) | (mine[:, 0] >= end)).all()


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_messages_lie_between_their_actions(name):
    """Sent after the action that made them, received before the one that needs them."""
    schedule, found = record(layout_of(name))
    ends, begins = {}, {}
    for rank in range(4):
        actions = schedule.actions(rank)
        mine = found[rank][0][found[rank][0][:, 3] == ACTION]
        for action, event in zip(actions, mine, strict=True):
            forward = action["kind"] == FORWARD
            key = (rank, bool(forward), int(action["microbatch"]))
            if action["kind"] != BACKWARD_WEIGHT:
                begins[key], ends[key] = event[0], event[1]
    for rank in range(4):
        for event in found[rank][0]:
            if event[3] == SEND:
                assert event[0] >= ends[rank, event[7] == rank + 1, int(event[6])]
            if event[3] == RECEIVE:
                assert event[1] <= begins[rank, event[7] == rank - 1, int(event[6])]


def test_a_full_record_loses_the_rest():
    _, found = record(Layout(2), capacity=3)
    assert [len(each[0]) for each in found] == [3, 3]


def test_recording_changes_no_bit():
    config, values = MODELS["gpt2"], values_of(MODELS["gpt2"])
    data, layout = data_of(config, 5), Layout(4, 1, "1f1b")

    def work(rank, comm):
        model = layout.model(config, rank, values)
        trainer = layout.trainer(model, comm, 5)
        trainer.record(100)
        result = trainer.step(*data.values(), **settings_of(config))
        names = [row["name"] for row in model.table if row["held"]]
        return result, {name: np.array(model.parameter(name)) for name in names}

    wanted = train(config, values, Layout(), [data])
    ended = all_well(run_ranks(4, work))
    assert all(result == wanted.results[0] for result, _ in ended)
    parameters = merge([each for _, each in ended])
    assert all(np.array_equal(parameters[name], wanted.parameters[name]) for name in parameters)
