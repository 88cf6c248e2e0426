"""The text of tokens as they come, ended by stop strings of which no part is ever shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Gives each token its part of the text, and says which parts are certain.

    A stop string ends the text before it. Of several, the one that is complete first counts, and of
    those that are complete at the same character the longest; so the end depends on the text alone,
    not on how it is cut into tokens. A token stays if its text begins before the stop string. The
    first `minimum` tokens stay in any case: only what follows their text is searched.

    decoder: of a tokenizer (StreamDecoder), or None: tokens then have no text.
    """

    def __init__(self, decoder: Any, stops: Sequence[str] = (), minimum: int = 0) -> None:
        """Begins a text."""
        self.pieces: list[str] = []
        self.certain = 0
        self.stopped = False
        self._decoder, self._stops, self._minimum = decoder, tuple(stops), minimum
        # Where each token's text begins, and how long all of it is.
        self._starts: list[int] = []
        self._length = 0
        # The end of the text that may turn into a stop string.
        self._held = ""

    def put(self, token: int) -> None:
        """Takes the next token.

        `pieces` grows by its text, the first `certain` of them stay as they are. `stopped` tells
        that a stop string came; `pieces` and `certain` then end before it, and nothing may follow.
        """
        self._starts.append(self._length)
        self.pieces.append("")
        self._add(self._decoder.put(token) if self._decoder else "")

    def finish(self) -> None:
        """Nothing more comes: all that is left is certain, after a last look for stop strings."""
        if self.pieces and self._decoder:
            self._add(self._decoder.finish())
        self.certain = len(self.pieces)

    def _add(self, text: str) -> None:
        """Adds to the text of the last token."""
        self.pieces[-1] += text
        self._length += len(text)
        if not self._stops:
            self.certain = len(self.pieces)
            return
        if len(self.pieces) <= self._minimum:
            self.certain = len(self.pieces)
            return
        self._held += text
        match = self._find()
        if match is not None:
            self._cut(self._length - len(self._held) + match)
            return
        self._held = self._held[len(self._held) - self._open() :]
        shown = self._length - len(self._held)
        while self.certain < len(self.pieces):
            start = self._starts[self.certain]
            # An empty part at the end of what is shown goes with the text that follows.
            if self.certain >= self._minimum and (
                start >= shown or start + len(self.pieces[self.certain]) > shown
            ):
                break
            self.certain += 1

    def _find(self) -> int | None:
        """Where the stop string begins that is complete first."""
        found = [(self._held.find(stop), len(stop)) for stop in self._stops]
        ends = [(at + length, at) for at, length in found if at >= 0]
        return min(ends)[1] if ends else None

    def _open(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _cut(self, end: int) -> None:
        """Ends the text, and takes away the tokens whose text does not begin before the end."""
        kept = [i for i, start in enumerate(self._starts) if start < end or i < self._minimum]
        self.pieces = [self.pieces[i][: max(0, end - self._starts[i])] for i in kept]
        self.stopped = True
        self.certain = len(self.pieces)
