"""Chooses the exits that are looked at, and the confidence at which each lets a token go.

What is chosen from are the confidences of every exit on text that is not trained on, and whether an
exit's most likely token is the final exit's (`Trainer.evaluate(collect=True)`, `WindowScores`): the
exits that the decode rule would take on that text follow without running the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, invalid

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
# Cost of a token that leaves at each exit [E], when these early exits are looked at.
Cost = Callable[[Sequence[bool]], Sequence[float] | npt.NDArray[Any]]

# Below 1, because 1 means never.
_HIGHEST = float(np.nextafter(np.float32(1), np.float32(0)))
# Thresholds that are tried together for the exits of a set but the last, whose best is known.
_TRIALS = 2500
# Early exits up to which all sets of them are tried, and up to which all thresholds of a set.
_MOST_SETS, _MOST_TRIED = 4, 3
_PRICES, _SWEEPS = 14, 8


@dataclass(frozen=True)
class Choice:
    """Thresholds of the early exits, and what they do on a text.

    thresholds: 1 for exits that are not looked at. shares: part of the tokens that each exit takes,
    the final one last. cost: of a token on average, in the unit of what was asked for, by default
    layers.
    """

    thresholds: tuple[float, ...]
    agreement: float
    shares: tuple[float, ...]
    mean_depth: float
    cost: float

    @property
    def active(self) -> tuple[bool, ...]:
        """Whether each early exit is looked at."""
        return tuple(each < 1 for each in self.thresholds)


def places(thresholds: Sequence[float], confidence: Floats) -> npt.NDArray[np.int64]:
    """The exit of each token [n] for confidences [E, n]; the last exit takes what is left."""
    early = confidence[:-1]
    # In float32, as the native rule compares them.
    limits = np.asarray(thresholds, dtype=np.float32)[:, None]
    if len(limits) != len(early):
        got = len(limits)
        raise invalid("thresholds", f"one for each of {len(early)} early exits", got)
    leaves = (limits < 1) & (early >= limits)
    last = np.ones((1, confidence.shape[1]), dtype=bool)
    return np.argmax(np.concatenate([leaves, last]), axis=0)


def outcome(
    thresholds: Sequence[float],
    confidence: Floats,
    correct: Bools,
    depths: Sequence[float],
    cost: Cost | None = None,
) -> Choice:
    """What thresholds do on a text."""
    taken = places(thresholds, confidence)
    count = confidence.shape[1]
    shares = np.bincount(taken, minlength=len(confidence)) / count
    agreement = float(correct[taken, np.arange(count)].mean())
    mean_depth = float(shares @ np.asarray(depths, dtype=np.float64))
    limits = tuple(map(float, thresholds))
    paid = mean_depth
    if cost is not None:
        paid = float(shares @ np.asarray(cost([each < 1 for each in limits]), dtype=np.float64))
    return Choice(limits, agreement, tuple(map(float, shares)), mean_depth, paid)


def choose(
    confidence: Floats,
    correct: Bools,
    depths: Sequence[float],
    *,
    agreement: float = 0.9,
    least_share: float = 0.0,
    cost: Cost | None = None,
) -> Choice:
    """The thresholds with the smallest mean cost at an agreement of at least `agreement`.

    depths [E]: layers behind each exit, which are the cost where no other is given. least_share:
    part of the tokens that every exit must take; where that cannot be had together with the
    agreement, ValueError says so.
    """
    found = candidates(
        confidence, correct, depths, agreement=agreement, least_share=least_share, cost=cost
    )
    if not found:
        early, count = len(confidence) - 1, confidence.shape[1]
        got = f"no thresholds for {early} early exits on {count} tokens"
        advice = "ask for less agreement or a smaller share, or train longer"
        expected = f"agreement {agreement:g} and {least_share:g} of the tokens at every exit"
        raise invalid("no thresholds reach what was asked", expected, Shown(got), advice)
    return found[0]


def candidates(
    confidence: Floats,
    correct: Bools,
    depths: Sequence[float],
    *,
    agreement: float = 0.9,
    least_share: float = 0.0,
    cost: Cost | None = None,
) -> list[Choice]:
    """The best thresholds of each set of exits that was tried, the cheapest first.

    All sets of up to four early exits are tried; of more, sets that grow by the exit that saves
    most. Thresholds of up to three exits come from a grid of quantiles that is refined once, those
    of more from descent in one threshold at a time at rising prices of a wrong token.
    """
    early, count = len(confidence) - 1, confidence.shape[1]
    if not 0 < agreement <= 1:
        raise invalid("agreement", "above 0 and at most 1", agreement)
    if early < 1 or count < 1:
        expected, got = "early exits and tokens", f"{early} and {count}"
        raise invalid("nothing to choose from", expected, Shown(got), "add exits or text")

    def price(active: Sequence[bool]) -> npt.NDArray[np.float64]:
        return np.asarray(depths if cost is None else cost(active), dtype=np.float64)

    def solve(exits: Sequence[int]) -> Choice | None:
        active = [each in exits for each in range(early)]
        rows = [*exits, early]
        limits = _Problem(
            np.ascontiguousarray(confidence[rows]),
            ~correct[list(exits)],
            price(active)[rows],
            int((1 - agreement) * count + 1e-9),
            int(np.ceil(least_share * count)),
        ).solve()
        if limits is None:
            return None
        thresholds = np.ones(early)
        thresholds[list(exits)] = limits
        found = outcome(thresholds.tolist(), confidence, correct, depths, cost)
        good = found.agreement >= agreement and min(found.shares) >= least_share
        return found if good else None

    found = _over_sets(early, solve, all_exits=least_share > 0 or cost is None)
    never = outcome([1.0] * early, confidence, correct, depths, cost)
    if least_share == 0 and never.agreement >= agreement:
        found.append(never)
    unique = {each.thresholds: each for each in found}
    return sorted(unique.values(), key=lambda each: each.cost)


def _over_sets(
    early: int, solve: Callable[[Sequence[int]], Choice | None], all_exits: bool
) -> list[Choice]:
    """The solutions of the sets of exits that are worth a try."""
    if all_exits:
        return _present([solve(range(early))])
    if early <= _MOST_SETS:
        sizes = range(1, early + 1)
        return _present(solve(each) for size in sizes for each in combinations(range(early), size))
    found: list[Choice] = []
    members: tuple[int, ...] = ()
    best = np.inf
    while len(members) < early:
        grown = [tuple(sorted({*members, each})) for each in range(early) if each not in members]
        solved = [(solve(each), each) for each in grown]
        found += _present(each for each, _ in solved)
        costs = [np.inf if each is None else each.cost for each, _ in solved]
        if min(costs) >= best:
            break
        best, members = min(costs), grown[int(np.argmin(costs))]
    for left_out in members if len(members) > 1 else ():
        found += _present([solve([each for each in members if each != left_out])])
    return found


def _present(found: Iterable[Choice | None]) -> list[Choice]:
    return [each for each in found if each is not None]


class _Problem:
    """Thresholds for one set of exits.

    confidence [e + 1, n] with the final exit's last, wrong [e, n], cost [e + 1]; at most `budget`
    wrong tokens; at least `least` tokens at every exit.
    """

    def __init__(
        self,
        confidence: Floats,
        wrong: Bools,
        cost: npt.NDArray[np.float64],
        budget: int,
        least: int,
    ) -> None:
        # In the order of the last early exit, whose best threshold is then a place in a sum.
        order = np.argsort(-confidence[-2], kind="stable")
        self.confidence, self.wrong = confidence[:, order], wrong[:, order]
        self.cost, self.budget, self.least = cost, budget, least
        self.early, self.count = wrong.shape
        self.best: tuple[float, list[float]] = (np.inf, [])

    def solve(self) -> list[float] | None:
        """The cheapest thresholds, None where there are none."""
        if self.early > _MOST_TRIED and self.least == 0:
            self._descend()
        else:
            free = self.early - 1
            number = max(3, int(_TRIALS ** (1 / max(free, 2))) + 1) if free > 1 else 128
            grid = [self._levels(each, 0.0, 1.0, number) for each in range(free)]
            self._try(0, np.arange(self.count), [], 0, 0.0, grid)
            if free and self.best[1]:
                self._refine(grid, number)
        return self.best[1] or None

    def _levels(self, exit: int, low: float, high: float, number: int) -> npt.NDArray[np.float64]:
        """Thresholds to try, falling: never, then quantiles of the confidences in a range."""
        values = self.confidence[exit]
        values = values[(values >= low) & (values <= high)]
        if not values.size:
            return np.ones(1)
        found = np.quantile(values, np.linspace(0, 1, number), method="nearest")
        return np.append(1.0, np.unique(np.minimum(found, _HIGHEST))[::-1])

    def _refine(self, grid: list[npt.NDArray[np.float64]], number: int) -> None:
        """Tries finer steps around the best of a grid."""
        finer = []
        for exit, (levels, limit) in enumerate(zip(grid, self.best[1], strict=False)):
            at = int(np.flatnonzero(levels == limit)[0])
            high = levels[max(at - 1, 0)]
            low = levels[min(at + 1, len(levels) - 1)]
            finer.append(self._levels(exit, low, high, number))
        self._try(0, np.arange(self.count), [], 0, 0.0, finer)

    def _try(
        self,
        exit: int,
        rest: npt.NDArray[np.int64],
        limits: list[float],
        wrong: int,
        spent: float,
        grid: list[npt.NDArray[np.float64]],
    ) -> None:
        """All thresholds of the exits from `exit` on, for the tokens that the others left."""
        if exit == self.early - 1:
            self._try_last(rest, limits, wrong, spent)
            return
        confidence, misses = self.confidence[exit, rest], self.wrong[exit, rest]
        cheapest = self.cost[exit + 1 :].min()
        for limit in grid[exit]:
            leaves = confidence >= limit if limit < 1 else np.zeros(len(rest), bool)
            bad = wrong + int(np.count_nonzero(leaves & misses))
            if bad > self.budget:
                break
            gone = int(np.count_nonzero(leaves))
            paid = spent + gone * self.cost[exit]
            if gone < self.least or paid + (len(rest) - gone) * cheapest >= self.best[0]:
                continue
            left = rest[~leaves] if gone else rest
            self._try(exit + 1, left, [*limits, float(limit)], bad, paid, grid)

    def _try_last(
        self, rest: npt.NDArray[np.int64], limits: list[float], wrong: int, spent: float
    ) -> None:
        """The lowest threshold of the last early exit that the others leave room for."""
        values, misses = self.confidence[-2, rest], self.wrong[-1, rest]
        room = int(np.searchsorted(np.cumsum(misses), self.budget - wrong, side="right"))
        room = min(room, len(rest) - self.least)
        # All tokens of equal confidence leave together.
        while 0 < room < len(rest) and values[room - 1] == values[room]:
            room -= 1
        if room < self.least:
            return
        paid = spent + room * self.cost[-2] + (len(rest) - room) * self.cost[-1]
        if paid < self.best[0]:
            limit = min(float(values[room - 1]), _HIGHEST) if room > 0 else 1.0
            self.best = paid, [*limits, limit]

    def _descend(self) -> None:
        """Looks for the price of a wrong token at which the budget is used up."""
        self.orders = np.argsort(-self.confidence[:-1], axis=1, kind="stable")
        low, high = self.cost[-1] * 1e-2, self.cost[-1] * self.count
        limits = [1.0] * self.early
        for _ in range(_PRICES):
            price = float(np.sqrt(low * high))
            limits = self._at_price(price, limits)
            if self._keep(limits):
                high = price
            else:
                low = price
        for exit in range(self.early if self.best[1] else 0):
            limits = list(self.best[1])
            limits[exit] = self._move(limits, exit, 0.0, spend=True)
            self._keep(limits)

    def _keep(self, limits: list[float]) -> bool:
        """Remembers thresholds that keep to the budget and cost less than the best."""
        taken = places(limits, self.confidence)
        if np.count_nonzero(self._wrong_at(taken)) > self.budget:
            return False
        paid = float(self.cost[taken].sum())
        if paid < self.best[0]:
            self.best = paid, list(limits)
        return True

    def _at_price(self, price: float, start: list[float]) -> list[float]:
        """Thresholds, none of which alone could be moved to a smaller cost, wrong tokens paid."""
        limits = list(start)
        for _ in range(_SWEEPS):
            before = list(limits)
            for exit in reversed(range(self.early)):
                limits[exit] = self._move(limits, exit, price, spend=False)
            if limits == before:
                break
        return limits

    def _move(self, limits: list[float], exit: int, price: float, *, spend: bool) -> float:
        """The best threshold of one exit, the others given: at the price of a wrong token, or
        within what is left of the budget."""
        passed = [*limits[:exit], 1.0, *limits[exit + 1 :]]
        later = places(passed, self.confidence)
        misses = self._wrong_at(later)
        order = self.orders[exit]
        order = order[later[order] > exit]
        if not order.size:
            return 1.0
        worse = self.wrong[exit, order].astype(np.float64) - misses[order]
        total = np.cumsum(self.cost[later[order]] - self.cost[exit] - price * worse)
        # All tokens of equal confidence leave together.
        values = self.confidence[exit, order]
        total[:-1][values[:-1] == values[1:]] = -np.inf
        if spend:
            total[np.cumsum(worse) > self.budget - np.count_nonzero(misses)] = -np.inf
        at = int(np.argmax(total))
        return min(float(values[at]), _HIGHEST) if total[at] > 0 else 1.0

    def _wrong_at(self, taken: npt.NDArray[np.int64]) -> Bools:
        """Whether the exit that a token takes is wrong about it."""
        early = np.minimum(taken, self.early - 1)
        return self.wrong[early, np.arange(self.count)] & (taken < self.early)
