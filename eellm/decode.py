"""Text from a model: one prompt or many at once, with early exits."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, invalid
from eellm.generation import Generation, Piece

if TYPE_CHECKING:
    from eellm.config import ModelConfig
    from eellm.data.tokenizers import Tokenizer
    from eellm.model import Model

Tokens = Sequence[int] | npt.NDArray[np.integer[Any]]
Prompts = str | Tokens | Sequence[str] | Sequence[Tokens]

ENGINES = ("deferred", "full")
DTYPES = ("float32", "bfloat16")
_REASONS = {1: "length", 2: "stop"}


def _choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise invalid(f"{name} is invalid", f"one of {', '.join(choices)}", value)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid(f"{name} is invalid", f"an integer from {low} to {high}", value)


def _number(name: str, value: object, low: float, high: float, advice: str) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise invalid(f"{name} is invalid", f"a number from {low:g} to {high:g}", value, advice)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to decode; `generate` says what each field means."""

    threshold: float | Sequence[float] | None = None
    max_new_tokens: int = 128
    engine: str = "deferred"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1
    max_deferred: int = 15
    stop_tokens: Sequence[int] | None = None
    add_bos: bool | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        _choice("engine", self.engine, ENGINES)
        _integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _integer("seed", self.seed, 0, 2**64 - 1)
        _integer("samples", self.samples, 1, 2**20)
        _integer("max_deferred", self.max_deferred, 0, 1024)
        _number("temperature", self.temperature, 0, 1e6, "0 takes the likeliest token")
        _number("top_p", self.top_p, math.ulp(0.0), 1, "1 keeps all tokens")

    def thresholds(self, config: ModelConfig) -> list[float]:
        """One threshold for each early exit of a model."""
        count = len(config.exits)
        value = self.threshold
        if value is None:
            return [1.0] * count
        single = isinstance(value, int | float | np.number)
        values: list[Any] = [value] if single else list(value)  # type: ignore[arg-type]
        advice = "1 never leaves early, 0 leaves at the first exit"
        for each in values:
            _number("threshold", each, 0, 1, advice)
        if not single and len(values) != count:
            raise invalid(
                "threshold has the wrong length",
                f"one number, or one for each of the model's {count} early exits",
                len(values),
            )
        if not count and any(each < 1 for each in values):
            raise invalid(
                "threshold has no use",
                "a model with early exits",
                Shown("a model without"),
                "add some: Model.from_pretrained(path, exits=[...]), and train them",
            )
        return [float(each) for each in (values * count if single else values)]

    def options(self, config: ModelConfig) -> dict[str, Any]:
        """The arguments of `_core.Engine.add`, but for tokens and sample."""
        stop = config.eos_token_ids if self.stop_tokens is None else self.stop_tokens
        return {
            "max_new_tokens": self.max_new_tokens,
            "engine": self.engine,
            "thresholds": self.thresholds(config),
            "max_deferred": self.max_deferred,
            "temperature": float(self.temperature),
            "top_k": self.top_k,
            "top_p": float(self.top_p),
            "seed": self.seed,
            "stop_tokens": list(stop),
        }


@dataclass
class _Text:
    """A text in the making."""

    prompt: int
    sample: int
    prompt_tokens: npt.NDArray[np.int32]
    prompt_text: str | None
    decoder: Any
    began: float = 0.0
    seconds: float = 0.0
    pieces: list[Piece] = field(default_factory=list)

    def add(self, event: Any) -> Piece:
        """Takes an event of the engine."""
        done = _REASONS.get(int(event["done"]), "")
        text = self.decoder.put(event["token"]) if self.decoder else ""
        if done and self.decoder:
            text += self.decoder.finish()
        self.seconds = time.perf_counter() - self.began
        piece = Piece(
            prompt=self.prompt,
            sample=self.sample,
            token=int(event["token"]),
            text=text,
            exit=int(event["exit"]),
            confidence=float(event["confidence"]),
            logprob=float(event["logprob"]),
            done=done,
        )
        self.pieces.append(piece)
        return piece

    def result(self, config: ModelConfig) -> Generation:
        """The finished text."""
        pieces = self.pieces
        texts = tuple(piece.text for piece in pieces)
        return Generation(
            prompt=self.prompt,
            sample=self.sample,
            prompt_tokens=self.prompt_tokens,
            prompt_text=self.prompt_text,
            text="".join(texts) if self.decoder else None,
            pieces=texts,
            tokens=np.array([piece.token for piece in pieces], np.int32),
            exits=np.array([piece.exit for piece in pieces], np.int32),
            confidences=np.array([piece.confidence for piece in pieces], np.float32),
            logprobs=np.array([piece.logprob for piece in pieces], np.float32),
            finish=pieces[-1].done,
            seconds=self.seconds,
            exit_names=exit_names(config),
            exit_depths=exit_depths(config),
        )


