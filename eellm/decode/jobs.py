"""What an engine works on: texts in the making, and texts to be scored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from eellm.decode.generation import Generation, Piece
from eellm.decode.scores import Scores
from eellm.decode.stopping import TextStream
from eellm.errors import Shown, invalid

if TYPE_CHECKING:
    from eellm._core import Engine
    from eellm.config import ModelConfig
    from eellm.decode.prompts import Prompt, Prompts, Reader
    from eellm.decode.settings import Settings

Events = npt.NDArray[np.void]

# The fields kind and done of an event, as in csrc/infer/engine.h.
_TOKEN, _FULL_DEPTH = 0, 1
_REASONS = {1: "length", 2: "stop", 3: "stop"}


class Job(Protocol):
    """What a sequence of an engine is for."""

    ended: bool
    """The engine has given all events."""
    stopped: bool
    """No more tokens are wanted, though the engine would go on."""

    def add(self, engine: Engine) -> int:
        """Gives the work to the engine; returns the sequence number."""

    def take(self, events: Events) -> Iterator[Piece]:
        """Takes the sequence's events of a step; gives tokens whose text is certain."""


def exit_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of all exits, the final one last."""
    return (*(f"{each.position} layer {each.layer}" for each in config.exits), "final")


def exit_depths(config: ModelConfig) -> tuple[float, ...]:
    """Layers behind each exit, the final one last; an MLP branch leaves in the middle of one."""
    return (*(each.depth / 2 for each in config.exits), float(config.num_hidden_layers))


def _joined(parts: list[Events]) -> Events:
    """All events in one array; NumPy's own way spends more time on the types than a step takes."""
    return np.frombuffer(b"".join(part.tobytes() for part in parts), parts[0].dtype)


class Writing:
    """A text in the making. live: its tokens are wanted as they come."""

    def __init__(
        self,
        prompt: Prompt,
        place: tuple[int, int],
        decoder: Any,
        settings: Settings,
        options: Mapping[str, Any],
        live: bool,
    ) -> None:
        """place: the index of the prompt, and which of its texts this is."""
        self.ended = self.stopped = False
        self._prompt, self._place = prompt, place
        self._settings, self._options = settings, options
        self._text = TextStream(decoder, settings.stops, settings.min_new_tokens)
        self._has_text = decoder is not None
        # Without stop strings and listeners the text can wait until all tokens are there.
        self._live, self._watched = live, live or bool(settings.stops)
        self._events: list[Events] = []
        self._told: list[np.void] = []
        self._shown, self._closed = 0, False
        self._finish = ""
        self._began = self._seconds = 0.0

    @property
    def length(self) -> int:
        """Tokens that the prompt and the text can come to."""
        return int(self._prompt.tokens.size) + int(self._settings.max_new_tokens)

    def add(self, engine: Engine) -> int:
        """Gives the prompt to the engine."""
        self._began = time.perf_counter()
        sample = self._place[1]
        return engine.add(self._prompt.tokens, sample=sample, **self._options)

    def take(self, events: Events) -> Iterator[Piece]:
        """Takes the events of a step; gives the tokens whose text is certain by then."""
        self._events.append(events)
        if not self.stopped:
            self._seconds = time.perf_counter() - self._began
        if self._watched:
            for event in events[events["kind"] == _TOKEN]:
                if self.stopped:
                    break
                self._told.append(event)
                self._text.put(event["token"])
                self._stop_if_found()
        done = max(events["done"].tolist())
        if done:
            self.ended = True
            if not self._finish:
                self._end(_REASONS[done])
        if self._live:
            yield from self._pieces()

    def _end(self, reason: str) -> None:
        self._finish = reason
        if self._watched:
            self._text.finish()
            self._stop_if_found()

    def _stop_if_found(self) -> None:
        if self._text.stopped:
            self.stopped, self._finish = True, "stop"

    def _pieces(self) -> Iterator[Piece]:
        """The tokens that have become certain."""
        while self._shown < self._text.certain:
            event, text = self._told[self._shown], self._text.pieces[self._shown]
            self._shown += 1
            last = self._shown == len(self._text.pieces)
            yield self._piece(text, self._finish if last else "", event)
        if self._finish and not self._closed:
            yield self._piece("", self._finish)

    def _piece(self, text: str, done: str, event: np.void | None = None) -> Piece:
        self._closed = bool(done)
        prompt, sample = self._place
        if event is None:
            return Piece(prompt=prompt, sample=sample, text=text, done=done)
        return Piece(
            prompt=prompt,
            sample=sample,
            token=int(event["token"]),
            text=text,
            exit=int(event["exit"]),
            confidence=float(event["confidence"]),
            confidences=tuple(event["exits"]["confidence"].tolist()),
            logprob=float(event["logprob"]),
            done=done,
        )

    def result(self, config: ModelConfig) -> Generation:
        """The finished text."""
        events = _joined(self._events)
        tokens = events[events["kind"] == _TOKEN]
        if not self._watched:
            for token in tokens["token"].tolist():
                self._text.put(token)
            self._text.finish()
        pieces = tuple(self._text.pieces)
        tokens = tokens[: len(pieces)]
        return Generation(
            prompt=self._place[0],
            sample=self._place[1],
            prompt_tokens=self._prompt.tokens,
            prompt_text=self._prompt.text,
            text="".join(pieces) if self._has_text else None,
            pieces=pieces,
            tokens=tokens["token"].copy(),
            exits=tokens["exit"].copy(),
            confidences=tokens["confidence"].copy(),
            logprobs=tokens["logprob"].copy(),
            exit_confidences=tokens["exits"]["confidence"].copy(),
            exit_tokens=tokens["exits"]["token"].copy(),
            full_depth_logprobs=self._full_depth(tokens, events[events["kind"] == _FULL_DEPTH]),
            finish=self._finish,
            seconds=self._seconds,
            exit_names=exit_names(config),
            exit_depths=exit_depths(config),
        )

    def _full_depth(self, tokens: Events, later: Events) -> npt.NDArray[np.float32] | None:
        """The final exit's log-probability of each token: a later event has it of those that left
        early."""
        if not self._settings.full_depth_logprobs:
            return None
        found: npt.NDArray[np.float32] = tokens["logprob"].copy()
        places = later["position"] - self._prompt.tokens.size
        kept = places < found.size
        found[places[kept]] = later["logprob"][kept]
        return found


