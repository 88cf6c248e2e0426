"""Is the simulator right about the paper's Table 1, and what do the largest schedules take?

    python benchmarks/bench_schedule.py [--only METRIC] [--json FILE] [--turns N]

Table 1 of EE-LLM (Chen et al., ICML 2024): its row with both optimisations, from the sizes that the
paper states (table1.py). The largest schedules have
4,096 ranks and 16,384 microbatches, are generated, proved and priced, each in a process of its own.
"""

import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import arguments, in_turns, median, record, report

RANKS, MICROBATCHES = 4096, 16384
SCHEDULES = {"1f1b": 1, "interleaved": 2, "zero_bubble": 1}
METRICS = (
    "simulator_table1_time_error", "simulator_4096_ranks_seconds", "simulator_4096_ranks_gib",
)  # fmt: skip
LIMITS = {"simulator_4096_ranks_seconds": ("s", 10.0), "simulator_4096_ranks_gib": ("GiB", 4.0)}


def side(name):
    """Generates, validates and prices a schedule."""
    from eellm.pipeline import Costs, Schedule

    chunks = SCHEDULES[name]
    began = time.perf_counter()
    schedule = Schedule(name, RANKS, MICROBATCHES, chunks)
    result = schedule.simulate(Costs.uniform(RANKS, chunks, chunks, 2 * chunks))
    seconds = time.perf_counter() - began
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(seconds=seconds, gib=gib, step=result.time)


def table_1():
    """Points between the simulated and the paper's overhead in time, of both models."""
    from benchmarks.table1 import ROWS, simulated

    row, errors = "early exits (1 and 2)", []
    for size in range(2):
        mine = simulated(size, row)[0] / simulated(size, "standard")[0] - 1
        paper = ROWS[row][size][0] / ROWS["standard"][size][0] - 1
        errors.append(100 * abs(mine - paper))
    config = json.dumps(dict(row=row, models=["1.3B", "7B"], errors=errors))
    return record("simulator_table1_time_error", max(errors), "points", errors, config=config)


def largest(wanted, options):
    results = in_turns(__file__, list(SCHEDULES), {}, options.turns or 3, 1)
    records = []
    for metric in wanted:
        unit, limit = LIMITS[metric]
        key = "seconds" if unit == "s" else "gib"
        values = {name: [turn[key] for turn in turns] for name, turns in results.items()}
        worst = max(values, key=lambda name: median(values[name]))
        config = json.dumps({name: round(median(found), 3) for name, found in values.items()})
        value = median(values[worst])
        records.append(
            record(metric, value, unit, values[worst], limit=limit, limit_share=limit / value,
                   config=config)
        )  # fmt: skip
    return records


def main():
    options = arguments(__doc__, METRICS)
    if options.side:
        print(json.dumps(side(options.side)))
        return
    wanted = [options.only] if options.only else list(METRICS)
    records = [table_1()] if METRICS[0] in wanted else []
    rest = [metric for metric in wanted if metric in LIMITS]
    records += largest(rest, options) if rest else []
    report(records, options.json)


if __name__ == "__main__":
    main()
