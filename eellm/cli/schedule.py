"""eellm schedule."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eellm.config import ModelConfig
    from eellm.pipeline import Costs, Schedule, Simulation

EPILOG = """\
A schedule says what each rank of a pipeline does in a training step, one action after the other:

  gpipe        all forwards, then all backwards; keeps the activations of every microbatch
  1f1b         after a warm-up one forward and one backward in turns; as fast, and keeps few
  interleaved  1f1b with several --chunks of layers on each rank: smaller bubbles, more messages
  zero_bubble  backward in two parts; weight gradients fill the bubble at the end (ZB-H1)

The lists are proved (nothing is lost, no ranks wait for each other) and priced. Without --config a
microbatch takes a rank --forward and --backward, in any unit; an early exit runs inside the
backward of its rank and takes --exit-time, and so does the final one on the last rank. With
--config times and bytes come from the model's sizes. --fill puts microbatches into the bubbles of
1f1b that run only in part: Part 1 ends at an early exit, Part 2 sends its gradient back a few ranks
only; auto takes as many as make no step longer.

--replay runs a schedule: the runner, its messages and its transport as in training, with a wait in
place of each action, as long as TIMES.json says; so more ranks can be measured than there are
cores. Ranks are the processes of mpirun, else threads. --save-times writes such a file.

