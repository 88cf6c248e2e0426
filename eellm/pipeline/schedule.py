"""A schedule: what each rank of a pipeline does in a training step, one action after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from eellm import _core
from eellm.errors import Shown, check_integer, check_one_of, invalid

if TYPE_CHECKING:
    from eellm.pipeline.costs import Costs
    from eellm.pipeline.simulation import Simulation

NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
MAX_RANKS = 1 << 16
MAX_MICROBATCHES = 1 << 24
MAX_CHUNKS = 1024

# struct ee_step_action (csrc/train/schedule.h).
ACTION = np.dtype([("kind", "u1"), ("flags", "u1"), ("chunk", "<u2"), ("microbatch", "<i4")])
FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)
KIND_NAMES = ("forward", "backward", "backward_input", "backward_weight")
RECEIVES, SENDS, KEEPS = 1, 2, 4

Actions = npt.NDArray[Any]
Fill = tuple[int, int] | Literal["auto"]


class Schedule:
    """The lists of all ranks, as a name gives them or as a file has them.

    Microbatches 0 to M - 1 run in full; those of bubble filling come after them, Part 1 first.
    A list is made when it is asked for: `simulate` needs none of them in memory.
    """

    def __init__(
        self,
        name: str,
        ranks: int,
        microbatches: int,
        chunks: int = 1,
        *,
        fill: Fill = (0, 0),
        ratio: float = 2.0,
        exits: Iterable[int] = (),
        lists: Sequence[Actions] | None = None,
    ) -> None:
        """A schedule of a name.

        name: gpipe, 1f1b, interleaved (several chunks a rank) or zero_bubble. microbatches: those
        that run forward and backward in full. fill: microbatches for Part 1 and Part 2 of the
        bubbles of 1f1b, "auto" for as many as make no step longer where a backward takes `ratio`
        times as long as a forward. exits: ranks with early exits, where Part 1 can end. lists:
        for each rank the actions to take in place of those that the name gives.
        """
        check_one_of("name of the schedule", name, NAMES)
        check_integer("ranks", ranks, 1, MAX_RANKS)
        check_integer("microbatches", microbatches, 1, MAX_MICROBATCHES)
        check_integer("chunks", chunks, 1, MAX_CHUNKS)
        if chunks > 1 and name != "interleaved":
            raise invalid(
                "chunks is invalid", f"1 with {name}", chunks, "interleaved takes several"
            )
        self.name, self.ranks, self.chunks = name, ranks, chunks
        self.microbatches = microbatches
        self.ratio = _number_above_zero("ratio", ratio)
        self.exits = _ranks_of(exits, ranks)
        self.fill = _check_fill(fill, name, ranks, self.ratio)
        self._given: tuple[Actions, ...] | None = None
        if lists is not None:
            self._given = _check_lists(lists, ranks)

    @property
    def fill_depths(self) -> tuple[int, ...]:
        """Through how many of the last ranks the backward of each microbatch of Part 2 runs."""
        _, depths = _core.schedule_fill(self.ranks, self.ratio, self.fill[1])
        return tuple(np.maximum(depths, 1).tolist())

    @property
    def total(self) -> int:
        """Microbatches, those in the bubbles included."""
        return self.microbatches + sum(self.fill)

    def part_of(self, microbatch: int) -> int:
        """0 for a microbatch that runs in full, else the part of the bubbles that it fills."""
        if microbatch < self.microbatches:
            return 0
        return 1 if microbatch < self.microbatches + self.fill[0] else 2

    @property
    def spec(self) -> tuple[Any, ...]:
        """What the core makes lists from (csrc/train/schedule.h)."""
        flags = np.zeros(self.ranks, np.bool_)
        flags[list(self.exits)] = True
        depths = np.array(self.fill_depths, np.int32) if self.fill[1] else None
        return (self.name, self.ranks, self.chunks, self.microbatches, self.fill[0], depths, flags)

    @property
    def lists_for_core(self) -> list[npt.NDArray[np.uint64]] | None:
        """The lists that take the place of those of the name, if there are any."""
        return None if self._given is None else [each.view(np.uint64) for each in self._given]

    @property
    def custom(self) -> bool:
        """Whether the lists differ from those that the name gives."""
        if self._given is None:
            return False
        return any(
            not np.array_equal(mine, self._made(rank)) for rank, mine in enumerate(self._given)
        )

    def actions(self, rank: int) -> Actions:
        """The list of a rank: a read-only array of (kind, flags, chunk, microbatch)."""
        check_integer("rank", rank, 0, self.ranks - 1)
        return self._made(rank) if self._given is None else self._given[rank]

    @property
    def lists(self) -> list[Actions]:
        """The lists of all ranks."""
        return [self.actions(rank) for rank in range(self.ranks)]

    def _made(self, rank: int) -> Actions:
        actions = _core.schedule_actions(self.spec, rank).view(ACTION)
        actions.setflags(write=False)
        return actions

    def validate(self) -> Schedule:
        """Proves that the lists can be run; ValueError names the rank and the action at fault.

        Every microbatch goes forward and backward exactly once through every chunk, in ascending
        order; what is sent is received, in order; what is kept is used; no ranks wait for each
        other. Returns the schedule.
        """
        self.walk(None, False)
        return self

    def simulate(self, costs: Costs) -> Simulation:
        """Validates the lists and says what a step takes: time, bubbles, memory."""
        from eellm.pipeline.simulation import Simulation

        costs.check_fits(self)
        return Simulation(self, costs, self.walk(costs, False))

    def walk(
        self, costs: Costs | None, trace: bool, grid: Any = None, time: float = 0.0
    ) -> dict[str, Any]:
        """The walk of the core through all lists (csrc/train/walk.h, `_core.schedule_walk`)."""
        prices = None if costs is None else costs.to_core()
        return _core.schedule_walk(self.spec, prices, self.lists_for_core, trace, grid, time)

    def save(self, path: str | Path) -> None:
        """Writes the lists as JSON, a line for each rank."""
        from eellm.pipeline.files import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Reads what `save` wrote, and validates it."""
        from eellm.pipeline.files import load

        return load(Path(path))

    def __eq__(self, other: object) -> bool:
        """Whether ranks, chunks, microbatches, exits and all lists are equal."""
        if not isinstance(other, Schedule):
            return NotImplemented
        if self._sizes() != other._sizes():
            return False
        if self._given is None and other._given is None and self.name == other.name:
            return self.fill_depths == other.fill_depths
        return all(
            np.array_equal(self.actions(rank), other.actions(rank)) for rank in range(self.ranks)
        )

    __hash__ = None  # type: ignore[assignment]

    def _sizes(self) -> tuple[Any, ...]:
        return (self.ranks, self.chunks, self.microbatches, self.fill, self.exits)

    def __repr__(self) -> str:
        parts = [repr(self.name), f"ranks={self.ranks}", f"microbatches={self.microbatches}"]
        if self.chunks > 1:
            parts.append(f"chunks={self.chunks}")
        if any(self.fill):
            parts.append(f"fill={self.fill}")
        if self.exits:
            parts.append(f"exits={self.exits}")
        return f"Schedule({', '.join(parts)})"


