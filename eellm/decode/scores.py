"""What a model thinks of a given text, at every exit."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eellm.palette import css

Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """A text's tokens as every exit sees them, each after all tokens before it.

    tokens: [n]. Of the exits E, the final one last, and of all tokens but the first, [E, n - 1]:
    logprobs of the token that stands there, confidences (the largest probability) and best, the
    likeliest token. pieces: the text of each token; text and pieces are None without a tokenizer.
    """

    tokens: npt.NDArray[np.int32]
    text: str | None
    pieces: tuple[str, ...] | None
    logprobs: Floats
    confidences: Floats
    best: npt.NDArray[np.int32]
    exit_names: tuple[str, ...]
    exit_depths: tuple[float, ...]

    @property
    def losses(self) -> Sums:
        """Mean cross-entropy [E] in nats."""
        return -self.logprobs.mean(axis=1, dtype=np.float64)

    @property
    def perplexities(self) -> Sums:
        """Perplexity [E]."""
        return np.exp(self.losses)

    @property
    def perplexity(self) -> float:
        """Perplexity at full depth."""
        return float(self.perplexities[-1])

    @property
    def agreement(self) -> Sums:
        """Part of the tokens [E] whose likeliest token is that of the final exit."""
        return (self.best == self.best[-1]).mean(axis=1)

    def _rows(self) -> list[tuple[str, ...]]:
        columns = zip(
            self.exit_names, self.losses, self.perplexities, self.agreement,
            self.confidences.mean(axis=1), strict=True,
        )  # fmt: skip
        return [
            (name, f"{loss:.3f}", f"{perplexity:.2f}", f"{agreement:.1%}", f"{confidence:.3f}")
            for name, loss, perplexity, agreement, confidence in columns
        ]

    def __repr__(self) -> str:
        """Length and the loss of every exit in one line."""
        losses = ", ".join(f"{row[0]} {row[1]}" for row in self._rows())
        return f"Scores({len(self.tokens)} tokens, loss: {losses})"

    def _repr_html_(self) -> str:
        head = ("exit", "loss", "perplexity", "agreement", "confidence")
        count = len(self.exit_names)
        lines = ["".join(f"<th>{each}</th>" for each in head)]
        for i, (name, *values) in enumerate(self._rows()):
            first = f"<td style='{css(i, count)}'>{html.escape(name)}</td>"
            lines.append(first + "".join(f"<td>{value}</td>" for value in values))
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table>{rows}</table><div>{len(self.tokens)} tokens</div>"
