"""What a model wrote: the text, where each token left, and how to show it."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eellm.palette import ansi, css, printable


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A token as it comes, with its text and where it left.

    prompt and sample tell which text it continues. text is empty without a tokenizer, and where a
    token only begins a character. confidences: what every exit said, NaN where it was not run.
    done: "" or why the text ends, "length" or "stop". A token whose text could belong to a stop
    string comes when that is decided; where a stop string ends a text whose tokens have all come,
    a last piece without a token says so: token and exit -1, no text.
    """

    prompt: int
    sample: int
    token: int = -1
    text: str = ""
    exit: int = -1
    confidence: float = math.nan
    confidences: tuple[float, ...] = ()
    logprob: float = math.nan
    done: str = ""


@dataclass(frozen=True, eq=False)
class Generation:
    """A text that a model wrote, token by token.

    exits: the exit where each token left (the final one is the last of exit_names), or that
    drafted it; confidences: the largest probability there; logprobs: of the token, from the raw
    logits there (with the engine "speculative" from the final exit's). exit_confidences and
    exit_tokens [n, E]: what every exit said, its likeliest token; NaN and -1 where it was not run.
    full_depth_logprobs: of the token at the final exit, None unless asked for. finish: "length" or
    "stop". seconds counts from the reading of the prompt to the last token. pieces joined are the
    text; a token that only begins a character has an empty piece. text and prompt_text are None
    without a tokenizer.
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
    exit_confidences: npt.NDArray[np.float32]
    exit_tokens: npt.NDArray[np.int32]
    full_depth_logprobs: npt.NDArray[np.float32] | None
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
        """Layers behind a token where it left, on average; 0 without tokens."""
        depths = np.asarray(self.exit_depths)[self.exits]
        return float(depths.sum()) / max(len(depths), 1)

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

    def shown(self) -> list[str]:
        """The text of each token, or its number where there is no tokenizer."""
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
        parts = [printable(self.prompt_text)] if prompt and self.prompt_text else []
        for text, place in zip(self.shown(), self.exits.tolist(), strict=True):
            parts.append(ansi(printable(text), place, count))
        legend = "  ".join(ansi(f" {text} ", i, count) for i, text in self._legend())
        return f"{''.join(parts)}\n\n{legend}  mean depth {self.mean_depth:.1f} layers"

    def _titles(self) -> list[str]:
        """What is told of each token when the mouse is over it."""
        titles = []
        columns = zip(
            self.tokens.tolist(), self.exits.tolist(), self.logprobs.tolist(),
            self.exit_confidences.tolist(), strict=True,
        )  # fmt: skip
        for token, place, logprob, confidences in columns:
            pairs = zip(self.exit_names, confidences, strict=True)
            passed = ", ".join(f"{name} {value:.3f}" for name, value in pairs if value == value)
            titles.append(
                f"left at {self.exit_names[place]}; confidence: {passed or 'none'}; "
                f"token {token}, log-probability {logprob:.3f}"
            )
        return titles

    def _repr_html_(self) -> str:
        count = len(self.exit_names)
        prompt = f"<span style='opacity:.6'>{html.escape(self.prompt_text or '')}</span>"
        rows = zip(self.shown(), self.exits.tolist(), self._titles(), strict=True)
        tokens = [
            f"<span title='{html.escape(title)}' style='{css(place, count)};border-radius:2px'>"
            f"{html.escape(text)}</span>"
            for text, place, title in rows
        ]
        legend = " ".join(
            f"<span style='{css(i, count)};padding:0 .4em;margin-right:.4em;border-radius:2px'>"
            f"{html.escape(text)}</span>"
            for i, text in self._legend()
        )
        return (
            "<div style='white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;"
            f"line-height:1.5'>{prompt}{''.join(tokens)}</div>"
            f"<div style='margin-top:.6em;font-size:85%'>{legend} mean depth "
            f"{self.mean_depth:.1f} of {self.exit_depths[-1]:g} layers, "
            f"{self.tokens_per_second:.1f} tokens/s</div>"
        )
