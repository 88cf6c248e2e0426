"""What a model wrote: the text, where each token left, and how to show it."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eellm.palette import colour

# Of a background behind text that may be dark or light.
_TINT = "66"


@dataclass(frozen=True)
class Piece:
    """A token as it comes: the text that is certain by then (maybe none), where it left.

    prompt and sample tell which text it continues. text is empty without a tokenizer. done: "" or
    why the text ends, "length" or "stop".
    """

    prompt: int
    sample: int
    token: int
    text: str
    exit: int
    confidence: float
    logprob: float
    done: str = ""


@dataclass(frozen=True)
class Generation:
    """A text that a model wrote, token by token.

    exits: the exit where each token left (the final one is the last of exit_names); confidences:
    the largest probability there; logprobs: of the token, from the raw logits there. seconds
    counts from the reading of the prompt on. pieces joined are the text; a token that only begins
    a character has an empty piece. text and prompt_text are None without a tokenizer.
    """

    prompt: int
    sample: int
    prompt_tokens: npt.NDArray[np.int32]
    prompt_text: str | None
    text: str | None
    pieces: tuple[str, ...]
    tokens: npt.NDArray[np.int32]
    exits: npt.NDArray[np.int32]
    confidences: npt.NDArray[np.float32]
    logprobs: npt.NDArray[np.float32]
    finish: str
    seconds: float
    exit_names: tuple[str, ...]
    exit_depths: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, the reading of the prompt included."""
        return len(self.tokens) / self.seconds if self.seconds > 0 else math.inf

    @property
    def exit_shares(self) -> dict[str, float]:
        """Part of the tokens that left at each exit."""
        counts = np.bincount(self.exits, minlength=len(self.exit_names))
        return dict(zip(self.exit_names, (counts / max(len(self.exits), 1)).tolist(), strict=True))

    @property
    def mean_depth(self) -> float:
        """Layers behind a token where it left, on average."""
        return float(np.mean(np.asarray(self.exit_depths)[self.exits]))

    def __str__(self) -> str:
        """The new text, or the tokens where there is no tokenizer."""
        return " ".join(map(str, self.tokens)) if self.text is None else self.text

    def __repr__(self) -> str:
        """Text, length, speed and depth in one line."""
        shown = str(self)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        return (
            f"Generation({shown!r}, {len(self.tokens)} tokens, {self.finish}, "
            f"{self.tokens_per_second:.1f} tokens/s, mean depth {self.mean_depth:.1f} of "
            f"{self.exit_depths[-1]:g} layers)"
        )

    def _shown(self) -> list[str]:
        """What to print for each token."""
        if self.text is None:
            return [f"{token} " for token in self.tokens]
        return list(self.pieces)

    def _legend(self) -> list[tuple[int, str]]:
        shares = self.exit_shares
        return [(i, f"{name} {shares[name]:.0%}") for i, name in enumerate(self.exit_names)]

    def to_ansi(self, prompt: bool = True) -> str:
        """The text for a terminal: each token on the colour of its exit, a legend below.

        Control characters that the model wrote are shown as U+FFFD.
        """
        count = len(self.exit_names)
        parts = [_printable(self.prompt_text)] if prompt and self.prompt_text else []
        for text, place in zip(self._shown(), self.exits.tolist(), strict=True):
            # Colours end with the line, so that they do not fill it.
            lines = _printable(text).split("\n")
            parts.append("\n".join(_ansi(line, place, count) for line in lines))
        legend = "  ".join(_ansi(f" {text} ", i, count) for i, text in self._legend())
        return f"{''.join(parts)}\n\n{legend}  mean depth {self.mean_depth:.1f} layers"

    def _repr_html_(self) -> str:
        count = len(self.exit_names)
        prompt = f"<span style='opacity:.6'>{html.escape(self.prompt_text or '')}</span>"
        rows = zip(
            self._shown(), self.exits.tolist(), self.confidences.tolist(), self.tokens, strict=True
        )
        tokens = [
            f"<span title='{self.exit_names[place]}, confidence {confidence:.3f}, token {token}' "
            f"style='background:{colour(place, count)}{_TINT};border-radius:2px'>"
            f"{html.escape(text)}</span>"
            for text, place, confidence, token in rows
        ]
        legend = " ".join(
            f"<span style='background:{colour(i, count)}{_TINT};padding:0 .4em;margin-right:.4em;"
            f"border-radius:2px'>{html.escape(text)}</span>"
            for i, text in self._legend()
        )
        return (
            "<div style='white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;"
            f"line-height:1.5'>{prompt}{''.join(tokens)}</div>"
            f"<div style='margin-top:.6em;font-size:85%'>{legend} mean depth "
            f"{self.mean_depth:.1f} of {self.exit_depths[-1]:g} layers, "
            f"{self.tokens_per_second:.1f} tokens/s</div>"
        )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _ansi(text: str, place: int, count: int) -> str:
    if not text or place == count - 1:
        return text
    red, green, blue = bytes.fromhex(colour(place, count)[1:])
    return f"\x1b[30;48;2;{red};{green};{blue}m{text}\x1b[0m"
