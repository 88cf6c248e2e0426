"""Replays: the runner and the messages of a schedule, with waits in place of its actions."""

import json
import sys
import threading

import numpy as np
import pytest

from eellm import _core
from eellm.cli import main
from eellm.pipeline import Costs, Schedule
from eellm.pipeline.replay import Times, replay_local
from tests.cli.common import eellm, error_line
from tests.mpi.common import needs_mpi
from tests.mpi.common import run as run_command

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)]
KINDS = ("forward", "backward", "backward_input", "backward_weight")


def times_of(schedule, forward=2e-3, size=1 << 16, **costs):
    made = Costs.uniform(schedule.ranks, schedule.chunks, forward, 2 * forward, **costs)
    return Times.of(schedule, made, message_bytes=size)


@pytest.mark.parametrize("name,chunks", SCHEDULES)
@pytest.mark.parametrize("ranks,microbatches", [(1, 3), (3, 2), (4, 8)])
def test_every_schedule(name, chunks, ranks, microbatches):
    times = times_of(Schedule(name, ranks, microbatches, chunks))
    found = replay_local(times, steps=3, warmup=1, timeout=30)
    # Waits are as long as they should be on average, and nothing is quicker than the simulation.
    # How much is slower depends on what else the machine does; ranks one after the other would
    # take up to four times as long.
    assert found.simulated.time == times.simulate().time
    assert found.steps.min() > 0.97 * found.simulated.time
    assert found.steps.min() < 2.5 * found.simulated.time
    assert (found.busy > 0.97 * found.simulated.busy).all()


def test_times_of_single_chunks():
    """Each rank, chunk and kind of action takes its own time."""
    schedule = Schedule("zero_bubble", 2, 1)
    seconds = {kind: np.zeros(2) for kind in KINDS}
    for i, kind in enumerate(("forward", "backward_input", "backward_weight")):
        seconds[kind] = 1e-3 * np.array([1 + i, 10 + 10 * i])
    found = replay_local(Times(schedule=schedule, seconds=seconds), steps=5, trace=True)
    median = {}
    for each in found.trace:
        for event in each.of(0):
            median[each.rank, KINDS[int(event[4])]] = event[1] - event[0]
    for (rank, kind), measured in median.items():
        wanted = seconds[kind][rank]
        assert 0.9 * wanted < measured < wanted + 8e-3, (rank, kind)
    assert len(median) == 6


def test_bubble_filling_and_exits():
    schedule = Schedule("1f1b", 4, 6, fill="auto", exits=(0, 1, 2))
    found = replay_local(
        times_of(schedule, exits=(0, 1, 2), exit=(1e-3, 1e-3)), steps=2, warmup=1, timeout=30
    )
    assert found.seconds > 0.97 * found.simulated.time


def test_lists_of_a_file(tmp_path):
    """An edited list is run in place of that of the name."""
    gpipe = Schedule("gpipe", 2, 3)
    edited = Schedule("1f1b", 2, 3, lists=gpipe.lists)
    path = tmp_path / "times.json"
    times_of(edited).save(path)
    times = Times.load(path)
    assert times.schedule == edited and times.schedule.custom
    found = replay_local(times, steps=1, trace=True)
    kinds = found.trace[0].of(0)[:, 4]
    assert kinds.tolist() == [0, 0, 0, 1, 1, 1]


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "times.json"
    times = times_of(Schedule("interleaved", 2, 4, 2, exits=(1,)), message=1e-4)
    times.save(path)
    again = Times.load(path)
    assert again.schedule == times.schedule and again.message_seconds == 1e-4
    assert all(np.array_equal(again.seconds[kind], times.seconds[kind]) for kind in KINDS)
    assert again.simulate().time == times.simulate().time


def edited(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change,named",
    [
        (lambda v: v.pop("seconds"), "seconds is invalid"),
        (lambda v: v["seconds"].pop("backward"), "backward"),
        (lambda v: v["seconds"].update(forward=[1.0] * 3), "forward has the wrong length"),
        (lambda v: v["seconds"].update(forward=[-1.0, 1.0]), "forward is invalid"),
        (lambda v: v["seconds"].update(forward=[1e9, 1.0]), "3600"),
        (lambda v: v["seconds"].update(sideways=[1.0, 1.0]), "sideways"),
        (lambda v: v.update(message_bytes=4), "message_bytes"),
        (lambda v: v.update(message_bytes=True), "message_bytes"),
        (lambda v: v.update(message_seconds=-1), "message_seconds"),
        (lambda v: v.update(format_version=2), "format_version"),
        (lambda v: v.update(more=1), "unknown key"),
        (lambda v: v["schedule"].update(lists=["F0:sk", "F0:rk B0:rs"]), "rank 1, action 1"),
        (lambda v: v["schedule"].update(ranks=0), "ranks"),
    ],
)
def test_refused_files(tmp_path, change, named):
    path = tmp_path / "times.json"
    times_of(Schedule("1f1b", 2, 2)).save(path)
    edited(path, change)
    with pytest.raises(ValueError, match=r"times\.json") as error:
        Times.load(path)
    assert named in str(error.value)


def test_no_json(tmp_path):
    path = tmp_path / "times.json"
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="JSON"):
        Times.load(path)


