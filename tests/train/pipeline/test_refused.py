"""Parts, schedules and lists that cannot be made, and lists that are hard to run."""

import numpy as np
import pytest

from eellm import _core
from eellm.pipeline import Schedule
from tests.train.pipeline.common import MODELS, B, Layout, T, check_same, data_of, train, values_of

FORWARD, BACKWARD = range(2)


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
    except NotImplementedError as error:
        assert "outputs on their way at a time" in str(error)
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