examples:
  eellm schedule --name 1f1b --ranks 4 --microbatches 6 --exits 1,2
  eellm schedule --name zero_bubble --ranks 4 --microbatches 8 --png zero_bubble.png
  eellm schedule --name interleaved --ranks 4 --microbatches 8 --chunks 2 --svg interleaved.svg
  eellm schedule --name 1f1b --ranks 4 --microbatches 6 --exits 1,2 --fill auto
  eellm schedule --ranks 4 --microbatches 64 --config run.toml
  eellm schedule --ranks 4 --microbatches 6 --save mine.json
  eellm schedule --load mine.json            an edited list, refused where it cannot run
  eellm schedule --ranks 4 --microbatches 8 --unit 0.01 --save-times times.json
  eellm launch -n 4 -- schedule --replay times.json --trace trace.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    shape = parser.add_argument_group("schedule")
    shape.add_argument(
        "--name",
        choices=("gpipe", "1f1b", "interleaved", "zero_bubble"),
        help="default 1f1b",
    )
    shape.add_argument("--ranks", type=int, metavar="P", help="of the pipeline; default 4")
    shape.add_argument("--microbatches", type=int, metavar="M", help="of a step; default 8")
    shape.add_argument("--chunks", type=int, metavar="V", help="of each rank; default 1")
    shape.add_argument(
        "--exits",
        metavar="R,R",
        help="the rank of each early exit, from 0; with --chunks the chunk, in the model's order",
    )
    shape.add_argument(
        "--fill", metavar="K1,K2", help="microbatches in the bubbles, two numbers or auto"
    )
    shape.add_argument(
        "--ratio",
        type=float,
        metavar="B/F",
        help="backward over forward, for --fill; default 2, or that of the times",
    )
    shape.add_argument("--load", metavar="FILE", help="lists from a file, in place of a name")
    costs = parser.add_argument_group("costs")
    costs.add_argument("--forward", type=float, metavar="T", help="of a rank; default 1")
    costs.add_argument("--backward", type=float, metavar="T", help="of a rank; default 2")
    costs.add_argument(
        "--weight", type=float, metavar="T", help="the weights' part of it; default half"
    )
    costs.add_argument(
        "--exit-time",
        type=float,
        metavar="T",
        help="of an exit, both ways; default a tenth of forward and backward",
    )
    costs.add_argument("--message", type=float, default=0.0, metavar="T", help="default 0")
    costs.add_argument(
        "--config",
        metavar="PATH",
        help="a run's TOML file, whose [parallel] counts too, or a model directory",
    )
    costs.add_argument(
        "--split", metavar="N,N", help="layers of each chunk, or cost for equal time"
    )
    costs.add_argument("--micro-batch", type=int, metavar="B", help="sequences; default 1")
    costs.add_argument("--seq-length", type=int, metavar="T", help="tokens of a sequence")
    costs.add_argument(
        "--gflops", type=float, default=100.0, metavar="R", help="of a rank; default 100"
    )
    costs.add_argument(
        "--rank-edge",
        choices=("later", "earlier"),
        help="whose an exit between two ranks is; default later",
    )
    _add_replay(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--png", metavar="FILE", help="draw a picture")
    output.add_argument("--svg", metavar="FILE", help="draw a picture")
    output.add_argument("--save", metavar="FILE", help="write the lists as JSON")
    output.add_argument("--json", action="store_true", help="print one JSON object, no table")


def _add_replay(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("replay")
    group.add_argument("--replay", metavar="TIMES.json", help="run it with waits, and measure it")
    group.add_argument("--save-times", metavar="FILE", help="write these costs for --replay")
    group.add_argument(
        "--unit", type=float, metavar="S", help="seconds of a unit of time; default 0.01"
    )
    group.add_argument(
        "--message-bytes", type=int, metavar="N", help="of a message; default 1 MiB, or the model's"
    )
    group.add_argument("--transport", choices=("auto", "mpi", "local"), default="auto")
    group.add_argument("--steps", type=int, default=5, metavar="N", help="measured; default 5")
    group.add_argument("--warmup", type=int, default=2, metavar="N", help="before; default 2")
    group.add_argument("--trace", metavar="FILE", help="write the last step in Chrome's format")


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    if options.replay:
        from eellm.cli import replay

        return replay.run(options)
    if options.trace:
        raise _wrong("--trace", "--replay beside it", options.trace)
    for option, ending in (("png", ".png"), ("svg", ".svg")):
        path = getattr(options, option)
        if path and Path(path).suffix.lower() != ending:
            raise _wrong(f"--{option}", f"a file that ends in {ending}", path)
    schedule, costs, units = _make(options)
    result = schedule.simulate(costs)
    if options.save:
        schedule.save(options.save)
    if options.save_times:
        _save_times(options, schedule, costs)
    for path in filter(None, (options.png, options.svg)):
        from eellm.pipeline import draw

        draw.save(result, path)
    if options.json:
        print(json.dumps(_as_json(schedule, result)))
    else:
        _print(options, schedule, result, units)
    return 0


def _save_times(options: argparse.Namespace, schedule: Schedule, costs: Costs) -> None:
    from eellm.pipeline.replay import Times

    size = 1 << 20
    if options.config:
        if options.unit is not None:
            raise _wrong("--unit", "none with --config, whose times are seconds", options.unit)
        config, micro_batch, seq_length = _read_config(options)
        size = 4 * micro_batch * seq_length * config.hidden_size
    unit = 1.0 if options.config else 0.01 if options.unit is None else options.unit
    if not unit > 0:
        raise _wrong("--unit", "a number above 0", unit)
    size = size if options.message_bytes is None else options.message_bytes
    Times.of(schedule, costs, unit=unit, message_bytes=size).save(options.save_times)


def _make(options: argparse.Namespace) -> tuple[Schedule, Costs, bool]:
    """The schedule, its costs, and whether those are seconds and bytes."""
    from eellm.pipeline import Schedule

    _take_settings(options)
    if options.load:
        for option in ("ranks", "microbatches", "chunks", "fill", "ratio"):
            if getattr(options, option) is not None:
                raise _wrong(f"--{option}", "none beside --load, which says it", "it")
        schedule = Schedule.load(options.load)
        exits = _numbers("--exits", options.exits) if options.exits else list(schedule.exits)
        costs = _costs(options, schedule.ranks, schedule.chunks, exits)
        return schedule, costs, options.config is not None
    ranks = 4 if options.ranks is None else options.ranks
    chunks = 1 if options.chunks is None else options.chunks
    exits = _numbers("--exits", options.exits) if options.exits else []
    fill = _fill(options.fill)
    # What does not fit together is refused before anything is worked out from it.
    schedule = Schedule(
        options.name,
        ranks,
        8 if options.microbatches is None else options.microbatches,
        chunks,
        fill=fill,
        ratio=_ratio(options),
        exits=[each % ranks if ranks > 0 and each < ranks * chunks else each for each in exits],
    )
    costs = _costs(options, ranks, chunks, exits)
    if costs.layout is not None:
        schedule = Schedule(
            schedule.name,
            ranks,
            schedule.microbatches,
            chunks,
            fill=fill,
            ratio=schedule.ratio,
            exits=costs.layout.exit_ranks,
        )
    return schedule, costs, options.config is not None


def _take_settings(options: argparse.Namespace) -> None:
    """Fills what is not given from the settings of a run, or with its default."""
    options.recompute, options.exit_w = "none", "fused"
    if options.config and not Path(options.config).is_dir():
        from eellm.settings import build_sections, load_toml
        from eellm.train.run import SCHEMA

        sections = build_sections(SCHEMA, load_toml(options.config))
        parallel = sections["parallel"]
        options.recompute, options.exit_w = sections["train"].recompute, parallel.exit_w
        if options.split is None:
            split = ",".join(map(str, parallel.split))
            options.split = split or ("cost" if parallel.balance == "cost" else None)
        options.name = options.name or parallel.schedule
        options.rank_edge = options.rank_edge or parallel.rank_edge
        if options.chunks is None and options.name == parallel.schedule and not options.load:
            options.chunks = parallel.chunks
    options.name = options.name or "1f1b"
    options.rank_edge = options.rank_edge or "later"


def _costs(options: argparse.Namespace, ranks: int, chunks: int, exits: list[int]) -> Costs:
    """Uniform costs, or those of a model."""
    from eellm.pipeline import Costs
    from eellm.pipeline.costs import Rates

    uniform = ("forward", "backward", "weight", "exit_time", "exits")
    of_model = ("split", "micro_batch", "seq_length")
    for option in uniform if options.config else of_model:
        if getattr(options, option) is not None:
            where = "no --config, whose model says it" if options.config else "--config beside it"
            raise _wrong(f"--{option.replace('_', '-')}", where, getattr(options, option))
    if not options.config:
        return _uniform(options, ranks, chunks, exits)
    config, micro_batch, seq_length = _read_config(options)
    split = options.split
    if split is not None and split != "cost":
        split = _numbers("--split", split)
    if not options.gflops > 0:
        raise _wrong("--gflops", "a number above 0", options.gflops)
    costs = Costs.of_model(
        config,
        ranks,
        chunks,
        seq_length=seq_length,
        micro_batch_size=micro_batch,
        split=split,
        rank_edge=options.rank_edge,
        recompute=options.recompute,
        exit_w=options.exit_w,
        rates=Rates(flops=1e9 * options.gflops),
    )
    from dataclasses import replace

    return replace(costs, message=options.message)


def _uniform(options: argparse.Namespace, ranks: int, chunks: int, exits: list[int]) -> Costs:
    from eellm.pipeline import Costs

    forward = 1.0 if options.forward is None else options.forward
    backward = 2.0 if options.backward is None else options.backward
    each = 0.1 * (forward + backward) if options.exit_time is None else options.exit_time
    # The final exit is one like the others.
    head = each if exits or options.exit_time is not None else 0.0
    return Costs.uniform(
        ranks,
        chunks,
        forward,
        backward,
        backward_weight=options.weight,
        message=options.message,
        exits=exits,
        exit=(0.0, each),
        head=(0.0, head),
    )


def _read_config(options: argparse.Namespace) -> tuple[ModelConfig, int, int]:
    """A model, sequences of a microbatch, tokens of a sequence."""
    config, sections = read_run(Path(options.config))
    micro_batch, seq_length = 1, config.max_position_embeddings
    if sections is not None:
        micro_batch, seq_length = sections["train"].micro_batch_size, sections["train"].seq_length
    micro_batch = micro_batch if options.micro_batch is None else options.micro_batch
    return config, micro_batch, seq_length if options.seq_length is None else options.seq_length


def read_run(path: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """The model of a run's file and the sections of that, or of a model directory."""
    if path.is_dir():
        from eellm.files.directory import read_config

        return read_config(path), None
    from eellm.settings import build_sections, load_toml
    from eellm.train.run import SCHEMA

    sections = build_sections(SCHEMA, load_toml(path))
    settings = sections["model"]
    if settings.pretrained is not None or "vocab_size" not in settings.values:
        what = f"{path} does not say the sizes of the model"
        raise ValueError(
            f"{what} (expected vocab_size and others in [model], got pretrained or a "
            "tokenizer's); give the model's directory"
        )
    return settings.config(), sections


def _ratio(options: argparse.Namespace) -> float:
    if options.ratio is not None:
        return float(options.ratio)
    forward, backward = options.forward or 1.0, options.backward or 2.0
    return float(backward / forward) if forward > 0 and backward > 0 else 2.0


def _fill(text: str | None) -> Any:
    if text is None:
        return (0, 0)
    return "auto" if text == "auto" else tuple(_numbers("--fill", text))


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise _wrong(option, "whole numbers with commas between them", text)
    return [int(part) for part in parts]


def _wrong(option: str, expected: str, got: object) -> ValueError:
    from eellm.errors import invalid

    return invalid(f"{option} is invalid", expected, got, "see eellm schedule --help")


def _as_json(schedule: Schedule, result: Simulation) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "ranks": schedule.ranks,
        "chunks": schedule.chunks,
        "microbatches": schedule.microbatches,
        "fill": list(schedule.fill),
        "exits": list(schedule.exits),
        "custom": schedule.custom,
        "layers": list(result.costs.layout.split) if result.costs.layout else None,
        "simulation": result.as_dict(),
    }


def _print(
    options: argparse.Namespace, schedule: Schedule, result: Simulation, units: bool
) -> None:
    from eellm.pipeline.table import chart, report

    width = min(160, shutil.get_terminal_size((100, 24)).columns)
    print(chart(result, width))
    print()
    kind = "from a file" if schedule.custom else "valid"
    print(f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} microbatches, {kind}")
    if result.costs.layout is not None:
        print("layers of each chunk: " + ", ".join(map(str, result.costs.layout.split)))
    print(report(result, units=units))
    if result.costs.exit_time.any():
        plain = schedule.simulate(without_exits(result.costs)).time
        extra = result.time / plain - 1
        print(f"without the early exits {plain:.6g}: they cost {extra:.2%}")
    if any(schedule.fill) and not schedule.custom:
        from eellm.pipeline import Schedule as Plain

        empty = Plain(schedule.name, schedule.ranks, schedule.microbatches).simulate(result.costs)
        print(f"with empty bubbles {empty.time:.6g}")
    for path in filter(None, (options.png, options.svg, options.save, options.save_times)):
        print(f"wrote {path}")


def without_exits(costs: Costs) -> Costs:
    """The same costs less the time of the early exits."""
    from dataclasses import replace

    import numpy as np

    return replace(
        costs,
        backward=costs.backward - costs.exit_time,
        backward_input=costs.backward_input - costs.exit_time,
        exit_time=np.zeros(1),
    )
