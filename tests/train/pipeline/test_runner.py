"""What the runner holds and sends, what it records, and what it refuses."""

import re
from collections import Counter

import numpy as np
import pytest

from eellm import _core
from eellm.pipeline import Schedule
from tests.parity.cases import base_config, exit_
from tests.train.pipeline.common import (
    MODELS,
    B,
    Layout,
    T,
    all_well,
    check_same,
    data_of,
    merge,
    run_ranks,
    settings_of,
    train,
    values_of,
)

FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)
ACTION, WAIT, SEND, RECEIVE = range(4)
NAMES = ["gpipe", "1f1b", "interleaved", "zero_bubble"]


def layout_of(name, ranks=4, **options):
    return Layout(ranks, 2 if name == "interleaved" else 1, name, **options)


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


# -- Faults --


KIND = r"\(tag \d+, (forward|backward) of microbatch \d\)$"
OVERDUE = [
    rf"^rank (\d): no message from rank (\d) within 0.3 s {KIND}",
    rf"^rank (\d): rank (\d) did not receive a message within 0.3 s {KIND}",
]


@pytest.mark.parametrize("sleeper,action", [(0, 0), (1, 2), (2, 5), (3, 1)])
def test_a_rank_that_sleeps(sleeper, action):
    """All ranks end with one and the same reason: who waited for whom, for what. Waits that began
    together end together: any of them, of a rank for its neighbour on the side of the sleeper."""
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    data, layout = data_of(config, 5), Layout(4, 1, "1f1b")

    def work(rank, comm):
        model = layout.model(config, rank, values)
        fault = ("delay", 1, action, 1.2) if rank == sleeper else None
        trainer = layout.trainer(model, comm, 5, fault=fault)
        trainer.step(*data.values(), **settings_of(config))
        comm.timeout = 0.3
        trainer.step(*data.values(), **settings_of(config))

    ended = run_ranks(4, work)
    assert all(isinstance(each, _core.CommError) for each in ended), ended
    reasons = {re.sub(r"^rank \d: the job was aborted: ", "", str(each)) for each in ended}
    assert len(reasons) == 1, reasons
    found = [re.search(each, next(iter(reasons))) for each in OVERDUE]
    waiter, peer = map(int, next(filter(None, found)).groups()[:2])
    assert abs(waiter - peer) == 1 and abs(peer - sleeper) < abs(waiter - sleeper), reasons


def test_a_short_sleep_is_waited_for():
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    data, layout = data_of(config, 5), Layout(4, 1, "1f1b")
    fault = ("delay", 0, 1, 0.2)
    wanted = train(config, values, Layout(), [data])
    found = train(config, values, Layout(4, 1, "1f1b", options=dict(fault=fault)), [data])
    check_same(found, wanted)
    assert layout.options == {}


CORRUPTED = [(name, rank) for name in NAMES for rank in range(3)]


@pytest.mark.parametrize("name,rank", CORRUPTED)
def test_a_corrupted_value_stops_the_update_everywhere(name, rank):
    """Whatever action it comes from; and the step after it is as if it had not been."""
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    layout = layout_of(name, 3)
    layout.bounds = [0, 1, 2, 4, 5, 7, 8] if layout.chunks == 2 else [0, 2, 5, 8]
    data = data_of(config, 2, masked=0.0)
    wanted = train(config, values, layout, [data])
    actions = layout.schedule_of(2).actions(rank)
    last = 3 * layout.chunks - 1
    checked = 0
    for i, (kind, _, chunk, _) in enumerate(actions):
        place = chunk * 3 + rank
        if kind == BACKWARD_WEIGHT or (kind in (BACKWARD, BACKWARD_INPUT) and place == 0):
            continue  # what it makes, nobody reads
        corrupted, after = with_fault(config, values, layout, data, rank, ("corrupt", 0, i, 0.0))
        for result in corrupted:
            assert not result["finite"] and not result["updated"], (kind, place, last)
        for result in after:
            assert result == wanted.results[0]
        checked += 1
    assert checked >= 2


def with_fault(config, values, layout, data, where, fault):
    """Two steps with the same data; weights must stay as they are in the first."""

    def work(rank, comm):
        model = layout.model(config, rank, values)
        trainer = layout.trainer(model, comm, 2, fault=fault if rank == where else None)
        first = trainer.step(*data.values(), **settings_of(config))
        for row in model.table:
            name = row["name"]
            if row["held"]:
                assert np.array_equal(np.asarray(model.parameter(name)), values[name]), name
                assert not np.asarray(trainer.gradient(name)).any(), name
        assert trainer.steps == 0
        return first, trainer.step(*data.values(), **settings_of(config))

    ended = all_well(run_ranks(layout.ranks, work))
    return [each[0] for each in ended], [each[1] for each in ended]


