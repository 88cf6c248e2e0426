"""eellm schedule --replay."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from eellm.errors import invalid

if TYPE_CHECKING:
    from eellm.pipeline.replay import Replayed, Times

# What TIMES.json says in place of the command line.
_SAID = (
    "name", "rank_edge", "ranks", "microbatches", "chunks", "exits", "fill", "ratio", "load",
    "forward", "backward", "weight", "exit_time", "config", "split", "micro_batch", "seq_length",
    "unit", "message_bytes", "png", "svg", "save", "save_times",
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Runs the replay on all ranks of a job, or on threads; rank 0 prints."""
    for option in _SAID:
        if getattr(options, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise invalid(f"{name} is invalid", "none beside --replay, whose file says it", "it")
    from eellm.pipeline.replay import Times

    times = Times.load(options.replay)
    result, first = _measure(options, times)
    if not first:
        return 0
    overlap = None
    if options.trace and result.trace is not None:
        from eellm.pipeline.trace import overlap_share, save

        save(options.trace, result.trace)
        overlap = overlap_share(result.trace)
    if options.json:
        print(json.dumps(result.as_dict() | {"overlap_share": overlap}))
    else:
        print(report(result))
        if overlap is not None:
            print(f"messages were under way behind actions for {overlap:.1%} of their time")
            print(f"wrote {options.trace}")
    return 0


def _measure(options: argparse.Namespace, times: Times) -> tuple[Replayed, bool]:
    """The result, and whether this process is to show it."""
    from eellm.distributed import is_job, world
    from eellm.pipeline.replay import replay, replay_local

    transport = options.transport
    if transport == "auto":
        transport = "mpi" if is_job() else "local"
    steps, warmup, trace = options.steps, options.warmup, options.trace is not None
    if transport == "local":
        if is_job():
            raise invalid("--transport is invalid", "mpi in a job of mpirun", transport)
        return replay_local(times, steps=steps, warmup=warmup, trace=trace), True
    comm = world("mpi")
    return replay(times, comm, steps=steps, warmup=warmup, trace=trace), comm.rank == 0


def report(result: Replayed) -> str:
    """A table for people."""
    schedule, times = result.times.schedule, result.times
    lines = [
        f"{schedule.name}: {schedule.ranks} ranks ({result.transport}), {schedule.chunks} chunks "
        f"each, {schedule.microbatches} microbatches, messages of {times.message_bytes:,} bytes",
        f"step {1e3 * result.seconds:.3f} ms (median of {len(result.steps)}), simulated "
        f"{1e3 * result.simulated.time:.3f} ms: {result.share:.2%} of the measured time",
        f"{'rank':>4}  {'busy':>12}  {'waiting':>12}  {'simulated':>12}",
    ]
    for each in result.as_dict()["ranks"]:
        values = (each["busy"], each["waiting"], each["simulated_waiting"])
        shown = "  ".join(f"{1e3 * value:>9.3f} ms" for value in values)
        lines.append(f"{each['rank']:>4}  {shown}")
    return "\n".join(lines)
