"""Steps of uniform costs take what the formulas of the literature say, to the last bit."""

import numpy as np
import pytest

from eellm.pipeline import Costs, Schedule
from eellm.pipeline.costs import upper_bound
from eellm.pipeline.schedule import fill_counts

RANKS = range(1, 9)
MICROBATCHES = range(1, 17)
PAIRS = [(1, 2), (3, 5), (4, 2)]  # forward, backward


def step(name, ranks, microbatches, costs, chunks=1, **options):
    return Schedule(name, ranks, microbatches, chunks, **options).simulate(costs)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ranks", RANKS)
def test_gpipe_and_1f1b(name, ranks):
    for f, b in PAIRS:
        costs = Costs.uniform(ranks, 1, f, b)
        for m in MICROBATCHES:
            result = step(name, ranks, m, costs)
            assert result.time == (ranks - 1) * (f + b) + m * (f + b)
            assert (result.bubbles == (ranks - 1) * (f + b)).all()
            kept = [m] * ranks if name == "gpipe" else [min(m, ranks - r) for r in range(ranks)]
            assert result.slots.tolist() == kept
            assert result.peak_bytes.tolist() == kept


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("ranks", RANKS)
def test_interleaved(ranks, chunks):
    for f, b in PAIRS:
        costs = Costs.uniform(ranks, chunks, f * chunks, b * chunks)
        for m in range(ranks, 17, ranks):
            result = step("interleaved", ranks, m, costs, chunks)
            assert result.time == (m * chunks + ranks - 1) * (f + b)


@pytest.mark.parametrize("ranks", RANKS)
def test_zero_bubble(ranks):
    """The bubble is (P - 1)(f + b - w) where w <= f.

    No order with the activations of P microbatches does better than (P - 1) b: the first rank has
    run its P forwards at P f, and the first gradient comes to it at P f + (P - 1) b.
    """
    for f, b, w in [(1, 1, 1), (2, 3, 1), (3, 2, 2), (1, 4, 3), (5, 4, 4), (2, 2, 0)]:
        costs = Costs.uniform(ranks, 1, f, b + w, backward_weight=w)
        for m in range(ranks, 17):
            result = step("zero_bubble", ranks, m, costs)
            bubble = (ranks - 1) * max(f + b - w, b)
            assert result.time == m * (f + b + w) + bubble, (f, b, w, m)
            assert result.slots.max() <= ranks
            if f == b == w:
                assert result.bubble_share == pytest.approx((ranks - 1) / (3 * m + ranks - 1))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_size_can_be_run(name, ranks):
    for chunks in (1, 2, 3) if name == "interleaved" else (1,):
        for m in MICROBATCHES:
            assert Schedule(name, ranks, m, chunks).validate().total == m


@pytest.mark.parametrize("ranks", range(2, 9))
def test_filled_bubbles_make_no_step_longer(ranks):
    """As many microbatches as the paper says, and the depths that it says."""
    longer = 0
    for f, b in [(1, 2), (1, 1), (2, 3), (3, 1), (1, 4)]:
        count = (ranks - 1) * b // (f + b)
        assert fill_counts(ranks, b / f) == (count, count)
        costs = Costs.uniform(ranks, 1, f, b)
        for m in range(ranks, 17):
            plain = step("1f1b", ranks, m, costs)
            exits = range(ranks)
            filled = Schedule("1f1b", ranks, m, fill="auto", ratio=b / f, exits=exits)
            assert filled.fill == (count, count)
            depths = [(ranks * b - i * (f + b)) // b for i in range(1, count + 1)]
            assert list(filled.fill_depths) == depths
            result = filled.simulate(costs)
            assert result.time == plain.time
            assert count == 0 or result.busy_share > plain.busy_share
            for k1, k2 in ((0, count), (count, 0)):
                one = Schedule("1f1b", ranks, m, fill=(k1, k2), ratio=b / f, exits=exits)
                assert one.simulate(costs).time == plain.time
            if count + 1 < ranks:
                more = Schedule("1f1b", ranks, m, fill=(count + 1, count), ratio=b / f, exits=exits)
                longer += more.simulate(costs).time > plain.time
    assert longer > 0 or ranks == 2  # negative control


def test_part_1_ends_at_an_exit():
    """P = 4 and b / f = 2 as in the paper's figure: one exit, on the second rank."""
    schedule = Schedule("1f1b", 4, 6, fill=(2, 0), exits=(1,))
    rows = [[a[3] for a in schedule.actions(rank).tolist() if a[3] >= 6] for rank in range(4)]
    assert rows == [[6, 6], [6, 6], [], []]
    everywhere = Schedule("1f1b", 4, 6, fill=(2, 2), exits=(0, 1))
    rows = [[a[3] for a in everywhere.actions(rank).tolist() if a[3] >= 6] for rank in range(4)]
    assert rows == [[6, 7, 7, 6, 8, 9], [6, 6, 8, 9], [8, 9, 8], [8, 8, 9, 9]]


@pytest.mark.parametrize("seed", range(40))
def test_exits_stay_below_the_upper_bound(seed):
    """EE-LLM, appendix A.3: random exits on random ranks, embedding and head; time and memory."""
    random = np.random.default_rng(seed)
    ranks, m = int(random.integers(1, 9)), int(random.integers(1, 25))
    counts = random.integers(0, 3, ranks) * (random.random(ranks) < 0.6)
    f, b = (int(x) for x in random.integers(1, 30, 2))
    exit, head, embedding = (tuple(int(x) for x in random.integers(0, 12, 2)) for _ in range(3))
    kept, of_exit, of_head, of_embedding, static = (float(x) for x in random.integers(0, 50, 5))
    exits = [rank for rank in range(ranks) for _ in range(counts[rank])]
    costs = Costs.uniform(
        ranks, 1, f, b, exits=exits, exit=exit, head=head, embedding=embedding, kept_bytes=kept,
        exit_bytes=of_exit, head_bytes=of_head, embedding_bytes=of_embedding, static_bytes=static,
    )  # fmt: skip
    result = step("1f1b", ranks, m, costs)
    bound = upper_bound(m, f + b, counts * sum(exit), head=sum(head), embedding=sum(embedding))
    assert result.time <= bound
    for rank in range(ranks):
        memory = static + min(m, ranks - rank) * kept + counts[rank] * of_exit
        memory += (rank == 0) * min(m, ranks) * of_embedding + (rank == ranks - 1) * of_head
        assert result.peak_bytes[rank] == memory


def test_the_bound_is_close():
    """Negative control: less than the bound by an exit is not enough."""
    costs = Costs.uniform(4, 1, 10, 20, exits=(1, 2), exit=(1, 2), head=(1, 2))
    result = step("1f1b", 4, 64, costs)
    assert result.time == upper_bound(64, 30, [0, 3, 3, 0], head=3)
