"""What early exits gain on a text, and what they cost: losses, agreement, speed, thresholds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, check_integer, invalid
from eellm.evaluation import drafts, thresholds
from eellm.evaluation.costs import StepCosts
from eellm.evaluation.drafts import DraftPlan
from eellm.evaluation.scoring import Tokens, WindowScores, cut, score
from eellm.evaluation.speed import FULL, Pieces, Speed, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from eellm import _core
    from eellm.config import ModelConfig
    from eellm.evaluation.thresholds import Choice

WINDOW, SPEED_TOKENS, AGREEMENT = 512, 256, 0.99
CURVE = tuple(round(1 - 0.05 * i, 2) for i in range(21))
# Of what the searches find, as many are timed.
TIMED, TIMED_DRAFTS = 4, 2


@dataclass(frozen=True)
class Row:
    """What thresholds, one for each early exit, do on a text.

    agreement: part of the tokens that are the final exit's; shares: part that each exit takes.
    predicted: times as fast as full depth, by the bytes that steps read. What was timed, on a part
    of the text: tokens_per_second, speedup over full depth, and expected, which is what was
    predicted for that part. found_agreement: on the half of the text where a search found the
    thresholds; all else is from the other half then.
    """

    thresholds: tuple[float, ...]
    agreement: float
    shares: tuple[float, ...]
    mean_depth: float
    predicted: float
    tokens_per_second: float | None = None
    speedup: float | None = None
    expected: float | None = None
    found_agreement: float | None = None

    @property
    def gain(self) -> float:
        """The speed-up that was measured, else the predicted one."""
        return self.predicted if self.speedup is None else self.speedup


@dataclass(frozen=True)
class Drafting:
    """A plan to draft, and the measured speed of greedy text over full depth."""

    plan: DraftPlan
    tokens_per_second: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """A model on a text, teacher-forced.

    losses (nats a token) and agreement (part of the tokens that are the final exit's) of each exit,
    the final one last. curve: rows of equal thresholds for all early exits. candidates: thresholds
    that a search found for the agreement `wanted`. full_tokens_per_second: at full depth, batch 1.
    """

    exit_names: tuple[str, ...]
    exit_depths: tuple[float, ...]
    dtype: str
    tokens: int
    window: int
    losses: tuple[float, ...]
    agreement: tuple[float, ...]
    wanted: float
    curve: tuple[Row, ...]
    candidates: tuple[Row, ...]
    drafts: tuple[Drafting, ...]
    full_tokens_per_second: float | None

    @property
    def perplexity(self) -> tuple[float, ...]:
        """Of each exit."""
        return tuple(float(np.exp(loss)) for loss in self.losses)

    @property
    def marked(self) -> Row | None:
        """The row of the curve with the most speed at the wanted agreement, by prediction."""
        good = [row for row in self.curve if row.agreement >= self.wanted]
        return max(good, key=lambda row: row.predicted, default=None)

    @property
    def best(self) -> Row | None:
        """The candidate with the most speed by prediction, which no noise of a timing moves."""
        return next(iter(self.candidates), None)

    @property
    def best_drafting(self) -> Drafting | None:
        """The way to draft with the most speed by prediction."""
        return next(iter(self.drafts), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types, for JSON."""
        best, drafting, marked = self.best, self.best_drafting, self.marked
        return {
            **asdict(self),
            "perplexity": self.perplexity,
            "marked": marked and asdict(marked),
            "best": best and asdict(best),
            "best_drafting": drafting and asdict(drafting),
        }

    def plot(self) -> Figure:
        """Speed-up against agreement and mean depth."""
        from eellm.evaluation.curves import curve

        return curve(self)

    def __str__(self) -> str:
        """Tables for a terminal."""
        from eellm.evaluation.report import to_text

        return to_text(self)

    def _repr_html_(self) -> str:
        from eellm.evaluation.report import to_html

        return to_html(self)


def evaluate(
    model: Any,
    text: str | Sequence[Any] | npt.NDArray[np.integer[Any]],
    *,
    agreement: float = AGREEMENT,
    window: int | None = None,
    tokens: int | None = None,
    speed_tokens: int = SPEED_TOKENS,
    dtype: str | None = None,
    threads: int = 0,
    tokenizer: Any = None,
    add_bos: bool | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluates every exit on a text that the model was not trained on.

    model: a Model, a Generator, a directory, or a name on the Hugging Face hub. text: one, its
    tokens, or a list of either. agreement: with full depth, that is wanted of thresholds. window:
    tokens that are scored together, by default 512 or the model's context. tokens: no more than so
    many are scored. speed_tokens: that are decoded to time each row, three times; 0 times nothing.
    dtype: of the weights; a Generator has its own. threads: for a model that is loaded here.
    add_bos: put the start token before each text, by default where the tokenizer is
    SentencePiece's.
    """
    _check(agreement, window, tokens, speed_tokens)
    config, engine, dtype, find = _open(model, dtype, threads, progress)
    documents = _documents(text, config, tokenizer or find, add_bos)
    room = getattr(model, "max_length", config.max_position_embeddings)
    size = min(window or WINDOW, room)
    if size < 2:
        raise invalid("window is too short", "2 or more", size, "take a model with more context")
    windows = cut(documents, size, tokens)
    with _bar(sum(map(len, windows)) - len(windows), "scoring", progress) as bar:
        scores = score(engine, windows, progress=bar.update)
    work = _Work(config, engine, StepCosts(config, dtype), scores, speed_tokens, progress)
    candidates = work.candidates(agreement)
    curve, full = work.curve()
    return Evaluation(
        exit_names=work.names,
        exit_depths=work.depths,
        dtype=dtype,
        tokens=scores.tokens,
        window=size,
        losses=_floats(-scores.logprob.mean(axis=1, dtype=np.float64)),
        agreement=_floats(scores.correct.mean(axis=1)),
        wanted=float(agreement),
        curve=curve,
        candidates=candidates,
        drafts=work.drafts(),
        full_tokens_per_second=full,
    )


def _check(agreement: object, window: object, tokens: object, speed_tokens: object) -> None:
    number = isinstance(agreement, float | int | np.floating) and not isinstance(agreement, bool)
    if not number or not 0 < float(agreement) <= 1:  # type: ignore[arg-type]
        raise invalid("agreement is invalid", "a number above 0 and at most 1", agreement)
    if window is not None:
        check_integer("window", window, 2, 2**31 - 1)
    if tokens is not None:
        check_integer("tokens", tokens, 1, 2**62)
    check_integer("speed_tokens", speed_tokens, 0, 2**31 - 1, "0 times nothing")


def _open(
    model: Any, dtype: str | None, threads: int, progress: bool
) -> tuple[ModelConfig, _core.Engine, str, Any]:
    """(config, engine, dtype of the weights, what finds the tokenizer) of anything with a model."""
    from eellm.decode import Generator

    if isinstance(model, str | os.PathLike):
        from eellm.data import load_tokenizer
        from eellm.files.locate import find_folder
        from eellm.files.packed import load_engine

        folder = find_folder(model)
        config, _, engine = load_engine(folder, dtype, threads, max_sequences=4, progress=progress)
        return config, engine, engine.dtype, lambda: load_tokenizer(folder)
    held = model.core if isinstance(model, Generator) else None
    if held is not None:
        if dtype is not None:
            advice = "leave dtype out, or pass the model"
            raise invalid("dtype is given beside a generator", "None", dtype, advice)
        return model.config, held, held.dtype, lambda: model.tokenizer
    if not hasattr(model, "core"):
        raise invalid("model is invalid", "a Model, a Generator or a directory", model)
    from eellm import _core

    dtype = dtype or "float32"
    engine = _core.Engine(model.core, dtype=dtype, max_sequences=4)
    return model.config, engine, dtype, lambda: model.tokenizer


def _documents(text: Any, config: ModelConfig, tokenizer: Any, bos: bool | None) -> list[Tokens]:
    """The tokens of each text. tokenizer: one, or what finds it where it is needed."""
    if isinstance(text, str):
        each_text: list[Any] = [text]
    elif isinstance(text, np.ndarray):
        each_text = [text] if text.ndim == 1 else list(text)
    elif isinstance(text, Iterable) and not isinstance(text, bytes | dict):
        each_text = list(text)
        if each_text and isinstance(each_text[0], int | np.integer):
            each_text = [each_text]
    else:
        raise invalid("text is invalid", "a text, its tokens, or a list of such", text)
    if any(isinstance(each, str) for each in each_text):
        tokenizer = tokenizer() if callable(tokenizer) else tokenizer
        if bos is None:
            bos = tokenizer.bos_id is not None and tokenizer.kind == "sentencepiece"
    found = []
    for each in each_text:
        tokens = tokenizer.encode(each, add_bos=bos) if isinstance(each, str) else np.asarray(each)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            got = Shown(f"{tokens.dtype.name} of shape {tokens.shape}")
            raise invalid("a text is invalid", "a string or a list of integers", got)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            expected = f"numbers from 0 to {config.vocab_size - 1}"
            got = Shown(f"{tokens.min()} to {tokens.max()}")
            advice = "encode the text with the model's own tokenizer"
            raise invalid("a text has tokens outside the vocabulary", expected, got, advice)
        found.append(np.ascontiguousarray(tokens, np.int32))
    return found


@dataclass
class _Work:
    """The parts of an evaluation that stand on scores."""

    config: ModelConfig
    engine: _core.Engine
    costs: StepCosts
    scores: WindowScores
    speed_tokens: int
    progress: bool
    names: tuple[str, ...] = ()
    depths: tuple[float, ...] = ()
    early: int = 0
    pieces: Pieces | None = None

    def __post_init__(self) -> None:
        from eellm.decode import exit_depths, exit_names

        self.names, self.depths = exit_names(self.config), exit_depths(self.config)
        self.early = self.costs.early
        if self.speed_tokens and max(map(len, self.scores.windows)) > 2:
            self.pieces = Pieces.of(self.scores, self.speed_tokens)

    def curve(self) -> tuple[tuple[Row, ...], float | None]:
        """Equal thresholds for all exits, and the speed of full depth."""
        rows = [self._row([limit] * self.early, self.scores) for limit in CURVE if self.early]
        return self._timed(rows, "speed of thresholds")

    def candidates(self, agreement: float) -> tuple[Row, ...]:
        """The best thresholds found on one half of the windows, judged on the other."""
        if not self.early or len(self.scores.windows) < 2:
            return ()
        here, there = self.scores.halves()
        found = thresholds.candidates(
            here.confidence,
            here.correct,
            self.depths,
            agreement=agreement,
            cost=self.costs.leaving,
        )[:TIMED]
        rows = [
            replace(self._row(each.thresholds, there), found_agreement=each.agreement)
            for each in found
        ]
        return self._timed(rows, "speed of candidates")[0]

    def drafts(self) -> tuple[Drafting, ...]:
        """The best plans to draft, and what they gain on text that the model writes."""
        plans = drafts.plans(self.costs, self.scores, TIMED_DRAFTS)
        if not self.pieces or not plans:
            return tuple(map(Drafting, plans))
        requests = [
            {
                "engine": "speculative",
                "max_deferred": each.max_drafts,
                "thresholds": [
                    each.threshold if exit == each.exit else 1.0 for exit in range(self.early)
                ],
            }
            for each in plans
        ]
        speeds = self._speeds(requests, "speed of drafts", forced=False)[1:]
        return tuple(
            Drafting(plan, speed.tokens_per_second, speed.speedup)
            for plan, speed in zip(plans, speeds, strict=True)
        )

    def _row(self, limits: Sequence[float], scores: WindowScores) -> Row:
        found: Choice = thresholds.outcome(limits, scores.confidence, scores.correct, self.depths)
        places = thresholds.places(limits, scores.confidence)
        paid = self.costs.average(found.active, places, scores.starts)
        full = self.costs.full()
        return Row(found.thresholds, found.agreement, found.shares, found.mean_depth, full / paid)

    def _timed(self, rows: list[Row], what: str) -> tuple[tuple[Row, ...], float | None]:
        """Rows with their measured speed, and the speed of full depth."""
        if not self.pieces:
            return tuple(rows), None
        requests = [{"engine": "deferred", "thresholds": list(each.thresholds)} for each in rows]
        full, *speeds = self._speeds(requests, what, forced=True)
        found = []
        for row, speed in zip(rows, speeds, strict=True):
            places = thresholds.places(row.thresholds, self.scores.confidence)
            active = [each < 1 for each in row.thresholds]
            paid = self.pieces.expected(self.costs, active, places)
            found.append(
                replace(
                    row,
                    tokens_per_second=speed.tokens_per_second,
                    speedup=speed.speedup,
                    expected=self.costs.full() / paid,
                )
            )
        return tuple(found), full.tokens_per_second

    def _speeds(self, requests: list[dict[str, Any]], what: str, *, forced: bool) -> list[Speed]:
        """Of full depth, then of each request."""
        assert self.pieces is not None
        ways = [FULL, *requests]
        with _bar(self.pieces.tokens * len(ways) * 3, what, self.progress) as bar:
            return measure(
                self.engine, self.pieces, ways, forced=forced, rounds=3, progress=bar.update
            )


def _floats(values: npt.NDArray[np.floating[Any]]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _bar(total: int, what: str, progress: bool) -> Any:
    """A progress bar on a terminal, for what takes more than half a second."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit="tok",
        unit_scale=True,
        desc=what,
        delay=0.5,
        leave=False,
        file=sys.stderr,
        disable=not progress or not sys.stderr.isatty(),
    )