def test_a_fault_of_one_step_leaves_the_others_alone():
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    data, layout = data_of(config, 2), Layout(2, 1, "1f1b")

    def work(rank, comm):
        model = layout.model(config, rank, values)
        fault = ("corrupt", 2, 0, 0.0) if rank == 0 else None
        trainer = layout.trainer(model, comm, 2, fault=fault)
        return [trainer.step(*data.values(), **settings_of(config))["finite"] for _ in range(4)]

    assert all_well(run_ranks(2, work)) == [[True, True, False, True]] * 2


# -- What ranks must agree on --


def outcomes(change, layout=None):
    """Ranks that take a step each, rank 2 with a change of its own: how each ended."""
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    layout = layout or Layout(4, 1, "1f1b")

    def work(rank, comm):
        model = layout.model(config, rank, values)
        trainer = layout.trainer(model, comm, 5)
        data, settings = data_of(config, 5), settings_of(config)
        if rank == 2:
            change(data, settings)
        return trainer.step(*data.values(), **settings)

    return run_ranks(4, work)


def change_token(data, settings):
    data["tokens"][3, 2] = (data["tokens"][3, 2] + 1) % 67


def change_target(data, settings):
    data["targets"][0, 0] = (data["targets"][0, 0] + 1) % 67


def change_order(data, settings):
    for name in ("tokens", "targets"):
        data[name] = np.ascontiguousarray(data[name][[1, 0, 2, 3, 4]])


def change_rate(data, settings):
    settings["learning_rate"] = np.nextafter(1e-2, 1.0)


@pytest.mark.parametrize("change", [change_token, change_target, change_order, change_rate])
def test_ranks_with_different_data_or_rates(change):
    for ended in outcomes(change):
        assert isinstance(ended, ValueError), ended
        assert re.search(r"different data or settings for step 1; give all of them", str(ended))


def change_none(data, settings):
    pass


def test_ranks_with_the_same_data():
    """Negative control."""
    assert all(each["updated"] for each in outcomes(change_none))


def test_the_largest_signal_reaches_all():
    def change(data, settings):
        settings["signal"] = 15

    assert [each["signal"] for each in outcomes(change)] == [15] * 4


@pytest.mark.parametrize("limit", ["max_loss", "max_grad_norm"])
def test_a_spike_is_seen_by_all(limit):
    """The exits that are above the limit may be on any rank."""
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    data = data_of(config, 5)
    losses = train(config, values, Layout(4), [data]).results[0]
    most = max(losses["losses"]) if limit == "max_loss" else losses["grad_norm"]
    for factor, updated in ((0.999, False), (1.0, True)):
        found = train(config, values, Layout(4), [data], **{limit: factor * most})
        assert found.results[0]["updated"] is updated
        assert found.results[0]["finite"]


def test_nothing_to_learn_from():
    def change(data, settings):
        data["targets"][...] = -1

    config, values = MODELS["apart"], values_of(MODELS["apart"])
    data = data_of(config, 5)
    change(data, None)
    with pytest.raises(ValueError, match="all 80 are masked"):
        train(config, values, Layout(4), [data])


# -- What cannot be made --


def refused(text, *, config=None, part=(4, 1, 1, None, False, True), rank=1, size=4, **options):
    model = _core.Model(config or MODELS["apart"], 1, part=part)
    comm = None if size is None else _core.comm_local(size)[rank]
    with pytest.raises(ValueError, match=text):
        _core.Trainer(model, **{"rows": B * T, "microbatches": 5, "comm": comm, **options})


def test_a_part_with_the_wrong_ranks():
    text = "the model is part 1 of 4, the communicator has rank "
    refused(text + "2 of 4", rank=2)
    refused(text + "1 of 3", size=3)
    refused(text + "1 of 8", size=8)
    refused(text + "0 of 1", size=None)
    refused("the model is part 0 of 1, the communicator has rank 1 of 4", part=None)


def test_a_schedule_of_other_ranks():
    for schedule in (Schedule("1f1b", 3, 5), Schedule("interleaved", 4, 5, 2)):
        text = f"{schedule.ranks} ranks with {schedule.chunks} chunks, the model is spread over 4"
        refused(text, schedule=schedule.spec)
    refused("1 ranks with 1 chunks", schedule=Schedule("1f1b", 1, 5).spec)


def deadlocked(schedule):
    """Rank 0 wants a gradient before the second input, rank 1 two inputs before that."""
    lists = [each.copy() for each in schedule.lists]
    for rank, ahead in ((0, 1), (1, 2)):
        f, b = (lists[rank][lists[rank]["kind"] == kind] for kind in (FORWARD, BACKWARD))
        lists[rank] = np.concatenate([f[:ahead], b[:1], f[ahead:], b[1:]])
    return lists


