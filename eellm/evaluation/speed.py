"""How fast ways to decode are beside each other, measured on the same pieces of a text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.evaluation.scoring import Tokens, WindowScores, running

if TYPE_CHECKING:
    from eellm import _core
    from eellm.evaluation.costs import StepCosts

PROMPT, PIECE = 64, 32
FULL: dict[str, Any] = {"engine": "full"}


@dataclass(frozen=True)
class Pieces:
    """Places in a text to decode at: a prompt each, and the tokens that follow it.

    index [n]: of these tokens among the scored ones.
    """

    prompts: list[Tokens]
    continuations: list[Tokens]
    index: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Tokens to decode."""
        return len(self.index)

    @classmethod
    def of(cls, scores: WindowScores, tokens: int) -> Pieces:
        """About `tokens` tokens, spread over the longest windows.

        Of all equally spread choices it is the one where early exits are as confident as on all of
        the text, nearly.
        """
        longest = max(map(len, scores.windows))
        fit = [i for i, each in enumerate(scores.windows) if len(each) == longest]
        prompt = max(1, min(PROMPT, longest // 4))
        count = min(len(fit), max(1, tokens // PIECE))
        length = min(max(2, -(-tokens // count)), longest - prompt)
        # The first token of a window is not among the scored.
        first = scores.starts[fit] + prompt - 1
        every = np.arange(count) * len(fit) // count
        shifts = range(max(1, len(fit) // count))
        places = [(first[every + i][:, None] + np.arange(length)).ravel() for i in shifts]
        wanted = scores.confidence.mean(axis=1)
        gaps = [np.abs(scores.confidence[:, at].mean(axis=1) - wanted).sum() for at in places]
        shift = int(np.argmin(gaps))
        windows = [scores.windows[fit[i]] for i in every + shift]
        return cls(
            [each[:prompt] for each in windows],
            [each[prompt : prompt + length] for each in windows],
            places[shift],
        )

    def expected(
        self, costs: StepCosts, active: Sequence[bool], places: npt.NDArray[np.int64]
    ) -> float:
        """Bytes of a step on average of those that are timed. places: exits of all scored."""
        starts = np.arange(0, self.tokens, self.tokens // len(self.prompts))
        steps = costs.steps(active, places[self.index], starts)
        # A prompt and its first token come in one step.
        timed = np.delete(steps, starts)
        return float(timed.mean()) if len(timed) else float(steps.mean())


@dataclass(frozen=True)
class Speed:
    """Tokens a second, and how much that is of full depth (the first way) in the same round."""

    tokens_per_second: float
    speedup: float


def measure(
    engine: _core.Engine,
    pieces: Pieces,
    requests: Sequence[Mapping[str, Any]],
    *,
    forced: bool,
    rounds: int = 3,
    progress: Callable[[int], object] | None = None,
) -> list[Speed]:
    """Decodes all pieces in each way, one after the other in turns, at batch 1; medians of rounds.

    requests: arguments of `Engine.add`; speed-ups are over the first. forced: the text is that of
    the pieces, else what the model writes.
    """
    for request in (requests[0], requests[0], requests[-1]):  # warm-up
        _decode(engine, pieces, 0, request, forced)
    rates = np.empty((rounds, len(requests)))
    for round in range(rounds):
        totals = np.zeros((len(requests), 2))
        for piece in range(len(pieces.prompts)):
            for i, request in enumerate(requests):
                totals[i] += _decode(engine, pieces, piece, request, forced)
                if progress:
                    progress(len(pieces.continuations[piece]))
        rates[round] = totals[:, 0] / totals[:, 1]
    ratios = np.median(rates / rates[:, :1], axis=0)
    middle = np.median(rates, axis=0)
    return [Speed(float(a), float(b)) for a, b in zip(middle, ratios, strict=True)]


def _decode(
    engine: _core.Engine, pieces: Pieces, piece: int, request: Mapping[str, Any], forced: bool
) -> tuple[int, float]:
    """(tokens, seconds) of one piece, without the prompt and the first token."""
    text = pieces.continuations[piece]
    more: dict[str, Any] = {"forced": text} if forced else {}
    with running(engine) as numbers:
        numbers.add(engine.add(pieces.prompts[piece], max_new_tokens=len(text), **request, **more))
        while not (first := len(engine.step())):
            pass
        start = time.perf_counter()
        while engine.active:
            engine.step()
        seconds = time.perf_counter() - start
        numbers.clear()
    return len(text) - first, seconds
