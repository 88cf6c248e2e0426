"""An evaluation as tables, for a terminal and for a notebook."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eellm.evaluation import Drafting, Evaluation, Row


@dataclass
class Table:
    """A table of texts. marked: rows that stand out; notes: lines below it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    marked: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tables(found: Evaluation) -> list[Table]:
    """All tables of an evaluation."""
    made = [_exits(found)]
    if found.curve:
        made += [_curve(found), _search(found), _drafts(found)]
    return made


def to_text(found: Evaluation) -> str:
    """Tables in columns."""
    return "\n\n".join(_text(table) for table in tables(found))


def to_html(found: Evaluation) -> str:
    """Tables and the picture."""
    parts = [_html(table) for table in tables(found)]
    if found.curve:
        data = io.BytesIO()
        found.plot().savefig(data, format="png")
        image = base64.b64encode(data.getvalue()).decode()
        parts.insert(
            1, f"<img alt='the curve' style='max-width:100%' src='data:image/png;base64,{image}'>"
        )
    return f"<div style='font-size:90%'>{''.join(parts)}</div>"


def to_page(found: Evaluation, title: str) -> str:
    """A page of its own."""
    style = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n{found._repr_html_()}\n</body></html>\n"
    )


def _exits(found: Evaluation) -> Table:
    rows = [
        [name, f"{depth:g}", f"{loss:.4f}", f"{perplexity:.2f}", f"{100 * same:.2f} %"]
        for name, depth, loss, perplexity, same in zip(
            found.exit_names,
            found.exit_depths,
            found.losses,
            found.perplexity,
            found.agreement,
            strict=True,
        )
    ]
    title = f"{found.tokens:,} tokens in windows of {found.window}, {found.dtype} weights"
    return Table(title, ["exit", "layers", "loss (nats)", "perplexity", "agreement"], rows)


def _numbers(found: Evaluation, row: Row, *, agreement: str) -> list[str]:
    shares = [f"{100 * share:.1f}" for share in row.shares]
    cells = [agreement, f"{row.mean_depth:.2f}", *shares, _times(row.predicted)]
    if found.full_tokens_per_second is not None:
        cells += [_times(row.expected), _times(row.speedup), f"{row.tokens_per_second:.1f}"]
    return cells


def _number_heads(found: Evaluation) -> list[str]:
    """Of the columns of `_numbers` behind the first."""
    shares = [f"% {name}" for name in found.exit_names]
    heads = ["mean layers", *shares, "predicted"]
    timed = found.full_tokens_per_second is not None
    return heads + (["predicted there", "measured", "tokens/s"] if timed else [])


def _curve(found: Evaluation) -> Table:
    rows = [
        [
            f"{row.thresholds[0]:.2f}",
            *_numbers(found, row, agreement=f"{100 * row.agreement:.2f} %"),
        ]
        for row in found.curve
    ]
    marked = [i for i, row in enumerate(found.curve) if row is found.marked]
    notes = [f"* the most speed at {100 * found.wanted:g} % agreement"]
    if found.full_tokens_per_second is not None:
        speed = f"{found.full_tokens_per_second:.1f} tokens/s"
        notes.append(f"full depth: {speed}; there: on the tokens that were timed")
    head = ["threshold", "agreement", *_number_heads(found)]
    return Table("The same threshold for all exits", head, rows, marked, notes)


def _search(found: Evaluation) -> Table:
    rows = []
    for row in found.candidates:
        limits = "  ".join("off" if each >= 1 else f"{each:.3f}" for each in row.thresholds)
        same = f"{100 * row.agreement:.2f} %"
        first = f"{100 * (row.found_agreement or 0):.2f} %"
        rows.append([limits, first, *_numbers(found, row, agreement=same)])
    marked = [i for i, row in enumerate(found.candidates) if row is found.best]
    head = ["thresholds", "where found", "elsewhere", *_number_heads(found)]
    notes = [
        "* the most speed by prediction, on the half of the windows where thresholds were found;",
        "  all else is from the other half",
    ]
    if not rows:
        notes = ["the text is too short for a search; give two windows at least"]
    title = f"Thresholds for {100 * found.wanted:g} % agreement, an exit that is off is not run"
    return Table(title, head, rows, marked, notes)


def _drafts(found: Evaluation) -> Table:
    title, best = "Speculative decoding, the text is that of full depth", found.best_drafting
    if best is None:
        return Table(title, [], [], notes=["no exit can draft: all stand at the end"])
    head = ["exit", "threshold", "drafts at most", "accepted", "tokens a pass", "predicted"]
    if best.speedup is not None:
        head += ["measured", "tokens/s"]
    rows = [_drafting(found, each) for each in found.drafts]
    marked = [i for i, each in enumerate(found.drafts) if each is best]
    return Table(title, head, rows, marked, ["* the most speed by prediction"])


def _drafting(found: Evaluation, each: Drafting) -> list[str]:
    plan = each.plan
    cells = [
        found.exit_names[plan.exit],
        f"{plan.threshold:.2f}",
        str(plan.max_drafts),
        f"{100 * plan.accepted:.1f} %",
        f"{plan.tokens_per_pass:.2f}",
        _times(plan.predicted),
    ]
    if each.speedup is not None:
        cells += [_times(each.speedup), f"{each.tokens_per_second:.1f}"]
    return cells


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _text(table: Table) -> str:
    lines = [table.title]
    if table.rows:
        rows: list[Sequence[str]] = [table.head, *table.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for i, row in enumerate(rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append(("* " if i - 1 in table.marked else "  ") + "  ".join(cells))
    return "\n".join(lines + [f"  {note}" for note in table.notes])


def _html(table: Table) -> str:
    cell = "padding:.1em .7em;text-align:right"
    head = "".join(f"<th style='{cell}'>{html.escape(each)}</th>" for each in table.head)
    body = ""
    for i, row in enumerate(table.rows):
        style = "font-weight:bold;background:#56B4E933" if i in table.marked else ""
        cells = "".join(f"<td style='{cell}'>{html.escape(each)}</td>" for each in row)
        body += f"<tr style='{style}'>{cells}</tr>"
    notes = "".join(f"<div style='opacity:.7'>{html.escape(note)}</div>" for note in table.notes)
    inner = f"<table style='border-collapse:collapse'><tr>{head}</tr>{body}</table>" * bool(body)
    return f"<h4 style='margin:1em 0 .3em'>{html.escape(table.title)}</h4>{inner}{notes}"
