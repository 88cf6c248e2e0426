"""Bubble filling: the gradient is that of the mean loss, on average and term by term.

The oracle recombines PyTorch's gradients of single microbatches by the formula of the estimator:
the loss of an exit weighs 1 / (B + n1), in Part 2 1 / B, and the gradient of a rank, use by use of
a parameter, B / (B + n2); all of them numbers of tokens.
"""

import functools

import numpy as np
import pytest

from eellm import _core
from eellm.pipeline import Schedule

torch = pytest.importorskip("torch")
from tests.train.pipeline.common import Layout, take, train  # noqa: E402
from tests.train.pipeline.oracle import (  # noqa: E402
    USE_EMBEDDING,
    USE_EXIT,
    errors,
    problem_of,
)

LAYERS = 8
MOST = 10  # microbatches, of which steps take the first ones


def exit_ranks(config, ranks, earlier=False):
    """The rank of each exit, the final one last, for equal shares of the layers."""
    found = []
    for exit in config["exits"]:
        depth = 2 * exit["layer"] - 2 * exit["before"] - (exit["branch"] == "mlp")
        share = 2 * LAYERS // ranks
        rank = (depth - earlier) // share if depth > 0 else 0
        found.append(min(rank, ranks - 1))
    return [*found, ranks - 1]


@functools.cache
def tables_of(model, ranks):
    config = problem_of(model, 1).config
    return [_core.Model(config, 1, weights=False, part=(ranks, 1, rank, None, False, True)).table
            for rank in range(ranks)]  # fmt: skip


@functools.cache
def owners_of(model, ranks):
    """The rank that uses a parameter first."""
    return {row["name"]: rank for rank, table in enumerate(tables_of(model, ranks))
            for row in table if row["owned"]}  # fmt: skip


class Filling:
    """What the microbatches of a step are for: roles 0 .. B - 1 in full, then Part 1, Part 2."""

    def __init__(self, model, ranks, full, fill, ratio=2.0, ends=None):
        config = problem_of(model, 1).config
        self.model, self.ranks, self.full = model, ranks, full
        self.exit_rank = exit_ranks(config, ranks)
        if ends is None:
            ends = sorted(set(self.exit_rank[:-1]))
        self.schedule = Schedule("1f1b", ranks, full, fill=fill, ratio=ratio, exits=ends)
        self.fill1, self.fill2 = self.schedule.fill
        self.tied = frozenset(row["name"] for row in tables_of(model, ranks)[0] if row["tied"])
        reach = (range(self.fill1 - i) for i in range(self.fill1))
        self.tails = [max((r for r in each if r in ends), default=-1) for each in reach]

    def problem(self, masked=0.0):
        return problem_of(self.model, MOST, masked)

    def tokens(self, masked=0.0):
        return self.problem(masked).tokens[: self.schedule.total]

    def rank_of(self, name, use):
        """Where a use of a parameter happens."""
        if use is None:
            return owners_of(self.model, self.ranks)[name]
        return 0 if use == USE_EMBEDDING else self.exit_rank[use - USE_EXIT]

    def reaches(self, role, rank):
        """Whether the backward of this role's microbatch covers a rank."""
        if role < self.full:
            return True
        i = role - self.full
        if i < self.fill1:
            return rank <= self.tails[i]
        return self.ranks - rank <= self.schedule.fill_depths[i - self.fill1]

    def trains(self, role, exit, rank):
        """Whether the rank's gradient has a part of this exit's loss by this role."""
        if self.full <= role < self.full + self.fill1:
            return self.reaches(role, self.exit_rank[exit]) and self.reaches(role, rank)
        return self.reaches(role, rank)

    def factors(self, order, tokens, weigh=True, scale=True):
        """[microbatch, exit, rank] what the formula multiplies the gradients with that the mean
        loss of an exit, summed over a microbatch's tokens, has in the parameters of a rank."""
        ranks, exits = range(self.ranks), range(len(self.exit_rank))
        tokens = tokens[list(order)]
        part1 = range(self.full, self.full + self.fill1)
        part2 = range(part1.stop, len(order))
        count = tokens[: self.full].sum()
        more1 = [sum(tokens[i] for i in part1 if self.reaches(i, self.exit_rank[e])) for e in exits]
        more2 = [sum(tokens[i] for i in part2 if self.reaches(i, rank)) for rank in ranks]
        found = np.zeros((len(order), len(exits), len(ranks)))
        for role, m in enumerate(order):
            for exit in exits:
                weight = 1 / (count + (more1[exit] if weigh and role not in part2 else 0))
                for rank in ranks:
                    factor = count / (count + (more2[rank] if scale else 0))
                    found[m, exit, rank] = weight * factor * self.trains(role, exit, rank)
        return found

    def combine(self, dtype, factors, masked=0.0):
        """A gradient of PyTorch's of single microbatches and exits."""
        sums = {}
        split = self.problem(masked).split(dtype, self.tied)
        for m, exits in enumerate(split[: len(factors)]):
            for exit, found in enumerate(exits):
                for (name, use), gradient in found.items():
                    factor = factors[m, exit, self.rank_of(name, use)]
                    sums[name] = sums.get(name, 0.0) + factor * gradient.astype(float)
        return sums

    def recombine(self, dtype, order, masked=0.0, **factors):
        """The step's gradient by the formula."""
        tokens = self.tokens(masked)
        return self.combine(dtype, self.factors(order, tokens, **factors), masked)

    def plain(self, dtype):
        """The gradient of the mean loss over all microbatches."""
        tokens = self.tokens()
        shape = (len(tokens), len(self.exit_rank), self.ranks)
        return self.combine(dtype, np.full(shape, 1 / tokens.sum()))

    def step(self, order, masked=0.0, **options):
        """The step of the pipeline: (gradients, result)."""
        problem = self.problem(masked)
        layout = Layout(self.ranks, 1, self.schedule, **options)
        outcome = train(problem.config, problem.values, layout, [take(problem.data, order)],
                        exit_weights=problem.weights, update=False)  # fmt: skip
        return outcome.gradients, outcome.results[0]

    def shares(self, found, plain, exact):
        return errors(tables_of(self.model, self.ranks)[0], found, plain, exact)


