"""eellm plan."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.errors import invalid

if TYPE_CHECKING:
    from eellm.config import ModelConfig
    from eellm.pipeline.measure import Speeds
    from eellm.pipeline.plan import Plan, Planner

EPILOG = """\
Which schedule, split of the layers, size of microbatches and recomputation of activations suits a
model on --ranks ranks that have --memory GiB each? Each choice is priced: seconds of a step from
the simulator, bytes of every rank from what the trainer allocates. Plans that fit come first, the
fastest on top; those that do not fit are marked.

Without --measure times come from counts of operations and bytes, at --gflops a rank: they compare
plans, and say little about this machine. --measure times small models of the same width here, with
as many ranks beside each other as the cores allow.

CONFIG is a run's TOML file (its global batch, exits, rank_edge and exact_ties hold), or a model
directory, with --batch and --seq-length.

examples:
  eellm plan run.toml --ranks 4 --memory 16
  eellm plan run.toml --ranks 2 --memory 8 --measure
  eellm plan my_model/ --ranks 8 --memory 24 --batch 64 --seq-length 1024 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("config", metavar="CONFIG", help="a run's TOML file or a model directory")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="of the pipeline")
    parser.add_argument("--memory", type=float, metavar="G", help="GiB of a rank; default no limit")
    parser.add_argument("--batch", type=int, metavar="B", help="sequences of a step")
    parser.add_argument("--seq-length", type=int, metavar="T", help="tokens of a sequence")
    parser.add_argument(
        "--micro-batches", metavar="B,B", help="sizes to try; default the smallest divisors"
    )
    parser.add_argument(
        "--recompute", metavar="R,R", help="of none, attention, full; default all of them"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a rank; default 1")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--measure", action="store_true", help="time parts of the model here")
    speed.add_argument(
        "--gflops", type=float, default=100.0, metavar="R", help="of a rank; default 100"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--top", type=int, default=15, metavar="N", help="plans shown; default 15")
    output.add_argument("--png", metavar="FILE", help="draw the best plan's schedule")
    output.add_argument("--json", action="store_true", help="print one JSON object, no table")


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.top < 1:
        raise _wrong("--top", "at least 1", options.top)
    if options.png and Path(options.png).suffix.lower() != ".png":
        raise _wrong("--png", "a file that ends in .png", options.png)
    planner = _planner(options)
    plans = planner.plans(**_choices(options))
    if not plans:
        raise _wrong("--recompute", "one of none, attention and full", options.recompute)
    shown = plans[: options.top]
    if options.png:
        from eellm.pipeline import draw

        draw.save(shown[0].simulation, options.png)
    if options.json:
        print(json.dumps({"ranks": options.ranks, "plans": [each.as_dict() for each in shown]}))
    else:
        print(report(planner, plans, shown))
    return 0


def _planner(options: argparse.Namespace) -> Planner:
    from eellm.cli.schedule import read_run
    from eellm.pipeline.plan import Planner

    config, sections = read_run(Path(options.config))
    batch, seq_length = options.batch, options.seq_length
    more: dict[str, Any] = {}
    if sections is not None:
        train, parallel = sections["train"], sections["parallel"]
        batch = train.global_batch_size if batch is None else batch
        seq_length = train.seq_length if seq_length is None else seq_length
        more = {name: getattr(parallel, name) for name in ("rank_edge", "exit_w", "exact_ties")}
    if batch is None:
        raise _wrong("--batch", "the sequences of a step, with a model directory", "none")
    seq_length = config.max_position_embeddings if seq_length is None else seq_length
    if options.memory is not None and not options.memory > 0:
        raise _wrong("--memory", "GiB, above 0", options.memory)
    if options.threads < 1:
        raise _wrong("--threads", "at least 1", options.threads)
    if not options.gflops > 0:
        raise _wrong("--gflops", "a number above 0", options.gflops)

    def speeds(micro_batch_size: int) -> Speeds:
        return _speeds(options, config, seq_length, micro_batch_size)

    return Planner(
        config,
        options.ranks,
        seq_length=seq_length,
        global_batch_size=batch,
        speeds=speeds,
        limit=None if options.memory is None else options.memory * (1 << 30),
        threads=options.threads,
        **more,
    )


def _speeds(
    options: argparse.Namespace, config: ModelConfig, seq_length: int, micro_batch_size: int
) -> Speeds:
    from eellm.pipeline import measure

    if not options.measure:
        return measure.estimate(
            config,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            flops=1e9 * options.gflops,
        )
    together = measure.ranks_at_a_time(options.ranks, options.threads)
    print(
        f"measuring microbatches of {micro_batch_size} with {together} ranks at a time",
        file=sys.stderr,
        flush=True,
    )
    return measure.measure(
        config,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        together=together,
        threads=options.threads,
    )


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    from eellm.pipeline.plan import RECOMPUTE

    found: dict[str, Any] = {}
    if options.micro_batches is not None:
        parts = [part.strip() for part in options.micro_batches.split(",")]
        if not all(part.isascii() and part.isdecimal() for part in parts):
            raise _wrong("--micro-batches", "numbers with commas between", options.micro_batches)
        found["micro_batches"] = [int(part) for part in parts]
    if options.recompute is not None:
        modes = [part.strip() for part in options.recompute.split(",")]
        for mode in modes:
            if mode not in RECOMPUTE:
                raise _wrong("--recompute", "of none, attention, full", mode)
        found["recompute"] = modes
    return found


def _wrong(option: str, expected: str, got: object) -> ValueError:
    return invalid(f"{option} is invalid", expected, got, "see eellm plan --help")


def report(planner: Planner, plans: list[Plan], shown: list[Plan]) -> str:
    """A table of plans, and how to take the best one."""
    head = ["", "step", "bubbles", "memory", "schedule", "micro batch", "recompute", "layers"]
    rows = [head]
    for plan in shown:
        choice = plan.choice
        name = choice.schedule + (f" x {choice.chunks}" if choice.chunks > 1 else "")
        rows.append(
            [
                "" if plan.fits else "too large",
                f"{plan.seconds:.4g} s",
                f"{plan.simulation.bubble_share:.1%}",
                f"{plan.peak / (1 << 30):.3f} GiB",
                name,
                f"{choice.micro_batch_size} x {choice.microbatches}",
                choice.recompute,
                _layers(choice.split),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    known = (
        "measured here"
        if planner.speeds(shown[0].choice.micro_batch_size).measured
        else ("estimated from counts")
    )
    count = sum(each.fits for each in plans)
    lines.append(f"{count} of {len(plans)} plans fit; memory is of the rank that needs most; "
                 f"times are {known}")  # fmt: skip
    lines += ["", "# the first, in a run's file"]
    for section, values in shown[0].choice.settings().items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines)


def _layers(split: tuple[int, ...]) -> str:
    if len(set(split)) == 1:
        return f"{split[0]} each"
    text = ", ".join(map(str, split))
    return text if len(text) <= 40 else f"{min(split)} to {max(split)}"