def test_too_many_ranks():
    with pytest.raises(ValueError, match="ranks"):
        times_of(Schedule("1f1b", 17, 2))


def test_the_core_refuses():
    spec = Schedule("1f1b", 1, 2).spec
    comm = _core.comm_self()
    seconds = np.zeros((4, 1))
    with pytest.raises(ValueError, match="dimension 1"):
        _core.Replay(spec, np.zeros((4, 2)), comm, 16)
    with pytest.raises(ValueError, match="3600"):
        _core.Replay(spec, seconds - 1, comm, 16)
    with pytest.raises(ValueError, match="bytes"):
        _core.Replay(spec, seconds, comm, 0)
    with pytest.raises(ValueError, match="ranks"):
        _core.Replay(Schedule("1f1b", 2, 2).spec, seconds, comm, 16)
    with pytest.raises(TypeError, match="comm"):
        _core.Replay(spec, seconds, None, 16)
    wrong = [Schedule("1f1b", 1, 2).actions(0)[::-1].copy().view(np.uint64)]
    with pytest.raises(ValueError, match="rank 0"):
        _core.Replay(spec, seconds, comm, 16, wrong)
    empty = _core.Replay.__new__(_core.Replay)
    with pytest.raises(_core.Error, match="not initialised"):
        empty.run()
    made = _core.Replay(spec, seconds, comm, 16)
    with pytest.raises(_core.Error, match="already"):
        made.__init__(spec, seconds, comm, 16)


def test_no_allocation_after_warm_up():
    comm = _core.comm_self()
    made = _core.Replay(Schedule("interleaved", 1, 4, 3).spec, np.zeros((4, 3)), comm, 1000)
    made.run()
    before = _core.alloc_stats()[0]
    for _ in range(3):
        made.run()
    assert _core.alloc_stats()[0] == before


def test_a_rank_that_does_not_come():
    """The others give up, and name it."""
    comms = _core.comm_local(2, timeout=0.3)
    spec = Schedule("1f1b", 2, 2).spec
    made = _core.Replay(spec, np.zeros((4, 1)), comms[0], 100)
    errors = []

    def run():
        try:
            made.run()
        except _core.CommError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert len(errors) == 1 and "start of a replayed step" in errors[0]


# -- The command --------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    times, trace = tmp_path / "times.json", tmp_path / "trace.json"
    shape = ("--name", "interleaved", "--ranks", "2", "--microbatches", "4", "--chunks", "2")
    assert main(["schedule", *shape, "--unit", "0.002", "--save-times", str(times)]) == 0
    assert f"wrote {times}" in capsys.readouterr().out
    arguments = ["schedule", "--replay", str(times), "--steps", "2", "--trace", str(trace)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "2 ranks (local)" in text and "of the measured time" in text and str(trace) in text
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["transport"] == "local" and len(found["steps"]) == 2
    assert found["simulated_seconds"] == pytest.approx(0.002 * 3 * (4 + 0.5))
    assert 0 <= found["overlap_share"] <= 1
    assert json.loads(trace.read_text())["traceEvents"]


def test_times_of_a_config(tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text(
        '[model]\nmodel_type = "gpt2"\nvocab_size = 1000\nhidden_size = 64\nnum_hidden_layers = 4\n'
        "num_attention_heads = 4\nmax_position_embeddings = 64\n[train]\nseq_length = 32\n"
        "micro_batch_size = 2\n"
    )
    times = tmp_path / "times.json"
    arguments = ["schedule", "--ranks", "2", "--config", str(config), "--save-times", str(times)]
    assert main(arguments) == 0
    assert Times.load(times).message_bytes == 4 * 2 * 32 * 64
    assert "unit" in error_line(eellm(*arguments, "--unit", "1"), 2)


def test_wrong_calls(tmp_path):
    times = tmp_path / "times.json"
    times_of(Schedule("1f1b", 2, 2)).save(times)
    line = error_line(eellm("schedule", "--replay", times, "--ranks", "2"), 2)
    assert "--ranks" in line and "--replay" in line
    assert "--trace" in error_line(eellm("schedule", "--trace", "x.json"), 2)
    assert "steps" in error_line(eellm("schedule", "--replay", times, "--steps", "0"), 2)
    assert "none.json" in error_line(eellm("schedule", "--replay", "none.json"), 2)


@needs_mpi
def test_four_processes(tmp_path):
    """Under mpirun, with messages of 1 MiB."""
    times, trace = tmp_path / "times.json", tmp_path / "trace.json"
    times_of(Schedule("zero_bubble", 4, 8), 4e-3, 1 << 20).save(times)
    command = [sys.executable, "-m", "eellm", "launch", "-n", "4", "--", "schedule", "--replay"]
    ended = run_command([*command, times, "--json", "--trace", trace])
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    assert found["transport"] == "mpi" and len(found["ranks"]) == 4
    assert 0.3 < found["simulated_over_measured"] < 1.03
    pids = {each["pid"] for each in json.loads(trace.read_text())["traceEvents"]}
    assert pids == {0, 1, 2, 3}
    # As many ranks as the file says.
    command[command.index("4")] = "2"
    ended = run_command([*command, times])
    assert ended.status == 2 and len(ended.errors) == 1 and "4 ranks" in ended.errors[0]
