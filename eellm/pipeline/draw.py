"""Pictures of schedules: a bar for each action, or the busy share where there are too many."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.errors import Shown, invalid
from eellm.pipeline.schedule import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from eellm.pipeline.simulation import Simulation
from eellm.pipeline.table import is_large

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _EDGE = "#222222", "#ffffff"
# Told apart with every kind of colour vision (Okabe and Ito, 2008), and shades of them.
_EXIT = ("early exits", "#E69F00")
_KINDS = {
    FORWARD: ("forward", "#56B4E9"),
    BACKWARD: ("backward", "#009E73"),
    BACKWARD_INPUT: ("backward, input", "#009E73"),
    BACKWARD_WEIGHT: ("backward, weights", "#8FD3BE"),
}
_PARTS = {
    (1, True): ("Part 1, forward", "#E6BCD5"),
    (1, False): ("Part 1, backward", "#CC79A7"),
    (2, True): ("Part 2, forward", "#F2B58A"),
    (2, False): ("Part 2, backward", "#D55E00"),
}
_ROWS, _BUCKETS = 512, 1200

Bar = tuple[float, float, float]  # from, length, place


def figure(simulation: Simulation, title: str | None = None) -> Figure:
    """The actions of each rank over time; beyond 64 ranks x 256 microbatches the busy share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if simulation.time <= 0:
        raise invalid("there is nothing to draw", "actions that take time", Shown("none"))
    schedule = simulation.schedule
    large = is_large(schedule)
    height = 4.5 if large else 1.5 + 0.34 * schedule.ranks
    width = 10.0 if large else min(16.0, max(7.6, 0.3 * float(simulation.action_counts.max()) + 2))
    drawn = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=_INK)
    if large:
        _draw_shares(drawn, axes, simulation)
    else:
        _draw_actions(drawn, axes, simulation)
    axes.set_xlabel("time", fontsize=9)
    axes.set_title(title or _title(simulation), loc="left", fontsize=10, color=_INK)
    return drawn


def save(simulation: Simulation, path: str | Path, title: str | None = None) -> None:
    """Writes a PNG or SVG, as the name of the file ends."""
    figure(simulation, title).savefig(path)


def _title(simulation: Simulation) -> str:
    schedule = simulation.schedule
    parts = [schedule.name, f"{schedule.ranks} ranks"]
    if schedule.chunks > 1:
        parts.append(f"{schedule.chunks} chunks a rank")
    parts.append(f"{schedule.microbatches} microbatches")
    if any(schedule.fill):
        parts.append(f"{schedule.fill[0]} + {schedule.fill[1]} in the bubbles")
    parts.append(f"bubbles {simulation.bubble_share:.1%}")
    return ", ".join(parts)


def _draw_shares(drawn: Figure, axes: Axes, simulation: Simulation) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ranks = simulation.schedule.ranks
    image = axes.imshow(
        simulation.grid(_ROWS, _BUCKETS),
        aspect="auto",
        cmap=LinearSegmentedColormap.from_list("busy", ["#ffffff", "#0072B2"]),
        vmin=0,
        vmax=1,
        extent=(0, simulation.time, ranks - 0.5, -0.5),
        interpolation="nearest",
    )
    axes.set_ylabel("rank", fontsize=9)
    drawn.colorbar(image, ax=axes, label="busy share", pad=0.01)


def _draw_actions(drawn: Figure, axes: Axes, simulation: Simulation) -> None:
    ranks = simulation.schedule.ranks
    bars: dict[tuple[str, str], list[Bar]] = defaultdict(list)
    for rank in range(ranks):
        _add_bars(bars, axes, simulation, rank)
    order = [*_KINDS.values(), *_PARTS.values(), _EXIT]
    for name, colour in sorted(bars, key=order.index):
        found = bars[(name, colour)]
        axes.barh(
            [place for _, _, place in found],
            [length for _, length, _ in found],
            left=[start for start, _, _ in found],
            height=0.84,
            color=colour,
            edgecolor=_EDGE,
            linewidth=0.0 if (name, colour) == _EXIT else 0.6,
            label=name,
        )
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_xlim(0, simulation.time)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.tick_params(axis="y", length=0)
    columns = min(len(bars), 4)
    drawn.legend(frameon=False, fontsize=8, ncols=columns, loc="outside lower center")


def _add_bars(bars: dict[Any, list[Bar]], axes: Axes, simulation: Simulation, rank: int) -> None:
    schedule, exit_time = simulation.schedule, simulation.costs.exit_time
    named = schedule.total * schedule.chunks <= 64
    pairs = zip(schedule.actions(rank).tolist(), simulation.times(rank).tolist(), strict=True)
    for (kind, _, chunk, microbatch), (start, end) in pairs:
        part = schedule.part_of(microbatch)
        style = _PARTS[(part, kind == FORWARD)] if part else _KINDS[kind]
        if end <= start:
            continue
        bars[style].append((start, end - start, float(rank)))
        exit = float(exit_time[chunk * schedule.ranks + rank])
        if exit > 0 and kind in (BACKWARD, BACKWARD_INPUT):
            bars[_EXIT].append((start, min(exit, end - start), float(rank)))
        if named:
            text = f"{microbatch}.{chunk}" if schedule.chunks > 1 else str(microbatch)
            axes.text(
                (start + end) / 2, rank, text, ha="center", va="center", fontsize=7, color=_INK
            )
