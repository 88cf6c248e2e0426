"""What every exit says about a given text: teacher forcing, in windows, through the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, invalid

if TYPE_CHECKING:
    from eellm import _core

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class WindowScores:
    """Every token of the windows but the first of each, in the order of the text.

    confidence, logprob [E, n] (of the token that follows in the text), correct [E, n]: whether the
    exit's most likely token is the final exit's. windows: the tokens of each; starts: the index of
    the first scored token of each.
    """

    confidence: npt.NDArray[np.float32]
    logprob: npt.NDArray[np.float32]
    correct: npt.NDArray[np.bool_]
    windows: list[Tokens]
    starts: npt.NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return self.confidence.shape[1]

    def part(self, chosen: Sequence[int]) -> WindowScores:
        """Some of the windows."""
        ends = np.append(self.starts, self.tokens)
        pieces = [np.arange(ends[i], ends[i + 1]) for i in chosen]
        index = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        return WindowScores(
            self.confidence[:, index],
            self.logprob[:, index],
            self.correct[:, index],
            [self.windows[i] for i in chosen],
            np.cumsum(lengths) - lengths,
        )

    def halves(self) -> tuple[WindowScores, WindowScores]:
        """Every second window, and the others."""
        count = len(self.windows)
        return self.part(range(0, count, 2)), self.part(range(1, count, 2))


def cut(documents: Sequence[Tokens], window: int, limit: int | None = None) -> list[Tokens]:
    """Windows of at most `window` tokens, in which every token but the first of each document is
    predicted once; no more than `limit` of them."""
    windows: list[Tokens] = []
    left = sum(map(len, documents)) if limit is None else limit
    for tokens in documents:
        for start in range(0, len(tokens) - 1, window - 1):
            if left <= 0:
                return windows
            piece = tokens[start : start + min(window, left + 1)]
            windows.append(np.ascontiguousarray(piece, np.int32))
            left -= len(piece) - 1
    return windows


@contextmanager
def running(engine: _core.Engine) -> Iterator[set[int]]:
    """Sequence numbers that are ended when the block is left, however that happens."""
    if engine.active:
        from eellm._core import Error

        raise Error("the generator is in use; finish or close its other stream first")
    numbers: set[int] = set()
    try:
        yield numbers
    finally:
        for number in numbers:
            with suppress(ValueError):
                engine.remove(number)


def score(
    engine: _core.Engine,
    windows: list[Tokens],
    *,
    together: int = 4,
    progress: Callable[[int], object] | None = None,
) -> WindowScores:
    """WindowScores windows, up to `together` of them at a time as there is room.

    progress: called with the number of tokens that are done.
    """
    if not windows:
        raise invalid("nothing to score", "two tokens or more", Shown("fewer"), "give more text")
    from eellm._core import BusyError

    lengths = np.array([len(each) - 1 for each in windows], np.int64)
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    waiting = deque(enumerate(windows))
    arrays: dict[str, Any] = {}
    with running(engine) as numbers:
        # By sequence number: where the token at position 0 would stand.
        base: dict[int, int] = {}
        while waiting or numbers:
            while waiting and len(numbers) < together:
                index, tokens = waiting[0]
                try:
                    number = engine.score(tokens)
                except BusyError:
                    if numbers:
                        break
                    raise
                waiting.popleft()
                numbers.add(number)
                base[number] = int(starts[index]) - 1
            events = engine.step()
            if not len(events):
                continue
            if not arrays:
                arrays = _arrays(events["exits"].shape[1], total)
            _take(events, base, arrays)
            numbers.difference_update(events["sequence"][events["done"] != 0].tolist())
            if progress:
                progress(len(events))
    return WindowScores(**arrays, windows=windows, starts=starts)


def _arrays(exits: int, total: int) -> dict[str, Any]:
    shape = (exits, total)
    return {
        "confidence": np.empty(shape, np.float32),
        "logprob": np.empty(shape, np.float32),
        "correct": np.empty(shape, np.bool_),
    }


def _take(events: npt.NDArray[np.void], base: dict[int, int], arrays: dict[str, Any]) -> None:
    """Puts the events of a step in their places."""
    numbers, which = np.unique(events["sequence"], return_inverse=True)
    at = np.array([base[number] for number in numbers.tolist()])[which] + events["position"]
    exits = events["exits"]
    arrays["confidence"][:, at] = exits["confidence"].T
    arrays["logprob"][:, at] = exits["logprob"].T
    arrays["correct"][:, at] = (exits["token"] == exits["token"][:, -1:]).T
