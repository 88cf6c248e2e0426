"""The transport of threads, through the Python object: messages and reductions against NumPy."""

import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eellm
from eellm import _core
from tests.comm.common import content, exchange_plan, run_ranks, succeed, wrong_messages

DTYPES = [np.float32, np.float64, np.int32, np.int64]
SIZES = st.one_of(st.integers(0, 64), st.integers(0, 40_000), st.just(1 << 20))


@st.composite
def plans(draw):
    """Ranks, and messages between them: at most a few of one megabyte."""
    ranks = draw(st.integers(1, 4))
    rank = st.integers(0, ranks - 1)
    return ranks, draw(st.lists(st.tuples(rank, rank, st.integers(0, 2), SIZES), max_size=24))


@settings(max_examples=40, deadline=None)
@given(plans())
def test_messages_arrive(case):
    ranks, plan = case
    assert succeed(ranks, lambda comm: exchange_plan(comm, plan)) == [[]] * ranks


def test_swapped_messages_are_seen():
    """Negative control: the same messages, two of which took each other's place."""
    plan = [(0, 1, 1, 50_000), (0, 1, 1, 50_000), (0, 1, 2, 10)]

    def swapped(comm):
        if comm.rank == 0:
            order = (1, 0, 2)
            comm.exchange([(1, plan[i][2], content(i, plan[i][3])) for i in order], [])
            return []
        arrived = {i: np.zeros(plan[i][3], np.uint8) for i in range(3)}
        comm.exchange([], [(0, plan[i][2], arrived[i]) for i in range(3)])
        return wrong_messages(plan, arrived)

    assert succeed(2, swapped)[1] == [0, 1]
    assert wrong_messages(plan, {2: content(2, 10) ^ np.uint8(1)}) == [2]


def values(dtype, rank, count):
    rng = np.random.default_rng([rank, count])
    if np.issubdtype(dtype, np.integer):
        return rng.integers(-(10**6), 10**6, count).astype(dtype)
    return (rng.standard_normal(count) * 10.0 ** rng.integers(-3, 4, count)).astype(dtype)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce(dtype, ranks):
    counts = [0, 1, 7, 1000, 50_021]

    def body(comm):
        results = []
        for count in counts:
            for op in ("sum", "max"):
                array = values(dtype, comm.rank, count)
                assert comm.all_reduce(array, op) is array
                results.append(array)
        return results

    by_rank = succeed(ranks, body)
    for i, (count, op) in enumerate((count, op) for count in counts for op in ("sum", "max")):
        expected = values(dtype, 0, count)
        for rank in range(1, ranks):
            more = values(dtype, rank, count)
            expected = expected + more if op == "sum" else np.maximum(expected, more)
        # To the bit, on every rank: the sum is taken in rank order.
        assert all(results[i].tobytes() == expected.tobytes() for results in by_rank)


def test_sum_is_in_rank_order():
    """Negative control of the test above: another order gives other bits."""
    rows = [values(np.float32, rank, 50_021) for rank in range(3)]
    assert ((rows[0] + rows[1]) + rows[2]).tobytes() != (rows[0] + (rows[1] + rows[2])).tobytes()


def test_all_reduce_of_special_values():
    def body(comm):
        x = np.array([np.nan if comm.rank == 1 else 1.0, np.inf, 0.0])
        big = np.array([np.iinfo(np.int32).max], np.int32)
        matrix = np.full((2, 3), comm.rank, np.int64)
        return comm.all_reduce(x, "max"), comm.all_reduce(big), comm.all_reduce(matrix, op="max")

    for x, big, matrix in succeed(3, body):
        assert np.isnan(x[0]) and x[1] == np.inf and x[2] == 0
        assert big[0] == np.int64(3 * (2**31 - 1)).astype(np.int32)
        assert (matrix == 2).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.binary(max_size=100), min_size=1, max_size=4), st.data())
def test_bytes(parts, data):
    root = data.draw(st.integers(0, len(parts) - 1))

    def body(comm):
        given = parts[comm.rank] if comm.rank == root else None
        return comm.all_gather(parts[comm.rank]), comm.broadcast(given, root)

    assert succeed(len(parts), body) == [(parts, parts[root])] * len(parts)


def test_large_bytes():
    parts = [content(rank, 300_000 * rank).tobytes() for rank in range(3)]
    results = succeed(3, lambda c: (c.all_gather(parts[c.rank]), c.broadcast(parts[c.rank], 2)))
    assert results == [(parts, parts[2])] * 3


def test_split():
    def body(comm):
        comm.timeout = 20 + comm.rank
        comm.polling = comm.rank / 8
        part = comm.split(-1 if comm.rank == 3 else comm.rank % 2, -comm.rank)
        if part is None:
            return None
        total = part.all_reduce(np.array([comm.rank]))
        return part.rank, part.size, part.timeout, part.polling, part.transport, int(total[0])

    assert succeed(4, body) == [(1, 2, 20, 0, "local", 2), (0, 1, 21, 0.125, "local", 1),
                                (0, 2, 22, 0.25, "local", 2), None]  # fmt: skip


