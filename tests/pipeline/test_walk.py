"""The walk against a graph of all actions: times, slots, and what it refuses."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eellm.pipeline import ACTION, Costs, Schedule
from tests.pipeline import reference

QUICK = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def schedules(draw, most_ranks=6, most_microbatches=9):
    name = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero_bubble"]))
    ranks = draw(st.integers(1, most_ranks))
    microbatches = draw(st.integers(1, most_microbatches))
    chunks = draw(st.integers(1, 3)) if name == "interleaved" else 1
    options = {}
    if name == "1f1b":
        options["fill"] = tuple(draw(st.integers(0, ranks - 1)) for _ in range(2))
        options["exits"] = draw(st.sets(st.integers(0, ranks - 1)))
        options["ratio"] = draw(st.sampled_from([0.5, 1.0, 2.0, 3.0]))
    return Schedule(name, ranks, microbatches, chunks, **options)


def random_costs(schedule, seed):
    random = np.random.default_rng(seed)
    parts = schedule.ranks * schedule.chunks
    names = (
        "forward", "backward", "backward_input", "backward_weight", "kept_bytes", "queued_bytes",
        "transient_bytes",
    )  # fmt: skip
    values = {name: random.random(parts) for name in names}
    return Costs(
        ranks=schedule.ranks,
        chunks=schedule.chunks,
        static_bytes=random.random(schedule.ranks),
        message=float(random.random() * random.integers(0, 2)),
        **values,
    )


def peak(actions, costs, rank, ranks):
    """The most bytes at a time, counted action by action."""
    held = most = costs.static_bytes[rank]
    for kind, flags, chunk, _ in actions:
        kept = costs.kept_bytes[chunk * ranks + rank]
        queued = costs.queued_bytes[chunk * ranks + rank]
        held += kept * bool(flags & reference.KEEPS)
        held += queued * (kind == reference.BACKWARD_INPUT)
        transient = costs.transient_bytes[chunk * ranks + rank] if kind else 0.0
        if kind == reference.FORWARD and not flags & reference.KEEPS:
            transient = kept
        most = max(most, held + transient)
        held -= kept * (kind in (reference.BACKWARD, reference.BACKWARD_INPUT))
        held -= queued * (kind == reference.BACKWARD_WEIGHT)
    return most


@QUICK
@given(schedules(), st.integers(0, 10**6))
def test_times_and_memory_are_those_of_the_graph(schedule, seed):
    costs = random_costs(schedule, seed)
    result = schedule.simulate(costs)
    lists = reference.Lists(schedule)
    found = reference.times(lists, costs)
    for rank, actions in enumerate(lists.lists):
        wanted = [found[(rank, i)] for i in range(len(actions))]
        assert result.times(rank).tolist() == [list(each) for each in wanted]
        assert result.end[rank] == (wanted[-1][1] if wanted else 0.0)
        assert result.busy[rank] == pytest.approx(sum(end - start for start, end in wanted))
        assert result.slots[rank] == reference.slots(actions)
        assert result.peak_bytes[rank] == pytest.approx(
            peak(actions, costs, rank, schedule.ranks), rel=1e-12
        )
    assert result.time == max(end for _, end in found.values())


def refused(schedule, lists):
    """Whether lists are refused, by the walk; the graph must say the same."""
    try:
        reference.times(reference.Lists(schedule, lists))
        wanted = False
    except reference.RefusedError:
        wanted = True
    changed = Schedule(
        schedule.name, schedule.ranks, schedule.microbatches, schedule.chunks, fill=schedule.fill,
        ratio=schedule.ratio, exits=schedule.exits, lists=lists,
    )  # fmt: skip
    try:
        changed.validate()
    except ValueError as error:
        assert "rank" in str(error)
        assert wanted, f"refused without need: {error}"
        return True
    assert not wanted, "lists that cannot be run were accepted"
    return False


def mutate(lists, how, rank, i, j):
    """Lists with one change; None where it changes nothing."""
    lists = [each.copy() for each in lists]
    mine = lists[rank % len(lists)]
    if len(mine) == 0:
        return None
    i, j = i % len(mine), j % len(mine)
    if how == "swap":
        mine[[i, j]] = mine[[j, i]]
    elif how == "neighbours":
        j = (i + 1) % len(mine)
        mine[[i, j]] = mine[[j, i]]
    elif how == "drop":
        mine = np.delete(mine, i)
    elif how == "duplicate":
        mine = np.insert(mine, j, mine[i])
    elif how == "flags":
        mine["flags"][i] ^= 1 << (j % 3)
    elif how == "kind":
        mine["kind"][i] = (int(mine["kind"][i]) + 1 + j % 3) % 4
    elif how == "microbatch":
        mine["microbatch"][i] = mine["microbatch"][j]
    else:
        mine["chunk"][i] += 1
    before = lists[rank % len(lists)]
    lists[rank % len(lists)] = mine
    if how in ("swap", "neighbours") and i == j:
        return None
    return lists if before is not mine or how != "microbatch" or i != j else None


HOWS = ["swap", "neighbours", "drop", "duplicate", "flags", "kind", "microbatch", "chunk"]
PLACES = st.integers(0, 1 << 16)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(schedules(4, 6), st.sampled_from(HOWS), PLACES, PLACES, PLACES)
@example(Schedule("1f1b", 3, 4, fill=(2, 2), exits=(0, 1)), "flags", 0, 3, 2)
def test_a_changed_list_is_refused_or_as_good(schedule, how, rank, i, j):
    """Whatever the walk accepts, the graph proves: the same work, in an order that can be run."""
    lists = mutate(schedule.lists, how, rank, i, j)
    if lists is None:
        return
    if refused(schedule, lists):
        return
    # Another order of the same actions, or a change of nothing.
    assert reference.counted(lists) == reference.counted(schedule.lists)


@pytest.mark.parametrize("how", ["drop", "duplicate", "flags", "chunk"])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_no_action_can_be_lost_doubled_or_changed(name, how):
    schedule = Schedule(name, 3, 4, 2 if name == "interleaved" else 1)
    for rank in range(3):
        for i in range(len(schedule.actions(rank))):
            for j in range(3):
                assert refused(schedule, mutate(schedule.lists, how, rank, i, i + j))


def test_the_naive_order_deadlocks():
    """Rank 0 wants a gradient before it sends a second input, rank 1 two inputs before that."""
    lists = Schedule("1f1b", 4, 6).lists
    forwards = [each[each["kind"] == 0] for each in lists]
    backwards = [each[each["kind"] == 1] for each in lists]
    for rank, ahead in ((0, 1), (1, 2)):
        f, b = forwards[rank], backwards[rank]
        lists[rank] = np.concatenate([f[:ahead], b[:1], f[ahead:], b[1:]])
    with pytest.raises(ValueError, match=r"rank \d, action \d+ .*wait for each other"):
        Schedule("1f1b", 4, 6, lists=lists).validate()
    assert refused(Schedule("1f1b", 4, 6), lists)


@pytest.mark.parametrize(
    ("rank", "change", "text"),
    [
        (1, lambda a: np.delete(a, 0), "rank 1, action 0 .*microbatch 0 is due"),
        (0, lambda a: a[:-1], "rank 0, chunk 0: the list ends after 5 forwards, 4 backwards"),
        (1, lambda a: np.insert(a, 1, a[0]), "rank 1, action 1 .*microbatch 1 is due"),
        (1, lambda a: a[::-1], "rank 1, action 0 .*microbatch 0 is due"),
        (2, lambda a: a[[1, 0, *range(2, len(a))]], "rank 2, action 0 .*its forward has not run"),
    ],
)
def test_errors_name_rank_and_action(rank, change, text):
    lists = Schedule("1f1b", 3, 5).lists
    lists[rank] = change(lists[rank])
    with pytest.raises(ValueError, match=text):
        Schedule("1f1b", 3, 5, lists=lists).validate()


@pytest.mark.parametrize(("field", "value"), [("kind", 4), ("kind", 255), ("flags", 8)])
def test_kinds_and_flags_that_are_none(field, value):
    lists = [each.copy() for each in Schedule("1f1b", 2, 2).lists]
    lists[1][field][2] = value
    with pytest.raises(ValueError, match=f"{field} of rank 1, action 2 is invalid"):
        Schedule("1f1b", 2, 2, lists=lists)


def test_lists_are_as_the_core_lays_them_out():
    actions = Schedule("1f1b", 2, 2).actions(0)
    assert ACTION.itemsize == 8 and not actions.flags.writeable
    assert actions.tolist() == [(0, 6, 0, 0), (0, 6, 0, 1), (1, 1, 0, 0), (1, 1, 0, 1)]