def exit_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of all exits, the final one last."""
    return (*(f"{each.position} layer {each.layer}" for each in config.exits), "final")


def exit_depths(config: ModelConfig) -> tuple[float, ...]:
    """Layers behind each exit, the final one last; an MLP branch leaves in the middle of one."""
    return (*(each.depth / 2 for each in config.exits), float(config.num_hidden_layers))


def generate(
    model: Model,
    prompts: Prompts,
    *,
    threshold: float | Sequence[float] | None = None,
    max_new_tokens: int = 128,
    engine: str = "deferred",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    samples: int = 1,
    max_deferred: int = 15,
    stop_tokens: Sequence[int] | None = None,
    add_bos: bool | None = None,
    dtype: str = "float32",
    max_sequences: int = 8,
    tokenizer: Tokenizer | None = None,
    stream: Callable[[Piece], object] | None = None,
) -> Any:
    """Continues one prompt (gives a Generation) or a list of prompts (a list of them).

    A prompt is a text, or a list of tokens. Texts depend on their own settings alone, not on what
    is written beside them. Every call packs the model's weights; for many calls use a Generator.

    threshold: the confidence (largest probability) from which on a token leaves at an early exit:
        one number for all exits or one for each. 1, the default, never leaves early.
    engine: "deferred" (early exits) or "full" (none, whatever the threshold).
    temperature, top_k, top_p, seed: 0 takes the likeliest token; top_k 0 and top_p 1 keep all.
    samples: texts for each prompt; more than one gives a list, prompt by prompt.
    max_deferred: rows that may be left behind at early exits before all are run to the end.
    stop_tokens: tokens that end a text; by default the model's end tokens.
    add_bos: put the start token before a text; by default where the tokenizer is SentencePiece's,
        or the text is empty.
    dtype: of the packed weights, "float32" or "bfloat16".
    max_sequences: texts that are written together.
    tokenizer: by default the one in the model's directory.
    stream: called with a Piece for every token as it comes.
    """
    settings = Settings(
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        engine=engine,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        samples=samples,
        max_deferred=max_deferred,
        stop_tokens=stop_tokens,
        add_bos=add_bos,
    )
    single, texts = _prepare(model, prompts, settings, tokenizer)
    _integer("max_sequences", max_sequences, 1, 2**16)
    longest = max(text.prompt_tokens.size for text in texts) + max_new_tokens
    generator = Generator(
        model,
        dtype=dtype,
        max_sequences=min(max_sequences, len(texts)),
        max_length=min(longest, model.config.max_position_embeddings),
    )
    results = generator._finish(texts, settings, stream)
    return results[0] if single and samples == 1 else results


class Generator:
    """A model made ready once to generate many times.

    Its weights are copied in the form that decoding wants: what happens to the model's parameters
    later changes nothing here. dtype of the copy: "float32" or "bfloat16". max_sequences: texts
    that are written together. max_length: tokens of a text with its prompt; by default the model's
    context.
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: str = "float32",
        max_sequences: int = 8,
        max_length: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Packs the weights."""
        from eellm import _core

        _choice("dtype", dtype, DTYPES)
        _integer("max_sequences", max_sequences, 1, 2**16)
        context = model.config.max_position_embeddings
        if max_length is not None:
            _integer("max_length", max_length, 1, context)
        self.model, self.tokenizer, self.max_sequences = model, tokenizer, max_sequences
        self._engine = _core.Engine(
            model.core, dtype=dtype, max_sequences=max_sequences, max_length=max_length or context
        )

    def generate(
        self,
        prompts: Prompts,
        *,
        stream: Callable[[Piece], object] | None = None,
        **settings: Any,
    ) -> Any:
        """Continues prompts; `settings` are the fields of Settings, see `generate`."""
        chosen = Settings(**settings)
        single, texts = _prepare(self.model, prompts, chosen, self.tokenizer)
        results = self._finish(texts, chosen, stream)
        return results[0] if single and chosen.samples == 1 else results

    def stream(self, prompts: Prompts, **settings: Any) -> Iterator[Piece]:
        """The tokens of prompts as they come; closing the iterator ends the texts."""
        chosen = Settings(**settings)
        _, texts = _prepare(self.model, prompts, chosen, self.tokenizer)
        return self._run(texts, chosen)

    def _finish(
        self,
        texts: Sequence[_Text],
        settings: Settings,
        stream: Callable[[Piece], object] | None,
    ) -> list[Generation]:
        for piece in self._run(texts, settings):
            if stream:
                stream(piece)
        return [text.result(self.model.config) for text in texts]

    def _run(self, texts: Sequence[_Text], settings: Settings) -> Iterator[Piece]:
        """Runs the engine; as many texts as fit are under way at a time."""
        if self._engine.active:
            from eellm._core import Error

            raise Error("the generator is in use; finish or close its other stream first")
        options = settings.options(self.model.config)
        waiting = deque(texts)
        running: dict[int, _Text] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.max_sequences:
                    text = waiting.popleft()
                    text.began = time.perf_counter()
                    tokens = text.prompt_tokens
                    running[self._engine.add(tokens, sample=text.sample, **options)] = text
                for event in self._engine.step():
                    number = int(event["sequence"])
                    text = running.pop(number) if event["done"] else running[number]
                    yield text.add(event)
        finally:
            # After an interruption, an error, or a closed iterator.
            for number in running:
                with suppress(ValueError):
                    self._engine.remove(number)


def _tokenizer(model: Model, given: Tokenizer | None, needed: bool) -> Tokenizer | None:
    if given is not None:
        return given
    try:
        return model.tokenizer
    except (FileNotFoundError, ImportError):
        if needed:
            raise
        return None


def _split(prompts: Prompts) -> tuple[bool, list[Any]]:
    """Whether there is one prompt, and all of them."""
    if isinstance(prompts, str):
        return True, [prompts]
    if isinstance(prompts, bytes) or not hasattr(prompts, "__len__"):
        raise invalid("prompts is invalid", "a text, tokens, or a list of such", prompts)
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1, [prompts] if prompts.ndim == 1 else list(prompts)
    if not len(prompts):
        raise invalid("prompts is empty", "one prompt at least", Shown("none"))
    if isinstance(prompts[0], int | np.integer):
        return True, [prompts]
    return False, list(prompts)


def _encode(prompt: Any, tokenizer: Any, vocab: int, add_bos: bool | None) -> npt.NDArray[np.int32]:
    if isinstance(prompt, str):
        bos = add_bos
        if bos is None:
            known = tokenizer.bos_id is not None
            bos = known and (not prompt or tokenizer.kind == "sentencepiece")
        tokens = tokenizer.encode(prompt, add_bos=bos)
        what = f"the text {prompt[:20]!r} has no tokens"
    else:
        tokens = np.asarray(prompt)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            got = Shown(f"{tokens.dtype.name} of shape {tokens.shape}")
            raise invalid("a prompt is invalid", "a text or a list of integers", got)
        what = "a prompt has no tokens"
    if not tokens.size:
        raise invalid(what, "one at least", 0, "begin with the start token, or add_bos=True")
    if not 0 <= tokens.min() <= tokens.max() < vocab:
        raise invalid(
            "a prompt has tokens outside the vocabulary",
            f"numbers from 0 to {vocab - 1}",
            Shown(f"{tokens.min()} to {tokens.max()}"),
            "encode the text with the model's own tokenizer",
        )
    return np.ascontiguousarray(tokens, np.int32)


def _prepare(
    model: Model, prompts: Prompts, settings: Settings, given: Tokenizer | None
) -> tuple[bool, list[_Text]]:
    """Whether there is one prompt, and a text for every sample of every prompt."""
    config = model.config
    settings.thresholds(config)
    single, each_prompt = _split(prompts)
    needed = any(isinstance(prompt, str) for prompt in each_prompt)
    tokenizer = _tokenizer(model, given, needed)
    texts = []
    for i, prompt in enumerate(each_prompt):
        tokens = _encode(prompt, tokenizer, config.vocab_size, settings.add_bos)
        if tokens.size > config.max_position_embeddings:
            raise invalid(
                f"prompt {i} is too long",
                f"at most {config.max_position_embeddings} tokens, the model's context",
                tokens.size,
                "shorten it",
            )
        shown = tokenizer.decode(tokens) if tokenizer else None
        if isinstance(prompt, str):
            shown = prompt
        for sample in range(settings.samples):
            decoder = tokenizer.stream(tokens) if tokenizer else None
            texts.append(_Text(i, sample, tokens, shown, decoder))
    return single, texts