def test_equal_keys_keep_the_order_of_ranks():
    assert succeed(4, lambda comm: comm.split(0, 7).rank) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            lambda comm: comm.exchange([], [(0, 2, np.zeros(4))]),
            "rank 1: no message from rank 0 within 0.25 s (tag 2)",
        ),
        (
            lambda comm: comm.exchange([(0, 2, np.zeros(40_000))], []),
            "rank 1: rank 0 did not receive a message within 0.25 s (tag 2)",
        ),
        (
            lambda comm: comm.barrier("end of epoch"),
            "rank 1: ranks 0, 2 did not come to the barrier within 0.25 s (end of epoch)",
        ),
        (
            lambda comm: comm.all_reduce(np.zeros(2)),
            "rank 1: ranks 0, 2 did not come to the all-reduce (sum of 2 float64) within 0.25 s "
            "(all_reduce)",
        ),
        (
            lambda comm: comm.split(0, 0),
            "rank 1: ranks 0, 2 did not come to the split within 0.25 s",
        ),
    ],
)
def test_deadline(body, text):
    over = threading.Event()

    def run(comm):
        if comm.rank != 1:
            over.wait(20)
            return comm.barrier()
        start = time.monotonic()
        try:
            body(comm)
        finally:
            over.set()
            # Twice the timeout, and some seconds that other processes may take the cores for.
            assert 0.25 <= time.monotonic() - start < 0.5 + 5

    results = run_ranks(3, run, 0.25)
    assert all(isinstance(result, eellm.CommError) for result in results)
    assert str(results[1]) == text
    assert str(results[0]) == f"rank 0: the job was aborted: {text}"


def test_abort_wakes_all():
    def body(comm):
        if comm.rank == 0:
            comm.exchange([], [(2, 1, np.zeros(2))])
        elif comm.rank == 1:
            comm.barrier()
        else:
            time.sleep(0.1)
            comm.abort("the loss is not finite")
            comm.barrier()

    start = time.monotonic()
    for rank, error in enumerate(run_ranks(3, body)):
        assert isinstance(error, eellm.CommError)
        assert str(error) == f"rank {rank}: the job was aborted: the loss is not finite"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("odd", "even", "text"),
    [
        (lambda c: c.barrier(), lambda c: c.split(0, 0), "calls"),
        (lambda c: c.broadcast(b"", 0), lambda c: c.broadcast(b"", 1), "broadcast (8 bytes of"),
        (
            lambda c: c.all_reduce(np.zeros(3)),
            lambda c: c.all_reduce(np.zeros(4)),
            "all-reduce (sum of 4 float64)",
        ),
        (
            lambda c: c.all_reduce(np.zeros(3)),
            lambda c: c.all_reduce(np.zeros(3), "max"),
            "all-reduce (maximum of 3 float64)",
        ),
        (
            lambda c: c.all_reduce(np.zeros(3)),
            lambda c: c.all_reduce(np.zeros(3, np.int32)),
            "all-reduce (sum of 3 int32)",
        ),
        (
            lambda c: c.exchange([(1 - c.rank, 4, np.zeros(5))], [(1 - c.rank, 4, np.zeros(6))]),
            lambda c: c.exchange([(1 - c.rank, 4, np.zeros(5))], [(1 - c.rank, 4, np.zeros(5))]),
            "the message from rank 0 to rank 1 has 40 bytes, expected 48 (tag 4)",
        ),
    ],
)
def test_disagreement(odd, even, text):
    """An error on every rank, not a hang."""
    results = run_ranks(2, lambda comm: (odd if comm.rank else even)(comm))
    assert all(isinstance(each, eellm.CommError) and text in str(each) for each in results)


def test_a_rank_that_leaves():
    """A communicator that is gone fails those that wait for it at once."""

    def body(comm):
        if comm.rank == 0:
            comm.barrier()

    start = time.monotonic()
    error, _ = run_ranks(2, body)
    assert "rank 1 has left the communicator before the barrier" in str(error)
    assert time.monotonic() - start < 10


def test_more_ranks_than_cores():
    def body(comm):
        total = 0
        for i in range(50):
            out, back = np.array([comm.rank + i]), np.zeros(1, np.int64)
            right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
            comm.exchange([(right, 0, out)], [(left, 0, back)])
            total += int(back[0])
        return total

    assert succeed(16, body) == [50 * ((rank - 1) % 16) + 1225 for rank in range(16)]


def test_nothing_is_left(collected):
    before = _core.alloc_stats()[1]
    succeed(3, lambda comm: comm.split(0, 0).all_gather(b"abc"))
    run_ranks(3, lambda comm: comm.barrier() if comm.rank else comm.abort("no"))
    gc.collect()  # tracebacks of the errors hold communicators
    assert _core.alloc_stats()[1] == before