def shifts(filling):
    """Orders in which each microbatch is in each role once."""
    total = filling.schedule.total
    return [[(role + shift) % total for role in range(total)] for shift in range(total)]


def average(gradients):
    return {name: np.mean([each[name] for each in gradients], 0, float) for name in gradients[0]}


FILLINGS = {
    "4": dict(ranks=4, full=4, fill="auto"),
    "4-one": dict(ranks=4, full=1, fill=(2, 2)),
    "4-part1": dict(ranks=4, full=3, fill=(3, 0)),
    "4-part2": dict(ranks=4, full=2, fill=(0, 2), ratio=3.0),
    "4-few-ends": dict(ranks=4, full=3, fill=(2, 1), ends=(0,)),
    "8": dict(ranks=8, full=2, fill="auto"),
    "8-many": dict(ranks=8, full=1, fill=(6, 3), ratio=3.0),
}


@pytest.mark.parametrize("case", FILLINGS)
@pytest.mark.parametrize("model", ["gpt2", "llama", "apart", "parallel"])
def test_no_bias(model, case):
    """Every parameter, to the rounding that PyTorch's float32 has in one process."""
    filling = Filling(model, **FILLINGS[case])
    found = average([filling.step(order)[0] for order in shifts(filling)])
    shares = filling.shares(found, filling.plain(torch.float32), filling.plain(torch.float64))
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("case", ["4", "8"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_design_sees_a_bias(model, case):
    """Negative control: without either factor, the same average is refused; with both it passes."""
    filling = Filling(model, **FILLINGS[case])
    plain, exact = filling.plain(torch.float32), filling.plain(torch.float64)

    def worst(**factors):
        tokens = filling.tokens()
        mean = np.mean([filling.factors(order, tokens, **factors) for order in shifts(filling)], 0)
        found = filling.combine(torch.float64, mean)
        return max(filling.shares(found, plain, exact).values())

    assert worst() <= 1
    assert worst(scale=False) > 100
    assert worst(weigh=False) > 100


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", FILLINGS)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_terms_with_unequal_tokens(model, case, exact):
    """Numbers of tokens weigh, not those of microbatches."""
    filling = Filling(model, **FILLINGS[case])
    order = list(np.random.default_rng(3).permutation(filling.schedule.total))
    assert len(set(filling.tokens(0.5))) > 1
    found, result = filling.step(order, 0.5, exact=exact)
    wanted = {d: filling.recombine(d, order, 0.5) for d in (torch.float32, torch.float64)}
    shares = filling.shares(found, wanted[torch.float32], wanted[torch.float64])
    assert max(shares.values()) <= 1, shares
    tokens = filling.tokens(0.5)
    assert result["tokens"] == tokens[order[: filling.full]].sum()


@pytest.mark.parametrize("factor", ["scale", "weigh"])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_terms_without_a_factor_fail(model, factor):
    """Negative control."""
    filling = Filling(model, **FILLINGS["4"])
    order = list(range(filling.schedule.total))
    found, _ = filling.step(order, 0.5)
    plain, exact = (filling.recombine(d, order, 0.5, **{factor: False})
                    for d in (torch.float32, torch.float64))  # fmt: skip
    assert max(filling.shares(found, plain, exact).values()) > 100


@pytest.mark.parametrize("case", FILLINGS)
def test_terms_by_steps_of_single_microbatches(case):
    """The formula once more, with what one process says of each microbatch alone: the gradient of
    the final loss in the output matrix of the last rank."""
    filling = Filling("apart", **FILLINGS[case])
    problem, total = filling.problem(0.5), filling.schedule.total
    order = list(np.random.default_rng(4).permutation(total))
    found, _ = filling.step(order, 0.5)
    alone = [single(problem, m) for m in order]
    tokens = problem.tokens[order]
    count = tokens[: filling.full].sum()
    part2 = [filling.full + filling.fill1 + i for i in range(filling.fill2)]
    share = tokens[part2].sum() / count
    name = "lm_head.weight"
    wanted = sum(tokens[i] * alone[i][name] for i in [*range(filling.full), *part2]) / count
    check_close(found[name], wanted / (1 + share), name, alone)


def single(problem, m):
    """One process, one microbatch: gradients of its mean loss."""
    outcome = train(problem.config, problem.values, Layout(), [take(problem.data, [m])],
                    exit_weights=problem.weights, update=False)  # fmt: skip
    return {name: value.astype(float) for name, value in outcome.gradients.items()}


def check_close(found, wanted, name, alone):
    """Sums of as many terms as there are microbatches and rows, each of them rounded."""
    size = sum(np.abs(each[name]) for each in alone).max()
    assert np.abs(found - wanted).max() <= 16 * len(alone) * 2.0**-24 * size


@pytest.mark.parametrize("case", FILLINGS)
def test_losses_are_means_over_what_an_exit_was_trained_on(case):
    filling = Filling("llama", **FILLINGS[case])
    problem, total = filling.problem(0.5), filling.schedule.total
    order = list(np.random.default_rng(5).permutation(total))
    _, result = filling.step(order, 0.5)
    alone = []
    for m in order:
        outcome = train(problem.config, problem.values, Layout(), [take(problem.data, [m])],
                        exit_weights=problem.weights, update=False)  # fmt: skip
        alone.append(outcome.results[0]["losses"])
    tokens = problem.tokens[order]
    for exit, rank in enumerate(filling.exit_rank):
        trained = [role for role in range(total) if filling.reaches(role, rank)]
        wanted = sum(tokens[i] * alone[i][exit] for i in trained) / tokens[trained].sum()
        assert result["losses"][exit] == pytest.approx(wanted, rel=1e-6), exit


def test_the_last_ranks_average_over_more():
    """Each role does what it is for: tokens of a role that a rank never sees change nothing."""
    filling = Filling("apart", **FILLINGS["4"])
    problem, total = filling.problem(), filling.schedule.total
    order = list(range(total))
    before, _ = filling.step(order)
    data = problem.data["targets"]
    saved = data.copy()
    last = total - 1  # of Part 2, whose backward covers rank 3 alone
    data[last] = (data[last] + 1) % problem.config["vocab_size"]
    after, _ = filling.step(order)
    data[...] = saved
    for rank, table in enumerate(tables_of("apart", 4)):
        for row in table:
            if row["held"]:
                changed = not np.array_equal(before[row["name"]], after[row["name"]])
                assert changed == (rank == 3), row["name"]


def test_filled_steps_train_and_agree():
    """Ranks agree on what follows from the gradient: norm, update, shared parameters."""
    filling = Filling("gpt2", **FILLINGS["4"])
    problem, total = filling.problem(0.3), filling.schedule.total
    steps = [take(problem.data, np.roll(range(total), i)) for i in range(3)]
    layout = Layout(4, 1, filling.schedule)
    more = take(problem.data, range(3))
    outcome = train(problem.config, problem.values, layout, steps, evaluate=more)
    assert all(each["updated"] and each["grad_norm"] > 0 for each in outcome.results)
    again = train(problem.config, problem.values, layout, steps, evaluate=more)
    assert all(np.array_equal(outcome.parameters[name], again.parameters[name])
               for name in again.parameters)  # fmt: skip
