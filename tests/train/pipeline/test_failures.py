"""Ranks that sleep, die, compute nonsense, disagree or meet an error."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eellm import _core
from tests.train.pipeline.common import (
    MODELS,
    NAMES,
    Layout,
    all_well,
    check_same,
    data_of,
    layout_of,
    run_ranks,
    settings_of,
    train,
    values_of,
)

ROOT = Path(__file__).resolve().parents[3]
_, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)


# -- Faults --


KIND = r"\(tag \d+, (forward|backward) of microbatch \d\)$"
OVERDUE = [
    rf"^rank (\d): no message from rank (\d) within 0.8 s {KIND}",
    rf"^rank (\d): rank (\d) did not receive a message within 0.8 s {KIND}",
]


@pytest.mark.parametrize("sleeper,action", [(0, 0), (1, 2), (2, 5), (3, 1)])
def test_a_rank_that_sleeps(sleeper, action):
    """All ranks end with one and the same reason: who waited for whom, for what. Waits that began
    together end together: any of them, of a rank for its neighbour on the side of the sleeper."""
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    data, layout = data_of(config, 5), Layout(4, 1, "1f1b")

    def work(rank, comm):
        model = layout.model(config, rank, values)
        fault = ("delay", 1, action, 3.0) if rank == sleeper else None
        trainer = layout.trainer(model, comm, 5, fault=fault)
        trainer.step(*data.values(), **settings_of(config))
        comm.timeout = 0.8
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


def change_last_bit(data, settings):
    settings["learning_rate"] = np.nextafter(1e-2, 0.0)


CHANGES = [change_token, change_target, change_order, change_rate, change_last_bit]


@pytest.mark.parametrize("change", CHANGES)
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


ERRORS = [("step", "tokens", 67), ("step", "targets", 67), ("evaluate", "tokens", -1),
          ("evaluate", "targets", 67)]  # fmt: skip


@pytest.mark.parametrize("microbatch", [0, 1, 4])
@pytest.mark.parametrize(
    "chunks,name", [(1, "zero_bubble"), (2, "interleaved"), (4, "interleaved")]
)
@pytest.mark.parametrize("what,key,value", ERRORS)
def test_one_rank_goes_on_after_an_error(what, key, value, chunks, name, microbatch):
    """As if the call had not been; its chunks may have had messages to each other under way."""
    config, values = MODELS["gpt2"], values_of(MODELS["gpt2"])
    layout, data, more = Layout(1, chunks, name), data_of(config, 5), data_of(config, 5, 9)
    bad = {name: array.copy() for name, array in data.items()}
    bad[key][microbatch, 9] = value
    model = layout.model(config, 0, values)
    trainer = layout.trainer(model, None, 5)
    with pytest.raises(ValueError, match=r"(token|target)\[9\] must"):
        if what == "step":
            trainer.step(*bad.values(), **settings_of(config))
        else:
            trainer.evaluate(*(bad[name] for name in bad if name != "row_ids"))
    wanted = train(config, values, Layout(), [data], evaluate=more)
    result = trainer.step(*data.values(), **settings_of(config))
    assert result == wanted.results[0]
    found = trainer.evaluate(*(more[name] for name in more if name != "row_ids"))
    assert all(np.array_equal(found[key], wanted.evaluation[key]) for key in found)


@pytest.mark.parametrize("key,value,finder", [("tokens", 67, 0), ("targets", 67, 3)])
def test_an_error_of_one_rank_ends_all_at_once(key, value, finder):
    """All have the same bad data; one of them sees that first, and says so to the others."""
    config, values = MODELS["apart"], values_of(MODELS["apart"])
    data, layout = data_of(config, 5), Layout(4, 1, "gpipe")
    data[key][2, 9] = value

    def work(rank, comm):
        model = layout.model(config, rank, values)
        trainer = layout.trainer(model, comm, 5)
        comm.timeout = 3.0
        with pytest.raises((ValueError, _core.CommError)) as error:
            trainer.step(*data.values(), **settings_of(config))
        return error.value

    ended = all_well([[each] for each in run_ranks(4, work)])
    assert all(f"{key[:-1]}[9] must" in str(each) for (each,) in ended), ended
    assert isinstance(ended[finder][0], ValueError)


KILLED = """
from eellm import _core
from tests.train.pipeline.common import MODELS, Layout, data_of, settings_of, values_of
config, layout = MODELS["apart"], Layout()
model = layout.model(config, 0, values_of(config))
trainer = layout.trainer(model, None, 2, fault=("kill", 1, 2, 0.0))
for i in range(2):
    trainer.step(*data_of(config, 2).values(), **settings_of(config))
    print("step", i, flush=True)
"""


def test_a_rank_that_is_killed():
    """At the action of the run that was asked for, not sooner."""
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, cwd=ROOT,
                          timeout=60)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "step 0\n"


@pytest.mark.parametrize("fault", ["delay", ("sleep", 0, 0, 1.0), ("delay", 0, 0), ("kill", "x")])
def test_faults_that_are_none(fault):
    config = MODELS["apart"]
    with pytest.raises((TypeError, ValueError), match="fault"):
        _core.Trainer(_core.Model(config, 1), rows=4, microbatches=1, fault=fault)
