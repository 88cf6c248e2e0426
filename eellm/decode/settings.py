"""How to decode: the settings of `generate`, their defaults, and what is refused."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from eellm.errors import Shown, check_one_of, invalid
from eellm.settings import unknown

if TYPE_CHECKING:
    from eellm.config import ModelConfig

F = TypeVar("F", bound=Callable[..., Any])

ENGINES = ("deferred", "full", "recompute", "speculative", "pipeline")
DTYPES = ("float32", "bfloat16")

# A pass reads the weights once for up to 16 rows.
MAX_DEFERRED = 15
# Few bytes read a token on Python text of a trained model with 16 layers, drafts after layer 8:
# 1.42 times fewer than "full" on greedy text (the best of lengths 2 to 6 and thresholds 0 to 0.5 is
# 1.43), 1.14 times at temperature 0.8 (the best is 1.20).
DRAFT_LENGTH = 4
DRAFT_THRESHOLD = 0.15

_INT32 = 2**31 - 1
_INTEGERS = {
    "max_new_tokens": (1, _INT32, ""),
    "min_new_tokens": (0, _INT32, "0 is no minimum"),
    "top_k": (0, _INT32, "0 keeps all tokens"),
    "seed": (0, 2**64 - 1, ""),
    "n": (1, 2**20, ""),
}
_NUMBERS = {
    "temperature": (0.0, 1e6, "0 takes the likeliest token"),
    "min_p": (0.0, 1.0, "0 keeps all tokens"),
    "repetition_penalty": (1e-6, 1e6, "1 is no penalty"),
    "presence_penalty": (-1e6, 1e6, "0 is no penalty"),
    "frequency_penalty": (-1e6, 1e6, "0 is no penalty"),
}
_FLAGS = ("all_confidences", "full_depth_logprobs")
# What only a temperature gives an effect, with the values that have none anyway.
_SAMPLED = {"top_k": 0, "top_p": 1, "min_p": 0}
_THRESHOLD_ADVICE = "1 never leaves early, 0 leaves at the first exit"
_ADD_EXITS = "Model.from_pretrained(path, exits=[...]) adds some, to be trained"


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: object, low: int, high: int, advice: str = "") -> None:
    """Refuses what is no integer (Python's or NumPy's) from low to high."""
    if not _is_integer(value) or not low <= value <= high:  # type: ignore[operator]
        raise invalid(f"{name} is invalid", f"an integer from {low} to {high}", value, advice)


def _check_number(name: str, value: object, low: float, high: float, advice: str) -> None:
    if not _is_number(value) or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise invalid(f"{name} is invalid", f"a number from {low:g} to {high:g}", value, advice)


def _items(name: str, value: object, what: str) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise invalid(f"{name} is invalid", what, value)
    return list(value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to decode. Names are those of Transformers, OpenAI and vLLM where these have one.

    max_new_tokens, min_new_tokens: the longest text and the shortest; before the shortest is
        reached neither stop tokens nor stop strings end a text.
    engine: "deferred" leaves at early exits and runs the layers that were left out later, where
        they are needed; "full" never leaves early; "recompute" is "deferred" that starts again
        from the first layer, for comparison; "speculative" drafts at early exits and verifies with
        all layers: the text of "full", faster; "pipeline" is for a model spread over ranks: a
        token that leaves starts the next one at once, while later ranks run its other layers.
    threshold: the confidence (largest probability) from which on a token leaves at an early exit:
        one number for all exits or one for each. 1, the default, never leaves early. With
        "speculative" it makes drafts, by default from 0.15 on at the exit nearest to half depth.
    active_exits: indices of the early exits that may be left at; None: all. The others cost
        nothing.
    max_deferred: tokens that may wait at early exits before all are run to the end (15); with
        "speculative" drafts in a row (4).
    temperature, top_k, top_p, min_p: 0 takes the likeliest token, above it tokens are drawn: from
        the top_k likeliest (0: all), from the fewest whose probabilities reach top_p (1: all),
        from those at least min_p times as likely as the likeliest (0: all).
    repetition_penalty: divides positive logits of tokens in the prompt or the text, and multiplies
        negative ones; 1: none. presence_penalty, frequency_penalty: subtracted from the logit of
        each token in the text once, and for each time. logit_bias: {token: what is added}.
    seed, n: texts with another seed differ; n texts for each prompt, each drawn on its own.
    stop: a text or a list of texts that end the text before them; they are not part of it.
    stop_token_ids: tokens that end a text and belong to it; None: the model's end tokens.
    add_bos: put the start token before a text; None: where the tokenizer is SentencePiece's, or
        the text is empty.
    all_confidences: run every early exit that a token passes, also those that it can't leave at.
    full_depth_logprobs: give the final exit's log-probability of each token.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    engine: str = "deferred"
    threshold: float | Sequence[float] | None = None
    active_exits: Sequence[int] | None = None
    max_deferred: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int = 0
    n: int = 1
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    add_bos: bool | None = None
    all_confidences: bool = False
    full_depth_logprobs: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from keywords; a TypeError for an unknown one names the nearest."""
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                raise TypeError(str(unknown("setting", name, known)))
        return cls(**values)

    def __post_init__(self) -> None:
        """Checks all that needs no model."""
        check_one_of("engine", self.engine, ENGINES)
        for name, (low, high, advice) in _INTEGERS.items():
            check_count(name, getattr(self, name), low, high, advice)
        for name, (least, most, advice) in _NUMBERS.items():
            _check_number(name, getattr(self, name), least, most, advice)
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            expected = "a number above 0 and at most 1"
            raise invalid("top_p is invalid", expected, self.top_p, "1 keeps all tokens")
        if self.max_deferred is not None:
            low = 1 if self.engine == "speculative" else 0
            check_count("max_deferred", self.max_deferred, low, 1024)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise invalid(f"{name} is invalid", "true or false", getattr(self, name))
        if self.add_bos is not None and not isinstance(self.add_bos, bool):
            raise invalid("add_bos is invalid", "true, false or None", self.add_bos)
        self._check_lists()
        self._check_together()

    def _check_lists(self) -> None:
        for each in self.stops:
            if not isinstance(each, str):
                raise invalid("stop is invalid", "a text or a list of texts", each)
            if not each:
                advice = "leave it out, or end texts with stop_token_ids"
                raise invalid("stop has an empty text", "one character at least", each, advice)
        if self.stop_token_ids is not None:
            for token in _items("stop_token_ids", self.stop_token_ids, "a list of tokens"):
                check_count("stop_token_ids", token, 0, _INT32)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                expected, advice = "a mapping from tokens to numbers", "e.g. {198: -100}"
                raise invalid("logit_bias is invalid", expected, self.logit_bias, advice)
            for token, bias in self.logit_bias.items():
                check_count("a token of logit_bias", token, 0, _INT32)
                _check_number(f"logit_bias of token {token}", bias, -1e6, 1e6, "-100 bans a token")
        if self.active_exits is not None:
            chosen = _items("active_exits", self.active_exits, "a list of indices of early exits")
            for index in chosen:
                check_count("active_exits", index, 0, _INT32)
                if chosen.count(index) > 1:
                    raise invalid("active_exits repeats an exit", "each one once", index)
        for value in self._given_thresholds():
            _check_number("threshold", value, 0, 1, _THRESHOLD_ADVICE)

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            expected = f"at most max_new_tokens, {self.max_new_tokens}"
            raise invalid("min_new_tokens is too large", expected, self.min_new_tokens)
        for name, value in _SAMPLED.items():
            if self.temperature == 0 and getattr(self, name) != value:
                raise invalid(
                    f"{name} has no effect with temperature 0, which takes the likeliest token",
                    f"{value}",
                    getattr(self, name),
                    "set temperature, e.g. 0.8, or leave it out",
                )
        if self.engine == "full":
            if any(float(value) < 1 for value in self._given_thresholds()):
                advice = 'leave threshold out, or choose engine "deferred"'
                what = 'threshold has no effect with engine "full"'
                raise invalid(what, "1", self.threshold, advice)
            if self.active_exits is not None:
                advice = 'leave active_exits out, or choose engine "deferred"'
                what = 'active_exits has no effect with engine "full"'
                raise invalid(what, "None", self.active_exits, advice)
        elif self.active_exits is not None and self.threshold is None:
            if self.engine != "speculative":
                what, advice = "active_exits has no effect without threshold", "set threshold"
                raise invalid(what, "a threshold", Shown("none"), f"{advice}, e.g. 0.8")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(_items("stop", self.stop, "a text or a list of texts"))

    def _given_thresholds(self) -> list[Any]:
        if self.threshold is None:
            return []
        values: Any = self.threshold
        return list(values) if hasattr(values, "__iter__") else [values]

    def thresholds(self, config: ModelConfig) -> list[float]:
        """One threshold for each early exit of a model; 1 for those that are not active."""
        count = len(config.exits)
        if self.engine in ("recompute", "speculative") and not count:
            raise invalid(
                f'engine "{self.engine}" cannot serve this model',
                "a model with early exits",
                Shown("a model without"),
                f'use engine "full"; {_ADD_EXITS}',
            )
        given = [float(value) for value in self._given_thresholds()]
        single = self.threshold is not None and not hasattr(self.threshold, "__iter__")
        active = self._active(config)
        if self.threshold is None:
            given = self._default_thresholds(config)
        elif single and count:
            given *= count
        elif not count and any(value < 1 for value in given):
            got = Shown("a model without")
            raise invalid("threshold has no use", "a model with early exits", got, _ADD_EXITS)
        elif not single and len(given) != count:
            expected = f"one number, or one for each of the model's {count} early exits"
            raise invalid("threshold has the wrong length", expected, len(given))
        else:
            given = given[:count]
        found = [value if i in active else 1.0 for i, value in enumerate(given)]
        if self.engine == "speculative" and all(value >= 1 for value in found):
            raise invalid(
                "no exit may draft",
                "a threshold below 1 at one active exit at least",
                Shown(", ".join(f"{value:g}" for value in found)),
                'lower threshold, name exits in active_exits, or use engine "full"',
            )
        return found

    def _default_thresholds(self, config: ModelConfig) -> list[float]:
        exits = config.exits
        if self.engine != "speculative":
            return [1.0] * len(exits)
        if self.active_exits is not None:
            return [DRAFT_THRESHOLD] * len(exits)
        half = config.num_hidden_layers  # depth counts half layers
        drafts = min(range(len(exits)), key=lambda i: abs(exits[i].depth - half))
        return [DRAFT_THRESHOLD if i == drafts else 1.0 for i in range(len(exits))]

    def _active(self, config: ModelConfig) -> set[int]:
        count = len(config.exits)
        if self.active_exits is None:
            return set(range(count))
        for index in self.active_exits:
            if index >= count:
                known = (f"{i} {e.position} layer {e.layer}" for i, e in enumerate(config.exits))
                raise invalid(
                    f"active_exits names exit {index}, which the model has not",
                    f"some of {', '.join(known)}" if count else "none, as it has no early exits",
                    index,
                    "name early exits by their index" if count else _ADD_EXITS,
                )
        return set(map(int, self.active_exits))

    def _token(self, name: str, token: int, vocab: int) -> int:
        if token >= vocab:
            advice = "use the numbers of the model's own tokenizer"
            raise invalid(f"{name} is invalid", f"tokens from 0 to {vocab - 1}", token, advice)
        return int(token)

    def options(self, config: ModelConfig) -> dict[str, Any]:
        """The arguments of `_core.Engine.add`, but for tokens and sample."""
        vocab = config.vocab_size
        if self.stop_token_ids is None:
            stop = [token for token in config.eos_token_ids if token < vocab]
        else:
            stop = [self._token("stop_token_ids", each, vocab) for each in self.stop_token_ids]
        bias = {
            self._token("a token of logit_bias", token, vocab): float(value)
            for token, value in (self.logit_bias or {}).items()
        }
        speculative = self.engine == "speculative"
        held = DRAFT_LENGTH if speculative else MAX_DEFERRED
        early = self.engine in ("deferred", "recompute", "pipeline")
        return {
            "max_new_tokens": int(self.max_new_tokens),
            "min_new_tokens": int(self.min_new_tokens),
            "engine": self.engine,
            "thresholds": self.thresholds(config),
            "all_confidences": self.all_confidences,
            "max_deferred": held if self.max_deferred is None else int(self.max_deferred),
            # Tokens of the other engines have it anyway.
            "full_depth": self.full_depth_logprobs and early,
            "logit_bias": bias,
            "repetition_penalty": float(self.repetition_penalty),
            "presence_penalty": float(self.presence_penalty),
            "frequency_penalty": float(self.frequency_penalty),
            "temperature": float(self.temperature),
            "top_k": int(self.top_k),
            "top_p": float(self.top_p),
            "min_p": float(self.min_p),
            "seed": int(self.seed),
            "stop_tokens": stop,
        }


def takes_settings(function: F) -> F:
    """Shows the fields of Settings in the signature of a function that takes **settings."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type
        )
        for each in fields(Settings)
    ]
    function.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
    return function
