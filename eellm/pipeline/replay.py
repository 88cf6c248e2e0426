"""Replays of schedules: the real runner, messages and transport, with waits in place of compute.

So schedules are measured on more ranks than there are cores, and compared with the simulation of
the same numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, check_integer, invalid
from eellm.pipeline.costs import Costs, numbers
from eellm.pipeline.schedule import KIND_NAMES, Schedule

if TYPE_CHECKING:
    from eellm._core import Comm
    from eellm.pipeline.simulation import Simulation
    from eellm.pipeline.trace import RankTrace

Floats = npt.NDArray[np.float64]

FORMAT_VERSION = 1
MAX_RANKS = 16
_MOST_SECONDS = 3600.0
_KEYS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "schedule": (dict,),
    "message_bytes": (int,),
    "message_seconds": (int, float),
    "seconds": (dict,),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Times:
    """What a replay needs to know: a schedule, and seconds of each action.

    seconds: for each kind of action those of the chunks of the model, in its order [ranks x
    chunks]. message_bytes: of every message. message_seconds: what the simulation takes a message
    to last; the replay measures it.
    """

    schedule: Schedule
    seconds: dict[str, Floats]
    message_bytes: int = 1 << 20
    message_seconds: float = 0.0

    def __post_init__(self) -> None:
        check_integer("ranks", self.schedule.ranks, 1, MAX_RANKS, "a replay takes no more")
        check_integer("message_bytes", self.message_bytes, 8, 1 << 32)
        parts = self.schedule.ranks * self.schedule.chunks
        for kind in KIND_NAMES:
            if kind not in self.seconds:
                raise invalid(f"seconds of {kind} are missing", f"{parts} numbers", Shown("none"))
            found = numbers(f"seconds of {kind}", self.seconds[kind], parts)
            if found.max() > _MOST_SECONDS:
                raise invalid(f"seconds of {kind} are invalid", "at most 3600", float(found.max()))
            self.seconds[kind] = found

    @classmethod
    def of(
        cls, schedule: Schedule, costs: Costs, *, unit: float = 1.0, message_bytes: int = 1 << 20
    ) -> Times:
        """The times of a simulation; unit: seconds of a unit of time in the costs."""
        costs.check_fits(schedule)
        return cls(
            schedule=schedule,
            seconds={kind: getattr(costs, kind) * unit for kind in KIND_NAMES},
            message_bytes=message_bytes,
            message_seconds=costs.message * unit,
        )

    def costs(self) -> Costs:
        """The same numbers for the simulator."""
        ranks, chunks = self.schedule.ranks, self.schedule.chunks
        none = np.zeros(1)
        return Costs(
            ranks=ranks,
            chunks=chunks,
            **self.seconds,  # type: ignore[arg-type]
            kept_bytes=none,
            transient_bytes=none,
            static_bytes=none,
            message=self.message_seconds,
        )

    def simulate(self) -> Simulation:
        """A step as the simulator has it."""
        return self.schedule.simulate(self.costs())

    def of_rank(self, rank: int) -> Floats:
        """Seconds of each kind of action on the chunks of a rank, [4, chunks]."""
        ranks = self.schedule.ranks
        return np.ascontiguousarray([self.seconds[kind][rank::ranks] for kind in KIND_NAMES])

    def save(self, path: str | Path) -> None:
        """Writes a JSON file."""
        from eellm.pipeline.files import as_object

        values = {
            "format_version": FORMAT_VERSION,
            "message_bytes": self.message_bytes,
            "message_seconds": self.message_seconds,
            "seconds": {kind: self.seconds[kind].tolist() for kind in KIND_NAMES},
            "schedule": as_object(self.schedule),
        }
        Path(path).write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Times:
        """Reads what `save` wrote, and validates its schedule."""
        return cls.parse(Path(path).read_bytes(), str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Times:
        """The times in the bytes of a file."""
        from eellm.pipeline.files import check_keys, decode, from_object

        values = decode(data, where, "times", "eellm schedule --save-times")
        try:
            check_keys(values, _KEYS, "write the file with eellm schedule --save-times")
            check_integer("format_version", values["format_version"], 1, FORMAT_VERSION)
            for kind in values["seconds"]:
                if kind not in KIND_NAMES:
                    raise invalid("seconds is invalid", f"one of {', '.join(KIND_NAMES)}", kind)
            return cls(
                schedule=from_object(values["schedule"]).validate(),
                seconds=dict(values["seconds"]),
                message_bytes=values["message_bytes"],
                message_seconds=float(numbers("message_seconds", values["message_seconds"], 1)[0]),
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """What a replay measured: seconds of each step, of each rank's actions in it [steps, ranks],
    and the trace of the last step where one was asked for."""

    times: Times
    transport: str
    steps: Floats
    busy: Floats
    simulated: Simulation
    trace: list[RankTrace] | None = None

    @property
    def seconds(self) -> float:
        """Of the median step."""
        return float(np.median(self.steps))

    @property
    def share(self) -> float:
        """Simulated over measured time."""
        return self.simulated.time / self.seconds if self.seconds > 0 else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The result as values for JSON."""
        busy = np.median(self.busy, axis=0)
        return {
            "transport": self.transport,
            "seconds": self.seconds,
            "steps": self.steps.tolist(),
            "simulated_seconds": self.simulated.time,
            "simulated_over_measured": self.share,
            "message_bytes": self.times.message_bytes,
            "ranks": [
                {
                    "rank": rank,
                    "busy": float(busy[rank]),
                    "waiting": self.seconds - float(busy[rank]),
                    "simulated_waiting": float(self.simulated.bubbles[rank]),
                }
                for rank in range(len(busy))
            ],
        }