class Scoring:
    """A text to be scored."""

    def __init__(self, prompt: Prompt) -> None:
        """Takes a text of two tokens or more."""
        self.ended = self.stopped = False
        self._prompt = prompt
        self._events: list[Events] = []

    def add(self, engine: Engine) -> int:
        """Gives the text to the engine."""
        return engine.score(self._prompt.tokens)

    def take(self, events: Events) -> Iterator[Piece]:
        """Takes the events of a step."""
        self._events.append(events)
        self.ended = bool(events["done"].any())
        yield from ()

    def result(self, config: ModelConfig, decoder: Any) -> Scores:
        """The finished scores."""
        events = _joined(self._events)
        said = events[np.argsort(events["position"], kind="stable")]["exits"]
        text = TextStream(decoder)
        if decoder is not None:
            for token in self._prompt.tokens.tolist():
                text.put(token)
            text.finish()
        return Scores(
            tokens=self._prompt.tokens,
            text=self._prompt.text,
            pieces=tuple(text.pieces) if decoder is not None else None,
            logprobs=said["logprob"].T.copy(),
            confidences=said["confidence"].T.copy(),
            best=said["token"].T.copy(),
            exit_names=exit_names(config),
            exit_depths=exit_depths(config),
        )


def by_sequence(events: Events) -> Iterator[tuple[int, Events]]:
    """The events of each sequence, in order."""
    places: dict[int, list[int]] = {}
    for place, number in enumerate(events["sequence"].tolist()):
        places.setdefault(number, []).append(place)
    for number, at in places.items():
        together = at[-1] - at[0] == len(at) - 1
        yield number, events[at[0] : at[-1] + 1] if together else events[at]


def prepare(
    config: ModelConfig, reader: Reader, prompts: Prompts, settings: Settings, live: bool
) -> tuple[bool, list[Writing]]:
    """Whether there is one prompt, and a text for every sample of every prompt."""
    options = settings.options(config)
    single, each_prompt, tokenizer = reader.read(
        prompts, settings.add_bos, new_tokens=int(settings.max_new_tokens)
    )
    if settings.stops and tokenizer is None:
        advice = "pass tokenizer=..., or end texts with stop_token_ids"
        raise invalid("stop needs a tokenizer", "a model with one", Shown("none"), advice)
    texts = []
    for i, prompt in enumerate(each_prompt):
        for sample in range(settings.n):
            decoder = tokenizer.stream(prompt.tokens) if tokenizer else None
            texts.append(Writing(prompt, (i, sample), decoder, settings, options, live))
    return single, texts
