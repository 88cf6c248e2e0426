"""Which exit should draft for speculative decoding, how confident, and how far ahead.

Judged on scored text by the bytes that steps read: a draft costs the layers up to its exit and a
check, a verification a whole step, however many drafts it verifies. A draft is accepted where the
exit's most likely token is the final exit's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from eellm.evaluation.costs import StepCosts
    from eellm.evaluation.scoring import WindowScores

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20))
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15)


@dataclass(frozen=True)
class DraftPlan:
    """Drafts at `exit` from a confidence of `threshold` on, at most max_drafts in a row.

    predicted: times as fast as full depth, by the bytes that are read. accepted: part of the
    drafts; tokens_per_pass: tokens that one verification gives.
    """

    exit: int
    threshold: float
    max_drafts: int
    predicted: float
    accepted: float
    tokens_per_pass: float


def plan(costs: StepCosts, scores: WindowScores) -> DraftPlan | None:
    """The plan with the most tokens for the bytes, or None for a model that can't draft."""
    return next(iter(plans(costs, scores)), None)


def plans(costs: StepCosts, scores: WindowScores, count: int = 8) -> list[DraftPlan]:
    """The best plans over all exits and lengths, the best first.

    Each exit and length comes once, with its best threshold; no more than `count` of them. None for
    a model that can't draft.
    """
    exits = np.flatnonzero(costs.defers).tolist()
    found = [each for exit in exits for each in _plans_of(exit, costs, scores)]
    return sorted(found, key=lambda each: -each.predicted)[:count]


def _plans_of(exit: int, costs: StepCosts, scores: WindowScores) -> Iterator[DraftPlan]:
    """The best threshold for each length of an exit."""
    confidence, correct = scores.confidence[exit], scores.correct[exit]
    limits = np.asarray(THRESHOLDS, np.float32)
    confident = _runs(confidence >= limits[:, None], scores.starts)
    agreeing = _runs(correct[None], scores.starts)[0]
    drafts = np.tile(np.arange(len(THRESHOLDS)), len(LENGTHS))
    lengths = np.repeat(LENGTHS, len(THRESHOLDS))
    tried, taken, passes, asked = _decode(confident, agreeing, drafts, lengths, scores)
    active = [each == exit for each in range(costs.early)]
    tokens = taken + passes
    # A pass after the last draft that there is room for does not ask the exit.
    paid = tried * costs.leaving(active)[exit]
    paid = paid + passes * costs.full() + asked * costs.checks[exit]
    predicted = (tokens * costs.full() / paid).reshape(len(LENGTHS), len(THRESHOLDS))
    for row, threshold in enumerate(predicted.argmax(1).tolist()):
        at = row * len(THRESHOLDS) + threshold
        yield DraftPlan(
            exit=exit,
            threshold=THRESHOLDS[threshold],
            max_drafts=LENGTHS[row],
            predicted=float(predicted[row, threshold]),
            accepted=float(taken[at] / max(tried[at], 1)),
            tokens_per_pass=float(tokens[at] / passes[at]),
        )


def _runs(flags: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """How many tokens in a row from each one on have the flag [k, n]; windows end runs."""
    count = flags.shape[1]
    index = np.arange(count, dtype=np.int32)
    ends = np.append(starts[1:], count).astype(np.int32)
    ends = np.repeat(ends, np.diff(np.append(starts, count)))
    stop = np.where(flags, count, index).astype(np.int32)
    stop = np.minimum.accumulate(stop[:, ::-1], axis=1)[:, ::-1]
    return np.minimum(stop, ends) - index


def _decode(
    confident: npt.NDArray[np.int32],
    agreeing: npt.NDArray[np.int32],
    drafts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    scores: WindowScores,
) -> tuple[npt.NDArray[np.int64], ...]:
    """(drafts, accepted drafts, passes, those of them that asked the exit) of decoding all windows
    with each of k settings.

    All settings and windows move on together, from pass to pass. What would be drafted after a
    wrong draft is taken to be as confident as the text is there.
    """
    starts = scores.starts
    ends = np.append(starts[1:], scores.tokens)
    at = np.tile(starts, (len(drafts), 1))
    made, taken, passes, asked = np.zeros((4, len(drafts)), np.int64)
    while True:
        alive = at < ends
        if not alive.any():
            return made, taken, passes, asked
        here = np.minimum(at, ends - 1)
        # The last token of a window comes from the final exit.
        most = np.minimum(lengths[:, None], ends - 1 - here)
        wanted = np.minimum(confident[drafts[:, None], here], most)
        good = np.minimum(wanted, agreeing[here])
        made += (wanted * alive).sum(1)
        taken += (good * alive).sum(1)
        passes += alive.sum(1)
        asked += (alive & (wanted < most)).sum(1)
        at = here + np.where(alive, good + 1, scores.tokens)
