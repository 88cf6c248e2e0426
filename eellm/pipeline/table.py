"""Schedules as text: a chart of the actions over time, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from eellm.pipeline.schedule import Schedule
from eellm.pipeline.simulation import Simulation

MOST_RANKS, MOST_MICROBATCHES = 64, 256
_LETTERS = "FBIW"
_SHADES = " ░▒▓█"
LEGEND = (
    "F forward, B backward, I backward of the input, W of the weights; the microbatch, and .chunk "
    "of the rank; small letters: microbatches that fill bubbles; * ranks with early exits; "
    ". waits"
)
BUSY_LEGEND = "the darker, the busier; * ranks with early exits"


def is_large(schedule: Schedule) -> bool:
    """Whether single actions can no longer be told apart."""
    return schedule.ranks > MOST_RANKS or schedule.total > MOST_MICROBATCHES


def chart(simulation: Simulation, width: int = 100) -> str:
    """The actions of each rank over time, in lines of at most `width` characters."""
    schedule = simulation.schedule
    if simulation.time <= 0:
        return "every action takes no time: there is nothing to draw"
    large = is_large(schedule)
    lines = _busy(simulation, width) if large else _actions(simulation, width)
    return "\n".join([*lines, BUSY_LEGEND if large else LEGEND])


def _heads(schedule: Schedule, ranks: list[int]) -> list[str]:
    exits = set(schedule.exits)
    names = [f"rank {rank}{'*' if rank in exits else ' '}" for rank in ranks]
    longest = max(map(len, names))
    return [f"{name:<{longest}}|" for name in names]


def label_of(schedule: Schedule, kind: int, chunk: int, microbatch: int) -> str:
    """A short name of an action."""
    letter = _LETTERS[kind] if microbatch < schedule.microbatches else _LETTERS[kind].lower()
    return f"{letter}{microbatch}{f'.{chunk}' if schedule.chunks > 1 else ''}"


def _actions(simulation: Simulation, width: int) -> Iterator[str]:
    schedule = simulation.schedule
    widest = len(str(schedule.total - 1)) + 2
    if schedule.chunks > 1:
        widest += 1 + len(str(schedule.chunks - 1))
    spans = [simulation.times(rank) for rank in range(schedule.ranks)]
    lengths = np.concatenate([span[:, 1] - span[:, 0] for span in spans])
    shortest = float(np.min(lengths, where=lengths > 0, initial=simulation.time))
    # The shortest action has room for its name, unless that takes too many lines.
    scale = min(widest / shortest, 40 * width / simulation.time)
    columns = round(simulation.time * scale) + 1
    heads = _heads(schedule, list(range(schedule.ranks)))
    rows = [_row(simulation, rank, scale, columns) for rank in range(schedule.ranks)]
    step = max(20, width - len(heads[0]))
    for first in range(0, columns, step):
        if first:
            yield ""
        for head, row in zip(heads, rows, strict=True):
            yield (head + row[first : first + step]).rstrip()


def _row(simulation: Simulation, rank: int, scale: float, columns: int) -> str:
    """A rank's actions, each with its name, then hyphens and a space up to its end."""
    schedule = simulation.schedule
    row = ["."] * (columns - 1) + [" "]
    actions = schedule.actions(rank).tolist()
    for (kind, _, chunk, microbatch), (start, end) in zip(
        actions, simulation.times(rank).tolist(), strict=True
    ):
        first, last = round(start * scale), round(end * scale)
        room = last - first
        if room <= 0:
            continue
        text = label_of(schedule, kind, chunk, microbatch)
        text = text[: room - 1].ljust(room - 1, "-") + " " if room > 1 else text[:1]
        row[first:last] = text
    return "".join(row)


def _busy(simulation: Simulation, width: int) -> Iterator[str]:
    ranks = simulation.schedule.ranks
    rows = min(32, ranks)
    heads = _heads(simulation.schedule, [-(-i * ranks // rows) for i in range(rows)])
    shares = simulation.grid(rows, max(20, width - len(heads[0])))
    for head, row in zip(heads, shares, strict=True):
        yield (head + "".join(_SHADES[round(share * 4)] for share in row.clip(0, 1))).rstrip()


def report(simulation: Simulation, *, units: bool) -> str:
    """Time, bubbles, slots and memory, for all ranks if there are not too many.

    units: bytes and seconds are real ones, not those of uniform costs.
    """
    ranks = simulation.schedule.ranks
    time = _time(simulation.time, units)
    lines = [f"step {time}, bubbles {simulation.bubble_share:.1%} of all ranks' time"]
    shown = list(range(ranks)) if ranks <= 32 else [0, 1, ranks // 2, ranks - 2, ranks - 1]
    memory = "memory" if units else "memory*"
    rows = [["rank", "actions", "busy", "bubbles", "slots", memory]]
    for rank in shown:
        rows.append(
            [
                str(rank),
                str(int(simulation.action_counts[rank])),
                _time(float(simulation.busy[rank]), units),
                f"{float(simulation.bubbles[rank]) / max(simulation.time, 1e-300):.1%}",
                str(int(simulation.slots[rank])),
                _size(float(simulation.peak_bytes[rank]), units),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        lines.append("  ".join(f"{cell:>{n}}" for cell, n in zip(row, widths, strict=True)))
    if not units:
        lines.append("* activations of a microbatch on a rank are 1")
    return "\n".join(lines)


def _time(value: float, units: bool) -> str:
    if not units:
        return f"{value:.6g}"
    return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.3f} ms"


def _size(value: float, units: bool) -> str:
    return f"{value / (1 << 30):.3f} GiB" if units else f"{value:.6g}"


__all__ = ["chart", "is_large", "label_of", "report"]
