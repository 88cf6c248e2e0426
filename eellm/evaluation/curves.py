"""The picture of an evaluation: what speed the exits give, at which agreement and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from eellm.errors import Shown, invalid
from eellm.palette import EXIT_COLORS, FINAL_COLOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eellm.evaluation import Evaluation, Row

_CURVE, _FOUND, _MARKED = EXIT_COLORS[5], EXIT_COLORS[4], EXIT_COLORS[2]


def curve(found: Evaluation, *, title: str = "Speed of early exits") -> Figure:
    """Speed-up over full depth, against agreement with it and against mean depth.

    The curve is of equal thresholds for all exits, from never (1) to always (0); lines are what was
    predicted, dots what was measured. Diamonds are the thresholds that a search found.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not found.curve:
        expected, got = "a model with early exits", Shown("a model without")
        raise invalid("no curve to draw", expected, got, "add some and train them")
    figure = Figure(figsize=(10.4, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, found, lambda row: 100 * row.agreement)
    _draw(right, found, lambda row: row.mean_depth)
    left.axvline(100 * found.wanted, color=FINAL_COLOR, linewidth=1, linestyle=(0, (4, 3)))
    left.invert_xaxis()
    right.invert_xaxis()
    left.set_xlabel("agreement with full depth [% of tokens]")
    right.set_xlabel("mean depth [layers]")
    left.set_ylabel("speed [times full depth]")
    left.set_title(title, loc="left", fontsize=11)
    left.legend(frameon=False, fontsize=9, loc="best")
    return figure


def _draw(axes: Axes, found: Evaluation, where: Callable[[Row], float]) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#d8d8d8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.axhline(1, color=FINAL_COLOR, linewidth=1)
    axes.plot(
        [where(row) for row in found.curve],
        [row.predicted for row in found.curve],
        color=_CURVE,
        linewidth=1.6,
        label="one threshold, predicted",
    )
    _dots(axes, found.curve, where, "o", _CURVE, "one threshold, measured")
    _dots(axes, found.candidates, where, "D", _FOUND, "found thresholds, measured")
    if found.full_tokens_per_second is None and found.candidates:
        axes.plot(
            [where(row) for row in found.candidates],
            [row.predicted for row in found.candidates],
            "D",
            color=_FOUND,
            markersize=5,
            label="found thresholds, predicted",
        )
    marked = found.marked
    if marked is not None:
        axes.plot(
            where(marked),
            marked.gain,
            "o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=_MARKED,
            markeredgewidth=2,
            label=f"threshold {marked.thresholds[0]:g}, best of one at {100 * found.wanted:g} %",
        )


def _dots(
    axes: Axes,
    rows: Sequence[Row],
    where: Callable[[Row], float],
    marker: str,
    colour: str,
    label: str,
) -> None:
    timed: list[Any] = [row for row in rows if row.speedup is not None]
    if timed:
        axes.plot(
            [where(row) for row in timed],
            [row.speedup for row in timed],
            marker,
            color=colour,
            markersize=5,
            markeredgecolor="white",
            label=label,
        )
