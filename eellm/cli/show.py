"""How `eellm generate` shows texts: as they come, as JSON, as a page."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eellm.palette import ansi, printable

if TYPE_CHECKING:
    from eellm.decode.generation import Generation, Piece


class Printer:
    """Prints texts as their tokens come: one after the other, in the order of the prompts."""

    def __init__(self, prompts: Sequence[str], n: int, color: str, exit_count: int) -> None:
        """n: texts for each prompt; color: auto, always or never."""
        self._prompts, self._n, self._count = prompts, n, exit_count
        terminal = sys.stdout.isatty()
        self._coloured = color == "always"
        if color == "auto":
            self._coloured = terminal and not os.environ.get("NO_COLOR")
        # What a model writes must not move a terminal's cursor.
        self._clean = terminal or self._coloured
        # The text that is being printed, and pieces of those that come after it.
        self._current, self._begun = 0, False
        self._kept: dict[int, list[Piece]] = {}

    def __call__(self, piece: Piece) -> None:
        """Prints a piece when it is its turn."""
        place = piece.prompt * self._n + piece.sample
        self._kept.setdefault(place, []).append(piece)
        while self._print(self._kept.pop(self._current, [])):
            self._current += 1
            self._begun = False
        sys.stdout.flush()

    def _print(self, pieces: Sequence[Piece]) -> bool:
        """Prints pieces of the current text; whether it has ended."""
        for piece in pieces:
            if not self._begun:
                self._begun = True
                between = "\n" if self._current else ""
                sys.stdout.write(between + self._cleaned(self._prompts[piece.prompt]))
            if piece.text:
                sys.stdout.write(self._colour(self._cleaned(piece.text), piece.exit))
        if pieces and pieces[-1].done:
            sys.stdout.write("\n")
        return bool(pieces) and bool(pieces[-1].done)

    def _cleaned(self, text: str) -> str:
        return printable(text) if self._clean else text

    def _colour(self, text: str, place: int) -> str:
        return ansi(text, place, self._count) if self._coloured else text

    def legend(self, results: Sequence[Generation]) -> None:
        """Prints what the colours mean, and the shares of the exits over all texts."""
        if not self._coloured:
            return
        names = results[0].exit_names
        counts = np.bincount(np.concatenate([r.exits for r in results]), minlength=len(names))
        total = max(1, int(counts.sum()))
        parts = [
            self._colour(f" {name} {count / total:.0%} ", i)
            for i, (name, count) in enumerate(zip(names, counts.tolist(), strict=True))
        ]
        print("\n" + "  ".join(parts))


def tell(results: Sequence[Generation]) -> None:
    """Shares of exits and speed, on standard error."""
    sys.stdout.flush()
    for result in results:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result.exit_shares.items())
        print(
            f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s, "
            f"mean depth {result.mean_depth:.1f} of {result.exit_depths[-1]:g} layers: {shares}",
            file=sys.stderr,
        )


def as_json(result: Generation) -> dict[str, Any]:
    """A text and where its tokens left."""
    full = result.full_depth_logprobs
    return {
        "prompt": result.prompt_text,
        "text": result.text,
        "finish": result.finish,
        "tokens": result.tokens.tolist(),
        "exits": result.exits.tolist(),
        "confidences": _numbers(result.confidences),
        "logprobs": _numbers(result.logprobs),
        "full_depth_logprobs": None if full is None else _numbers(full),
        "exit_confidences": [_numbers(row) for row in result.exit_confidences],
        "exit_names": list(result.exit_names),
        "exit_shares": result.exit_shares,
        "mean_depth": result.mean_depth,
        "tokens_per_second": result.tokens_per_second,
    }


def _numbers(values: Any) -> list[float | None]:
    """Six digits; null for exits that were not run."""
    return [round(value, 6) if np.isfinite(value) else None for value in values.tolist()]


def page(results: Sequence[Generation]) -> str:
    """A page that shows all texts."""
    title = html.escape("Where each token left the model")
    parts = "\n<hr>\n".join(result._repr_html_() for result in results)
    style = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
        f"<body><h1>{title}</h1>\n{parts}\n</body></html>\n"
    )
