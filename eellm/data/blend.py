"""Weighted blends of datasets, and splits of one token file by documents."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from eellm.data.packing import (
    SPLIT,
    Bools,
    Dataset,
    Int32s,
    Int64s,
    Window,
    check_samples,
    check_seed,
    permutation,
)
from eellm.errors import message

# The longest period of a blend: weights that need a longer one are rounded to parts of it.
PERIOD = 1 << 17


class Blend:
    """Sample i comes from one of the datasets, chosen by a rule without chance.

    After any number of samples each dataset has given less than one sample more or less than its
    share. The choice repeats after `period` samples. Weights are relative; those that no period of
    at most 131,072 samples can hold exactly are rounded to such parts.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]):
        if not datasets or len(datasets) != len(weights):
            got = f"{len(datasets)} datasets and {len(weights)} weights"
            advice = "give each dataset one weight"
            raise ValueError(message("bad blend", "as many weights as datasets", got, advice))
        lengths = {dataset.seq_length for dataset in datasets}
        if len(lengths) > 1:
            advice = "build all datasets with one seq_length"
            raise ValueError(message("bad blend", "one seq_length", sorted(lengths), advice))
        self.datasets = list(datasets)
        self.seq_length = lengths.pop()
        self.shares = integer_weights(weights)
        self.period = sum(self.shares)
        self._choice, self._place = schedule(self.shares)

    @property
    def window_count(self) -> int:
        """Samples until the first dataset has been read once."""
        rounds = (
            dataset.window_count * self.period // share
            for dataset, share in zip(self.datasets, self.shares, strict=True)
        )
        return max(1, min(rounds))

    def locate(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """The dataset of each sample, and the number of the sample there."""
        rounds, slots = np.divmod(check_samples(samples), self.period)
        choice = self._choice[slots]
        return choice, rounds * np.array(self.shares, dtype=np.int64)[choice] + self._place[slots]

    def sample(self, index: int) -> Window:
        """One window."""
        tokens, ends = self.windows(np.array([index], dtype=np.int64))
        return Window(tokens[0], ends[0])

    def windows(self, samples: Int64s) -> tuple[Int32s, Bools]:
        """Tokens [n, T + 1] and document ends [n, T] of samples [n]."""
        choice, places = self.locate(samples)
        tokens = np.empty((choice.size, self.seq_length + 1), dtype=np.int32)
        ends = np.empty((choice.size, self.seq_length), dtype=np.bool_)
        for i in np.unique(choice):
            rows = np.flatnonzero(choice == i)
            tokens[rows], ends[rows] = self.datasets[i].windows(places[rows])
        return tokens, ends


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights in whole numbers without a common factor, with a sum of at most PERIOD."""
    for weight in weights:
        if not 0 < weight < math.inf:
            advice = "leave out datasets that shall not be used"
            raise ValueError(message("bad weight", "a number above 0", weight, advice))
    if len(weights) > PERIOD:
        raise ValueError(message("too many datasets", f"at most {PERIOD}", len(weights), "merge"))
    exact = [_fraction(weight) for weight in weights]
    scale = math.lcm(*(value.denominator for value in exact))
    whole = [int(value * scale) for value in exact]
    divisor = math.gcd(*whole)
    whole = [value // divisor for value in whole]
    return whole if sum(whole) <= PERIOD else _rounded(whole)


def _fraction(weight: float) -> Fraction:
    """1/3 for 0.3333333333333333 and 0.0362 for 0.0362, whose binary forms are neither."""
    near = Fraction(weight).limit_denominator(PERIOD)
    return near if float(near) == float(weight) else Fraction(repr(float(weight)))


def _rounded(whole: list[int]) -> list[int]:
    """Parts of PERIOD by largest remainder, at least one for each."""
    spare, total = PERIOD - len(whole), sum(whole)
    parts = [spare * value // total for value in whole]
    order = sorted(range(len(whole)), key=lambda i: (-(spare * whole[i] % total), i))
    for i in order[: spare - sum(parts)]:
        parts[i] += 1
    parts = [part + 1 for part in parts]
    divisor = math.gcd(*parts)
    return [part // divisor for part in parts]


def schedule(shares: Sequence[int]) -> tuple[Int64s, Int64s]:
    """One period: the dataset of each slot, and how often it has been chosen before.

    Choice j of a dataset with share q of W must lie in a slot t with floor(j W / q) <= t <
    ceil((j + 1) W / q): then no dataset is ever a whole sample ahead or behind. Taking the earliest
    deadline among those that may start meets all of them (Baruah et al., Proportionate progress,
    1996).
    """
    period = sum(shares)
    choice = np.empty(period, dtype=np.int64)
    place = np.empty(period, dtype=np.int64)
    given = [0] * len(shares)
    waiting = [(0, i) for i in range(len(shares))]
    ready: list[tuple[int, int]] = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            i = heapq.heappop(waiting)[1]
            deadline = -(-(given[i] + 1) * period // shares[i])
            heapq.heappush(ready, (deadline, i))
        i = heapq.heappop(ready)[1]
        choice[slot], place[slot] = i, given[i]
        given[i] += 1
        if given[i] < shares[i]:
            heapq.heappush(waiting, (given[i] * period // shares[i], i))
    return choice, place


def split_documents(count: int, parts: Sequence[float], seed: int | None = None) -> list[Int64s]:
    """Splits documents 0 .. count - 1 in parts of the given relative sizes.

    The parts follow each other in the file, as in Megatron; with a seed the documents are
    shuffled first. A part of size 0 is empty; every other one gets at least one document.
    """
    if not parts or not all(0 <= part < math.inf for part in parts) or sum(parts) <= 0:
        raise ValueError(message("bad split", "sizes of parts like 98,2", list(parts), "fix it"))
    wanted = sum(part > 0 for part in parts)
    if count < wanted:
        advice = "name a document separator, or give validation files of their own"
        expected = f"at least {wanted} documents"
        raise ValueError(message("too few documents to split", expected, count, advice))
    if seed is None:
        order = np.arange(count, dtype=np.int64)
    else:
        order = permutation(check_seed(seed), 0, SPLIT, count)
    total, done, cuts = sum(parts), 0.0, [0]
    left = wanted
    for part in parts:
        done += part
        if part > 0:
            left -= 1
            end = min(max(round(count * done / total), cuts[-1] + 1), count - left)
        else:
            end = cuts[-1]
        cuts.append(end)
    return [order[cuts[i] : cuts[i + 1]] for i in range(len(parts))]
