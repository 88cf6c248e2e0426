"""What a walk through a schedule found: time, bubbles and memory of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.errors import check_integer

if TYPE_CHECKING:
    from eellm.pipeline.costs import Costs
    from eellm.pipeline.schedule import Schedule

Floats = npt.NDArray[np.float64]


class Simulation:
    """A step of a schedule at given costs, in their units of time and bytes.

    Arrays have one value for each rank: `start` and `end` of its work, `busy` time, `bubbles` (the
    rest of the step), `peak_bytes`, `slots` (activations of microbatches kept at a time) and
    `action_counts`.
    """

    def __init__(self, schedule: Schedule, costs: Costs, found: dict[str, Any]) -> None:
        """Made by `Schedule.simulate`."""
        self.schedule, self.costs = schedule, costs
        self.start: Floats = found["start"]
        self.end: Floats = found["end"]
        self.busy: Floats = found["busy"]
        self.peak_bytes: Floats = found["peak_bytes"]
        self.slots: npt.NDArray[np.int32] = found["slots"]
        self.action_counts: npt.NDArray[np.uint64] = found["actions"]
        self._times: Floats | None = None

    @property
    def time(self) -> float:
        """From the first action of the step to the end of the last."""
        return float(self.end.max())

    @property
    def bubbles(self) -> Floats:
        """Time that each rank waits in a step."""
        return self.time - self.busy

    @property
    def busy_share(self) -> float:
        """The part of all ranks' time spent in actions."""
        return float(self.busy.sum() / (self.time * len(self.busy))) if self.time > 0 else 1.0

    @property
    def bubble_share(self) -> float:
        """The part of all ranks' time spent waiting."""
        return 1.0 - self.busy_share

    def times(self, rank: int) -> Floats:
        """Start and end of each action of a rank [n, 2].

        The first call walks once more and keeps the times of all ranks, 16 bytes an action.
        """
        check_integer("rank", rank, 0, self.schedule.ranks - 1)
        if self._times is None:
            self._times = self.schedule.walk(self.costs, True)["times"]
            self._ends = np.cumsum(self.action_counts.astype(np.int64))
        last = int(self._ends[rank])
        return self._times[last - int(self.action_counts[rank]) : last]

    def grid(self, most_rows: int, buckets: int) -> Floats:
        """Busy share of groups of neighbouring ranks in equal parts of the step [rows, buckets].

        Walks once more, and keeps nothing of the single actions.
        """
        ranks = self.schedule.ranks
        rows = min(most_rows, ranks)
        busy = np.zeros((rows, buckets))
        self.schedule.walk(self.costs, False, busy, self.time)
        counts = np.bincount(np.arange(ranks) * rows // ranks, minlength=rows)
        return busy / (counts[:, None] * self.time / buckets)

    def as_dict(self) -> dict[str, Any]:
        """The result as values for JSON."""
        return {
            "time": self.time,
            "bubble_share": self.bubble_share,
            "peak_bytes": float(self.peak_bytes.max()),
            "ranks": [
                {
                    "rank": rank,
                    "actions": int(self.action_counts[rank]),
                    "busy": float(self.busy[rank]),
                    "bubbles": float(self.time - self.busy[rank]),
                    "slots": int(self.slots[rank]),
                    "peak_bytes": float(self.peak_bytes[rank]),
                }
                for rank in range(len(self.busy))
            ],
        }

    def __repr__(self) -> str:
        return (
            f"<Simulation: time {self.time:g}, bubbles {self.bubble_share:.1%}, at most "
            f"{int(self.slots.max())} slots and {self.peak_bytes.max():g} bytes a rank>"
        )
