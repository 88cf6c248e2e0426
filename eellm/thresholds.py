"""Chooses the confidence at which each early exit lets a token go.

What is chosen from are the confidences of every exit on text that is not trained on, and whether an
exit's most likely token is the final exit's (`Trainer.evaluate(collect=True)`): the exits that the
decode rule would take on that text follow without running the model again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, invalid

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

# Below 1, because 1 means never.
_HIGHEST = float(np.nextafter(np.float32(1), np.float32(0)))
_TRIALS = 4096


@dataclass(frozen=True)
class Choice:
    """Thresholds of the early exits, and what they do on the text they were chosen on.

    shares: part of the tokens that each exit takes, the final one last.
    """

    thresholds: tuple[float, ...]
    agreement: float
    shares: tuple[float, ...]
    mean_depth: float


def places(thresholds: Sequence[float], confidence: Floats) -> npt.NDArray[np.int64]:
    """The exit of each token [n] for confidences [E, n]; the last exit takes what is left."""
    early = confidence[:-1]
    limits = np.asarray(thresholds, dtype=np.float64)[:, None]
    if len(limits) != len(early):
        got = len(limits)
        raise invalid("thresholds", f"one for each of {len(early)} early exits", got)
    leaves = (limits < 1) & (early >= limits)
    last = np.ones((1, confidence.shape[1]), dtype=bool)
    return np.argmax(np.concatenate([leaves, last]), axis=0)


def outcome(
    thresholds: Sequence[float], confidence: Floats, correct: Bools, depths: Sequence[float]
) -> Choice:
    """What thresholds do on a text."""
    taken = places(thresholds, confidence)
    count = confidence.shape[1]
    shares = np.bincount(taken, minlength=len(confidence)) / count
    agreement = float(correct[taken, np.arange(count)].mean())
    mean_depth = float(shares @ np.asarray(depths, dtype=np.float64))
    return Choice(tuple(map(float, thresholds)), agreement, tuple(map(float, shares)), mean_depth)


def choose(
    confidence: Floats,
    correct: Bools,
    depths: Sequence[float],
    *,
    agreement: float = 0.9,
    least_share: float = 0.0,
) -> Choice:
    """The thresholds with the smallest mean depth at an agreement of at least `agreement`.

    depths [E]: layers behind each exit. least_share: part of the tokens that every exit must take;
    where that cannot be had together with the agreement, ValueError says so.
    """
    exits, count = confidence.shape
    if not 0 < agreement <= 1:
        raise invalid("agreement", "above 0 and at most 1", agreement)
    if exits < 2 or count < 1:
        expected, got = "early exits and tokens", f"{exits - 1} and {count}"
        raise invalid("nothing to choose from", expected, Shown(got), "add exits or text")
    best: Choice | None = None
    for first in product(*_candidates(confidence)):
        last = _last(first, confidence, correct, agreement, least_share)
        if last is None:
            continue
        found = outcome((*first, last), confidence, correct, depths)
        good = found.agreement >= agreement and min(found.shares) >= least_share
        if good and (best is None or found.mean_depth < best.mean_depth):
            best = found
    if best is None:
        got = f"no thresholds for {exits - 1} early exits on {count} tokens"
        advice = "ask for less agreement or a smaller share, or train longer"
        expected = f"agreement {agreement:g} and {least_share:g} of the tokens at every exit"
        raise invalid("no thresholds reach what was asked", expected, Shown(got), advice)
    return best


def _candidates(confidence: Floats) -> list[npt.NDArray[np.float64]]:
    """Thresholds to try for each early exit but the last: quantiles of what occurs, and never."""
    free = len(confidence) - 2
    if free == 0:
        return []
    number = max(3, int(_TRIALS ** (1 / free))) if free > 1 else 128
    levels = np.linspace(0, 1, number)
    rows = np.quantile(confidence[:free], levels, axis=1, method="nearest").T
    return [np.append(np.minimum(np.unique(row), _HIGHEST), 1.0) for row in rows]


def _last(
    first: Sequence[float],
    confidence: Floats,
    correct: Bools,
    agreement: float,
    least_share: float,
) -> float | None:
    """The lowest threshold of the last early exit that the others leave room for."""
    count = confidence.shape[1]
    taken = places((*first, 1.0), confidence)
    final = len(confidence) - 1
    rest = np.flatnonzero(taken == final)
    wrong = count - int(correct[taken, np.arange(count)].sum())
    order = rest[np.argsort(-confidence[final - 1, rest], kind="stable")]
    total = wrong + np.cumsum(~correct[final - 1, order])
    room = int(np.searchsorted(total, (1 - agreement) * count + 1e-9, side="right"))
    room = min(room, len(rest) - int(np.ceil(least_share * count)))
    values = confidence[final - 1, order]
    # All tokens of equal confidence leave together.
    while 0 < room < len(rest) and values[room - 1] == values[room]:
        room -= 1
    if room < max(1, int(np.ceil(least_share * count))):
        return 1.0 if least_share == 0 and wrong <= (1 - agreement) * count else None
    return min(float(values[room - 1]), _HIGHEST)