def replay(
    times: Times, comm: Comm, *, steps: int = 5, warmup: int = 2, trace: bool = False
) -> Replayed:
    """Runs steps of a schedule; a collective of its ranks, which all get the same result.

    Times of different ranks are compared on one clock, that of a machine: ranks of several
    machines are not supported.
    """
    from eellm import _core

    check_integer("steps", steps, 1, 1000)
    check_integer("warmup", warmup, 0, 1000)
    schedule, rank = times.schedule, comm.rank
    if comm.size != schedule.ranks:
        raise invalid(
            "the schedule does not fit the job",
            f"{schedule.ranks} ranks",
            comm.size,
            f"start {schedule.ranks} ranks",
        )
    floats = times.message_bytes // 4
    lists = schedule.lists_for_core
    runner = _core.Replay(schedule.spec, times.of_rank(rank), comm, floats, lists)
    found = np.zeros((steps, 3))
    for step in range(-warmup, steps):
        if trace and step == steps - 1:
            runner.record(8 * len(schedule.actions(rank)) + 64)
        result = runner.run()
        if step >= 0:
            found[step] = result
    ranks = np.stack([np.frombuffer(each) for each in comm.all_gather(found.tobytes())])
    ranks = ranks.reshape(-1, steps, 3)
    traces = None
    if trace:
        from eellm.pipeline.trace import gather

        traces = gather(comm, runner.recorded())
    return Replayed(
        times=times,
        transport=comm.transport,
        steps=ranks[:, :, 1].max(axis=0) - ranks[:, :, 0].min(axis=0),
        busy=ranks[:, :, 2].T,
        simulated=times.simulate(),
        trace=traces,
    )


def replay_local(
    times: Times, *, steps: int = 5, warmup: int = 2, trace: bool = False, timeout: float = 300.0
) -> Replayed:
    """The same with ranks that are threads of this process."""
    from eellm.parallel import ParallelConfig, run_local

    found = run_local(
        times.schedule.ranks,
        lambda group: replay(times, group.pipeline, steps=steps, warmup=warmup, trace=trace),
        ParallelConfig(timeout=timeout),
    )
    return found[0]
