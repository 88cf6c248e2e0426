"""Traces: which messages were under way when, and Chrome's format."""

import json
from itertools import pairwise

import numpy as np
import pytest

from eellm import _core
from eellm.parallel import run_local
from eellm.pipeline import Costs, Schedule
from eellm.pipeline.replay import Times, replay_local
from eellm.pipeline.trace import (
    RankTrace,
    chrome_events,
    overlap,
    overlap_share,
    save,
    transfers,
    write_trace,
)

ACTION, WAIT, SEND, RECEIVE = range(4)


def event(kind, start, end, what=-1, microbatch=-1, peer=-1, tag=-1, chunk=-1, size=0):
    return [start, end, size, kind, what, chunk, microbatch, peer, tag]


def action(start, end, what, microbatch):
    return event(ACTION, start, end, what, microbatch, chunk=0)


@pytest.fixture
def two_ranks():
    """Two messages from rank 0 to rank 1: 3 s of the first and 1 s of the second lie behind an
    action of rank 1; the receiver posts the first late, the second early."""
    first = [
        action(10, 12, 0, 0),
        event(SEND, 12, 17.5, microbatch=0, peer=1, tag=4, size=100),
        action(12, 14, 0, 1),
        event(SEND, 14, 21, microbatch=1, peer=1, tag=4, size=100),
        event(WAIT, 14, 20),
    ]
    second = [
        action(10, 16, 0, 8),
        event(RECEIVE, 13, 17, microbatch=0, peer=0, tag=4, size=100),
        event(RECEIVE, 11, 20, microbatch=1, peer=0, tag=4, size=100),
        action(17, 18, 0, 0),
    ]
    # In order of their posts, the receive of microbatch 1 would be first.
    second[2][0], second[1][0] = 13.5, 13
    return [RankTrace(0, np.array(first, float)), RankTrace(1, np.array(second, float), "last")]


def test_transfers(two_ranks):
    found = transfers(two_ranks)
    assert [(t.source, t.target, t.start, t.end, t.microbatch) for t in found] == [
        (0, 1, 13, 17, 0),
        (0, 1, 14, 20, 1),
    ]


def test_overlap(two_ranks):
    # 13 to 16 and 14 to 16, 17 to 18.
    assert overlap(two_ranks) == (10.0, 6.0)
    assert overlap_share(two_ranks) == 0.6
    # Without actions nothing is behind them.
    bare = [RankTrace(each.rank, each.events[each.events[:, 3] != ACTION]) for each in two_ranks]
    assert overlap(bare) == (10.0, 0.0)
    assert overlap_share([]) == 1.0


def test_other_tags_and_lost_ends(two_ranks):
    """A message whose other end was not recorded is left out."""
    events = two_ranks[1].events.copy()
    events[1, 8] = 6
    found = transfers([two_ranks[0], RankTrace(1, events)])
    assert [(t.tag, t.sent) for t in found] == [(4, 12)]


def slices(events, category):
    return [each for each in events if each["ph"] == "X" and each["cat"] == category]


def test_chrome_events(two_ranks):
    events = list(chrome_events(two_ranks))
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "rank 0", 1: "rank 1 (last)"}
    acts = slices(events, "actions")
    assert [(e["name"], e["pid"], e["ts"], e["dur"]) for e in acts] == [
        ("forward 0", 0, 0, 2e6),
        ("forward 1", 0, 2e6, 2e6),
        ("forward 8", 1, 0, 6e6),
        ("forward 0", 1, 7e6, 1e6),
    ]
    received = slices(events, "receives")
    assert [(e["name"], e["ts"], e["dur"]) for e in received] == [
        ("output 0", 3e6, 4e6),
        ("output 1", 4e6, 6e6),
    ]
    # They overlap, so that they stand in rows of their own.
    assert received[0]["tid"] != received[1]["tid"]
    assert received[0]["args"]["bytes"] == 100 and received[0]["args"]["from"] == 0


def check_file(path, ranks):
    """What a viewer needs: slices of a row that do not overlap, arrows that begin and end in a
    slice, names for all rows."""
    events = json.loads(path.read_text())["traceEvents"]
    rows, named = {}, set()
    for each in events:
        if each["ph"] == "X":
            rows.setdefault((each["pid"], each["tid"]), []).append((each["ts"], each["dur"]))
        elif each["name"] == "thread_name":
            named.add((each["pid"], each["tid"]))
    assert set(rows) <= named and {pid for pid, _ in rows} == set(range(ranks))
    for spans in rows.values():
        spans.sort()
        for (start, length), (after, _) in pairwise(spans):
            assert start + length <= after + 2e-3  # rounded to nanoseconds
    arrows = {}
    for each in events:
        if each["ph"] in "sf":
            spans = rows[each["pid"], each["tid"]]
            assert any(a - 1e-2 <= each["ts"] <= a + n + 1e-2 for a, n in spans)
            arrows.setdefault(each["id"], []).append((each["ph"], each["ts"]))
    for ends in arrows.values():
        assert [ph for ph, _ in ends] == ["s", "f"] and ends[0][1] <= ends[1][1]
    return events, arrows


@pytest.mark.parametrize("name,chunks", [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)])
def test_of_a_replay(tmp_path, name, chunks):
    schedule = Schedule(name, 3, 4, chunks)
    costs = Costs.uniform(3, chunks, 3e-3, 6e-3)
    found = replay_local(Times.of(schedule, costs), steps=1, warmup=1, trace=True)
    save(tmp_path / "trace.json", found.trace)
    events, arrows = check_file(tmp_path / "trace.json", 3)
    # Every action and message of the step, and nothing twice.
    assert len(slices(events, "actions")) == sum(len(each) for each in schedule.lists)
    sent = sum(int(np.count_nonzero(each["flags"] & 2)) for each in schedule.lists)
    assert len(arrows) == len(slices(events, "sends")) == len(slices(events, "receives")) == sent
    total, behind = overlap(found.trace)
    assert 0 <= behind <= total


def test_of_training(tmp_path):
    """The same writer takes what a trainer recorded; every rank calls it."""
    path = tmp_path / "trace.json"

    def work(group):
        comm = group.comm
        made = _core.Replay(Schedule("gpipe", 2, 3).spec, np.full((4, 1), 1e-3), comm, 4096)
        made.record(1000)
        made.run()
        return write_trace(path, comm, made.recorded(), f"part {comm.rank}")

    ranks = run_local(2, work)
    assert [each.name for each in ranks[1]] == ["part 0", "part 1"]
    events, _ = check_file(path, 2)
    assert len(slices(events, "actions")) == 12


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("old")
    broken = RankTrace(0, np.array([action(0, np.nan, 0, 0)]))
    with pytest.raises(ValueError):
        save(path, [broken])
    assert path.read_text() == "old"