def fill_counts(ranks: int, ratio: float) -> tuple[int, int]:
    """How many microbatches fit each part of the bubbles and make no step longer."""
    count, _ = _core.schedule_fill(ranks, ratio, 0)
    return count, count


def _number_above_zero(key: str, value: object) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < float(value) < np.inf:  # type: ignore[arg-type]
        raise invalid(f"{key} is invalid", "a number above 0", value)
    return float(value)  # type: ignore[arg-type]


def _ranks_of(exits: Iterable[int], ranks: int) -> tuple[int, ...]:
    if isinstance(exits, str | bytes) or not isinstance(exits, Iterable):
        raise invalid("exits is invalid", "a list of ranks with early exits", exits)
    found = list(exits)
    for rank in found:
        check_integer("a rank with an early exit", rank, 0, ranks - 1, "ranks count from 0")
    return tuple(sorted(set(found)))


def _check_fill(fill: object, name: str, ranks: int, ratio: float) -> tuple[int, int]:
    if fill == "auto":
        if name == "1f1b":
            return fill_counts(ranks, ratio)
        fill = None
    elif isinstance(fill, tuple | list) and len(fill) == 2:
        for i, count in enumerate(fill):
            check_integer(
                f"Part {i + 1} of fill",
                count,
                0,
                ranks - 1,
                f"bubbles of {ranks} ranks hold no more",
            )
        if name == "1f1b" or not any(fill):
            return int(fill[0]), int(fill[1])
    if name != "1f1b":
        raise invalid(
            "fill is invalid", f"(0, 0) with {name}", fill or "auto", "1f1b has bubbles to fill"
        )
    raise invalid("fill is invalid", 'two numbers of microbatches or "auto"', fill)


def _check_lists(lists: Sequence[Actions], ranks: int) -> tuple[Actions, ...]:
    if len(lists) != ranks:
        raise invalid("lists is invalid", f"one for each of {ranks} ranks", len(lists))
    return tuple(_check_list(each, rank) for rank, each in enumerate(lists))


def _check_list(actions: Actions, rank: int) -> Actions:
    """A copy of a list whose kinds and flags exist."""
    if not isinstance(actions, np.ndarray) or actions.dtype != ACTION or actions.ndim != 1:
        got = getattr(actions, "dtype", type(actions).__name__)
        raise invalid(f"the list of rank {rank} is invalid", f"an array of {ACTION}", Shown(got))
    copy = np.ascontiguousarray(actions).copy()
    copy.setflags(write=False)
    for field, last in (("kind", len(KIND_NAMES) - 1), ("flags", RECEIVES | SENDS | KEEPS)):
        wrong = np.flatnonzero(copy[field] > last)
        if len(wrong):
            raise invalid(
                f"{field} of rank {rank}, action {wrong[0]} is invalid",
                f"0 to {last}",
                int(copy[field][wrong[0]]),
            )
    return copy
