"""Tells values that are not finite and spikes from the ordinary noise of a loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

# Makes the median absolute deviation of normal noise its standard deviation.
MAD_TO_STD = 1.4826
# Below this share of the median, deviations count as rounding: a loss that hardly moves would else
# have a spread of zero, and every change of it would be a spike.
LEAST_SPREAD = 0.01
LEAST_HISTORY = 16


class Guard:
    """Limits for the next step's largest loss and gradient norm.

    A limit is median + threshold * 1.4826 * (median absolute deviation), over the last `window`
    steps that counted. Without enough of them, or with threshold 0, it is the largest float.
    """

    def __init__(self, threshold: float, window: int):
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)
        self._least = min(LEAST_HISTORY, window)

    def limits(self) -> tuple[float, float]:
        """Limits of the largest loss and the gradient norm; infinite where there are none yet."""
        return self._limit(self._losses), self._limit(self._norms)

    def _limit(self, history: deque[float]) -> float:
        if not self.threshold or len(history) < self._least:
            return math.inf
        values = np.array(history)
        median = float(np.median(values))
        spread = MAD_TO_STD * float(np.median(np.abs(values - median)))
        return median + self.threshold * max(spread, LEAST_SPREAD * abs(median))

    def add(self, loss: float, norm: float) -> None:
        """Takes a step that was not skipped."""
        if self.threshold:
            self._losses.append(loss)
            self._norms.append(norm)

    def state_dict(self) -> dict[str, list[float]]:
        """All that resuming needs; floats survive JSON exactly."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""
        for name, history in (("losses", self._losses), ("norms", self._norms)):
            history.clear()
            history.extend(float(value) for value in state.get(name, ()))
