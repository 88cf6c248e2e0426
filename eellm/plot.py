"""Pictures: losses over steps, which token left at which exit, what speed exits give.

All functions return a matplotlib figure, to be shown in a notebook or saved with `savefig`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eellm.errors import Shown, invalid
from eellm.evaluation.curves import curve
from eellm.palette import colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eellm.decode.generation import Generation

__all__ = ["curve", "exit_names", "exits", "losses"]

BITS = 1.0 / math.log(2.0)
COLUMNS = 88
_INK, _GRID = "#222222", "#d8d8d8"


def losses(
    history: Iterable[Mapping[str, Any]],
    names: Sequence[str] | None = None,
    *,
    unigram: float | None = None,
    title: str = "Loss of every exit",
) -> Figure:
    """Loss over steps: a line for each exit, dots for validation.

    history: the records of `Trainer.history` or of a metrics.jsonl. names: one for each exit, the
    final one last. unigram: entropy of single tokens in bits, drawn as a line to beat.
    """
    records = list(history)
    steps = [record for record in records if record["kind"] == "step"]
    if not steps:
        raise invalid("no history to draw", "records of steps", len(records), "train first")
    values = _column(steps, "losses") * BITS
    count = values.shape[1]
    names = exit_names(count) if names is None else list(names)
    places = np.array([record["step"] for record in steps])
    figure, axes = _figure(7.2, 4.2)
    smooth = _smooth(values, max(1, len(steps) // 50))
    for i in range(count):
        axes.plot(places, values[:, i], color=colour(i, count), alpha=0.18, linewidth=0.8)
        axes.plot(places, smooth[:, i], color=colour(i, count), linewidth=1.8, label=names[i])
    held_out = [record for record in records if record["kind"] == "valid"]
    if held_out:
        dots = _column(held_out, "losses") * BITS
        where = [record["step"] for record in held_out]
        for i in range(count):
            axes.plot(
                where,
                dots[:, i],
                "o",
                color=colour(i, count),
                markersize=5,
                markeredgecolor="white",
                label="Validation" if i == count - 1 else None,
            )
    if unigram is not None:
        axes.axhline(unigram, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"entropy of single tokens: {unigram:.2f}",
            (places[-1], unigram),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=_INK,
        )
    low = float(np.nanmin(smooth))
    high = float(np.nanpercentile(values, 99.5))
    axes.set_ylim(max(0.0, low - 0.1 * (high - low)), high + 0.08 * (high - low))
    axes.set_xlim(places[0] - 1, places[-1] + 1)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss [bits per token]")
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.legend(frameon=False, fontsize=9)
    return figure


def exits(
    result: Generation,
    *,
    names: Sequence[str] | None = None,
    prompt: bool = True,
    title: str = "Where each token left the model",
) -> Figure:
    """A text with each token on the colour of its exit, and the exits over the tokens below.

    names: of the exits, the final one last, in place of the result's. prompt: show it before the
    text. The bars are drawn to the scale of the layers behind each exit.
    """
    places = result.exits.tolist()
    if not places:
        raise invalid("no tokens to draw", "a text with one at least", Shown("none"))
    shown = list(result.exit_names) if names is None else list(names)
    if len(shown) != len(result.exit_names):
        expected = f"one for each of {len(result.exit_names)} exits"
        raise invalid("names has the wrong length", expected, len(shown))
    before = _cells(result.prompt_text or "") if prompt else []
    rows = _layout([(text, -1) for text in before] + list(zip(result.shown(), places, strict=True)))
    height = 0.195 * len(rows) + 0.5
    figure, (text_axes, axes) = _figure(9.6, height + 2.3, [height, 1.6])
    _draw_text(text_axes, rows, len(shown))
    text_axes.set_title(title, loc="left", fontsize=11, color=_INK)
    _draw_places(axes, places, shown, result.exit_depths)
    return figure


def exit_names(count: int) -> list[str]:
    """Names for exits that have none."""
    return [f"exit {i}" for i in range(count - 1)] + ["final exit"]


def _column(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """A field of all records as floats; null stands for what was not finite."""
    return np.array([[np.nan if x is None else x for x in record[key]] for record in records])


def _smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Means over up to 2 half + 1 neighbours."""
    sums = np.cumsum(np.vstack([np.zeros(values.shape[1]), np.nan_to_num(values)]), axis=0)
    counts = np.cumsum(np.vstack([np.zeros(values.shape[1]), np.isfinite(values)]), axis=0)
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _figure(width: float, height: float, heights: Sequence[float] | None = None) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if heights is None:
        axes = figure.subplots()
        every = [axes]
    else:
        axes = figure.subplots(len(heights), 1, height_ratios=list(heights))
        every = list(axes)
    for each in every:
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
        each.tick_params(labelsize=9, colors=_INK)
        each.grid(axis="y", color=_GRID, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, axes


def _cells(text: str) -> list[str]:
    """A text cut at its line ends."""
    return text.splitlines(keepends=True)


def _layout(tokens: Iterable[tuple[str, int]]) -> list[list[tuple[int, str, int]]]:
    """Lines of (column, text, exit), wrapped at COLUMNS."""
    rows: list[list[tuple[int, str, int]]] = [[]]
    column = 0
    for text, place in tokens:
        for i, part in enumerate(text.expandtabs(4).split("\n")):
            if i:
                rows.append([])
                column = 0
            while part:
                room = COLUMNS - column
                if room <= 0:
                    rows.append([])
                    column, room = 0, COLUMNS
                piece, part = part[:room], part[room:]
                rows[-1].append((column, piece, place))
                column += len(piece)
    while len(rows) > 1 and not rows[-1]:
        rows.pop()
    return rows


def _draw_text(axes: Axes, rows: Sequence[Sequence[tuple[int, str, int]]], count: int) -> None:
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(rows), 0)
    axes.axis("off")
    for line, row in enumerate(rows):
        for column, text, place in row:
            if place >= 0:
                width = len(text)
                patch = Rectangle((column + 0.04, line + 0.06), width - 0.08, 0.88, linewidth=0)
                patch.set_facecolor(colour(place, count))
                patch.set_alpha(0.38)
                axes.add_patch(patch)
            for offset, character in enumerate(text):
                if character != " " and character.isprintable():
                    axes.text(
                        column + offset + 0.5,
                        line + 0.54,
                        character,
                        family="monospace",
                        fontsize=10,
                        ha="center",
                        va="center",
                        color=_INK if place >= 0 else "#888888",
                        parse_math=False,
                    )


def _draw_places(
    axes: Axes, places: Sequence[int], names: Sequence[str], depths: Sequence[float]
) -> None:
    count = len(names)
    heights = list(depths)
    at = np.arange(1, len(places) + 1)
    for i, name in enumerate(names):
        mine = np.flatnonzero(np.asarray(places) == i)
        share = 100 * len(mine) / len(places)
        axes.bar(
            at[mine],
            np.full(len(mine), heights[i]),
            width=1.0 if len(places) > 120 else 0.8,
            color=colour(i, count),
            label=f"{name}: {share:.0f} % of tokens",
        )
    axes.set_xlim(0.4, len(places) + 0.6)
    axes.set_ylim(0, max(heights))
    axes.set_yticks([0, *heights])
    axes.set_xlabel("generated token")
    axes.set_ylabel("depth [layers]")
    axes.legend(frameon=False, fontsize=9, ncols=count, loc="lower left", bbox_to_anchor=(0.0, 1.0))