def test_lists_that_cannot_be_run():
    schedule = Schedule("1f1b", 4, 5)
    views = [each.view(np.uint64) for each in deadlocked(schedule)]
    refused("wait for each other", schedule=schedule.spec, lists=views)
    views = [each.view(np.uint64) for each in schedule.lists]
    refused("one for each of 4 ranks, got 3", schedule=schedule.spec, lists=views[:3])
    refused("microbatch 0 is due", schedule=schedule.spec, lists=[each[1:] for each in views])
    refused("the list ends", schedule=schedule.spec, lists=[views[0][:-1], *views[1:]])


# Rank 0 sends on the outputs 3 and 4, which it does not keep, before those that rank 1 wants first.
NO_PLACE = ["F0k F3 F4 F2k F1k B2 B1 B0", "F1k F0k B1 F3 B0 F4", "F0k B0 F3k B3 F4k B4"]
# Rank 1 sends three gradients before the input that rank 0 wants ahead of the first of them.
THREE_GRADIENTS = [
    "F0 F1 F2 F3 F0' F1' F2' F3' B0' B1' B2' B3' B0 B1 B2 B3",
    "F0 F0' F1 F1' F2 F2' B0' B1' B2' F3 F3' B3' B0 B1 B2 B3",
]


def lists_from(texts, schedule):
    """Lists in another order, as "F3k B1'": kind, microbatch, kept or not, second chunk."""
    lists = []
    for mine, text in zip(schedule.lists, texts, strict=True):
        keys = [("FB".index(word[0]), word.endswith("'"), int(word[1])) for word in text.split()]
        place = {(int(a["kind"]), bool(a["chunk"]), int(a["microbatch"])): i
                 for i, a in enumerate(mine)}  # fmt: skip
        assert sorted(keys) == sorted(place)
        lists.append(mine[[place[key] for key in keys]])
    return Schedule(schedule.name, schedule.ranks, schedule.microbatches, schedule.chunks,
                    fill=schedule.fill, exits=schedule.exits, lists=lists).validate()  # fmt: skip


def test_a_list_that_needs_three_buffers():
    config, values = MODELS["gpt2"], values_of(MODELS["gpt2"])
    steps = [data_of(config, 4, seed) for seed in range(2)]
    schedule = lists_from(THREE_GRADIENTS, Schedule("interleaved", 2, 4, 2))
    wanted = train(config, values, Layout(), steps)
    check_same(train(config, values, Layout(2, 2, schedule), steps), wanted)


def test_outputs_that_find_no_place():
    """Refused when the trainer is made, on every rank; or run as the walk has it."""
    named = Schedule("1f1b", 3, 1, fill=(2, 2), exits=(0, 1))
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    steps = [data_of(config, 5)]
    try:
        schedule = lists_from(NO_PLACE, named)
        found = train(config, values, Layout(3, 1, schedule), steps)
    except ValueError as error:
        assert "rank 0, action 2 (forward of microbatch 4" in str(error)
    else:
        check_same(found, train(config, values, Layout(3, 1, named), steps))


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ((9, 1, 0, None, False, True), "8 layers cannot be split into 9 ranks with 1 chunks"),
        ((4, 3, 0, None, False, True), "8 layers cannot be split into 4 ranks with 3 chunks"),
        ((0, 1, 0, None, False, True), "spread over 1 to 65536 ranks"),
        ((2, 1, 2, None, False, True), "the ranks of the pipeline are 0 to 1, got 2"),
        ((2, 1, -1, None, False, True), "the ranks of the pipeline are 0 to 1, got -1"),
        ((2, 1, 0, np.array([0, 8, 8], np.int32), False, True), "ascend from 0 to the 8 layers"),
        ((2, 1, 0, np.array([1, 4, 8], np.int32), False, True), "ascend from 0 to the 8 layers"),
        ((2, 1, 0, np.array([0, 4, 7], np.int32), False, True), "ascend from 0 to the 8 layers"),
        ((2, 1, 0, np.array([0, 8], np.int32), False, True), "bounds: dimension 0 must be 3"),
    ],
)
def test_parts_that_are_none(part, text):
    with pytest.raises(ValueError, match=text):
        _core.Model(MODELS["apart"], 1, part=part)


def test_parameters_of_other_ranks():
    """Not held: neither read nor written, and no gradient."""
    model = _core.Model(MODELS["apart"], 1, part=(4, 1, 1, None, False, True))
    for view in (model.parameter, Layout(4).trainer(model, _core.comm_local(4)[1], 5).gradient):
        with pytest.raises((KeyError, ValueError)) as error:
            view("lm_head.weight")
        assert "lm_head.weight" in str(error.value)
        assert np.asarray(view("model.layers.2.mlp.up_proj.weight")).size


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
