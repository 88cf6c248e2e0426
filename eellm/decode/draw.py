"""A picture of what the ranks of a pipeline did when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eellm.errors import Shown, invalid
from eellm.palette import colour

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from eellm.decode.pipeline import Trace

_INK, _FILL, _EDGE = "#222222", "#E3E3E3", "#ffffff"


def passes(traces: Sequence[Trace], exits: int, names: Sequence[str] | None = None) -> Figure:
    """The passes of each rank over time, with the position of their rows.

    A bar has the colour of the exit where its token left on that rank, up to the moment when it
    left; it is pale where a rank only fills the cache, or passes a row on. traces: of
    `Generator.traces`; exits: of the model, the final one included; names: of theirs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not any(len(seconds) for seconds, _ in traces):
        raise invalid("there is nothing to draw", "ranks with a trace", Shown("none"))
    zero = min(seconds[:, 0].min() for seconds, _ in traces if len(seconds))
    figure = Figure(figsize=(10.0, 1.4 + 0.42 * len(traces)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for rank, (seconds, numbers) in enumerate(traces):
        for (start, end, told), row in zip(1e3 * (seconds - zero), numbers, strict=True):
            axes.barh(rank, end - start, 0.8, start, color=_FILL, edgecolor=_EDGE, linewidth=0.8)
            if row[5] >= 0:
                shade = colour(int(row[5]), exits)
                left = (told if np.isfinite(told) else end) - start
                axes.barh(rank, left, 0.8, start, color=shade, edgecolor=_EDGE, linewidth=0.8)
            dark = row[5] == exits - 1
            text = str(row[1]) if row[2] == row[1] + 1 else f"{row[1]}-{row[2] - 1}"
            ink = _EDGE if dark else _INK
            axes.text(
                (start + end) / 2, rank, text, ha="center", va="center", fontsize=7, color=ink
            )
    axes.set_yticks(range(len(traces)), [f"rank {rank}" for rank in range(len(traces))])
    axes.invert_yaxis()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=_INK, left=False)
    axes.set_xlabel("ms", fontsize=9)
    found = sorted({int(e) for _, numbers in traces for e in numbers[:, 5] if e >= 0})
    names = names or [*(f"exit {e}" for e in range(exits - 1)), "final exit"]
    marks = [Patch(color=colour(e, exits), label=f"token left: {names[e]}") for e in found]
    marks.append(Patch(color=_FILL, label="passed on, cache filled"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False,
                  fontsize=8)  # fmt: skip
    return figure
