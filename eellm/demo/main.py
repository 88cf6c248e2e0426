"""The demo: from text to an early-exit model that writes, in about two minutes on two cores."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eellm.config import ExitConfig, ModelConfig
from eellm.demo import report
from eellm.demo.corpus import Corpus, Data, library_corpus, prepare, prompt_texts, text_corpus
from eellm.errors import Shown, invalid
from eellm.train.config import TrainConfig

if TYPE_CHECKING:
    from eellm.data import Tokenizer
    from eellm.decode.generation import Generation
    from eellm.evaluation.thresholds import Choice
    from eellm.model import Model
    from eellm.train.trainer import Trainer

VOCABULARY = 1024
SEQ_LENGTH = 128
MICRO_BATCH = 8
EXITS_AFTER = (2, 4)
EXIT_WEIGHTS = 0.5
CALIBRATION_WINDOWS = 160
VALID_BATCHES = 8
PROMPT_TOKENS, NEW_TOKENS = 80, 96

# What a run of the demo must show (and a test checks), with some room for chance: thresholds are
# chosen on one half of the validation text and judged on the other.
AGREEMENT, AGREEMENT_ROOM = 0.90, 0.02
SHARE, SHARE_ROOM = 0.05, 0.04

# Seconds for what comes after training: thresholds, writing, pictures.
RESERVE = 14.0
LEAST_STEPS, MOST_STEPS = 200, 20000

_MARK = ".eellm-demo"
_OURS = ("tokenizer", "run", "model", "demo.json", "losses.png", "exits.png")
_OURS_TOO = ("train.bin", "train.idx", "valid.bin", "valid.idx")


def run(
    out: str | Path = "demo-out",
    *,
    text: str | Path | None = None,
    seconds: float = 135.0,
    steps: int | None = None,
    seed: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs the demo and returns what it found; `quiet` prints nothing but the log."""
    if not 10 <= seconds <= 86400:
        raise invalid("seconds", "10 to 86400", seconds, "135 is the usual time")
    if steps is not None and steps < LEAST_STEPS:
        raise invalid("steps", f"at least {LEAST_STEPS}", steps, "leave it out to aim at a time")
    began = time.perf_counter()
    folder = _fresh(Path(out))
    say = _nothing if quiet else _say
    corpus = library_corpus() if text is None else text_corpus(text)
    size = f"{_kilobytes(corpus.train)} in {len(corpus.train)} {corpus.unit}"
    say(f"Text        {corpus.name}: {size},")
    say(f"            and {_kilobytes(corpus.valid)} in {len(corpus.valid)} held out")
    data = prepare(corpus, folder, seed, VOCABULARY, SEQ_LENGTH)
    vocabulary = f"{data.tokenizer.vocab_size:,}"
    say(f"Tokens      byte-level BPE of {vocabulary}: {data.train_tokens:,} tokens")
    say(f"            a token alone is worth {data.entropy:.2f} bits (unigram entropy)")
    config = model_config(data.tokenizer)
    if steps is None:
        left = seconds - (time.perf_counter() - began) - RESERVE
        steps = steps_for(left, config, data.train)
    trainer = _train(config, data, folder, steps, seed, say)
    found = _results(corpus, data, trainer, steps)
    choice = _thresholds(trainer, data, found)
    say(report.table(found))
    texts = _write(trainer.model, data, corpus, choice.thresholds, seed)
    found |= report.writing(texts)
    found["paths"] |= report.pictures(trainer, texts, found, folder)
    found["seconds"] = time.perf_counter() - began
    (folder / "demo.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not quiet:
        report.show(texts, found)
    return found


def _fresh(folder: Path) -> Path:
    """A folder without what an earlier demo left."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).is_file():
            advice = "choose another with --out"
            what = f"the folder {folder} is not empty"
            raise invalid(what, "a new one or that of an earlier demo", Shown("files"), advice)
        for name in (*_OURS, *_OURS_TOO):
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif folder.exists() and not folder.is_dir():
        raise invalid(f"{folder} is a file", "a folder", Shown("a file"), "choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    return folder


def _say(line: str) -> None:
    print(line, flush=True)


def _nothing(line: str) -> None:
    pass


def _kilobytes(texts: Sequence[str]) -> str:
    return f"{sum(map(len, texts)) / 1000:,.0f} KB"


def model_config(tokenizer: Tokenizer) -> ModelConfig:
    """A small Llama with two early exits."""
    return ModelConfig.llama(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eod_id,
        exits=tuple(ExitConfig(layer, head="norm") for layer in EXITS_AFTER),
    )


def train_config(steps: int, seed: int) -> TrainConfig:
    """How the demo trains; a tenth of the steps lie between two validations."""
    return TrainConfig(
        steps=steps,
        seq_length=SEQ_LENGTH,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=MICRO_BATCH,
        learning_rate=3e-3,
        min_learning_rate=3e-4,
        warmup_steps=max(1, steps // 20),
        exit_weights=(EXIT_WEIGHTS,),
        valid_interval=max(1, steps // 10),
        valid_batches=VALID_BATCHES,
        log_interval=max(1, steps // 20),
        keep_checkpoints=1,
        seed=seed,
    )


def steps_for(seconds: float, config: ModelConfig, data: Any) -> int:
    """Steps that fit into a time, by the time of the first ones; rounded, so that they seldom
    differ between two runs on a machine."""
    from eellm.model import Model
    from eellm.train.trainer import Trainer

    trainer = Trainer(Model.from_config(config), train_config(100, 0), data, progress="none")
    times = [trainer.step()["seconds"] for _ in range(8)]
    # Every tenth of the steps comes a validation of 8 batches, a third of a step each.
    per_step = float(np.median(times[2:]))
    steps = int((seconds - 80 * per_step / 3) / (per_step * 1.04))
    grain = 10 ** max(1, int(math.log10(max(steps, 10))) - 1)
    return int(min(max(steps // grain * grain, LEAST_STEPS), MOST_STEPS))


def _train(
    config: ModelConfig, data: Data, folder: Path, steps: int, seed: int, say: Callable[[str], None]
) -> Trainer:
    from eellm.model import Model
    from eellm.train.trainer import Trainer

    model = Model.from_config(config, seed=seed)
    after = " and ".join(str(each.layer) for each in config.exits)
    sizes = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    say(f"Model       Llama, {sizes}, early exits after layers {after}:")
    say(f"            {model.num_parameters:,} parameters")
    say(f"Training    {steps} steps of {MICRO_BATCH * SEQ_LENGTH:,} tokens")
    trainer = Trainer(
        model,
        train_config(steps, seed),
        data.train,
        valid=data.valid,
        output=folder / "run",
        tokenizer=data.tokenizer,
    )
    trainer.train()
    if (folder / "model").exists():
        shutil.rmtree(folder / "model")
    shutil.move(folder / "run" / "model", folder / "model")
    return trainer


def _bits(losses: Sequence[float]) -> list[float]:
    return [loss / math.log(2.0) for loss in losses]


def _results(corpus: Corpus, data: Data, trainer: Trainer, steps: int) -> dict[str, Any]:
    """What training showed, losses in bits a token."""
    from eellm.decode import exit_depths, exit_names

    config = trainer.model.config
    held_out = [record for record in trainer.history if record["kind"] == "valid"]
    records = [record for record in trainer.history if record["kind"] == "step"]
    folder = trainer.folder.path.parent if trainer.folder is not None else Path()
    return {
        "text": corpus.name,
        "train_tokens": data.train_tokens,
        "valid_tokens": data.valid_tokens,
        "vocab_size": data.tokenizer.vocab_size,
        "unigram_entropy": data.entropy,
        "parameters": trainer.model.num_parameters,
        "exits": list(exit_names(config)),
        "depths": list(exit_depths(config)),
        "steps": steps,
        "tokens_per_step": trainer.config.tokens_per_step,
        "train_tokens_per_second": float(np.median([r["tokens_per_second"] for r in records])),
        "matrix_share": float(np.median([r["matrix_share"] for r in records])),
        "losses_after_a_tenth": _bits(held_out[0]["losses"]),
        "losses_at_the_end": _bits(held_out[-1]["losses"]),
        "paths": {
            "model": str(folder / "model"),
            "metrics": str(folder / "run" / "metrics.jsonl"),
            "tokens": str(folder / "train"),
            "report": str(folder / "demo.json"),
        },
    }


def _choose(confidence: Any, correct: Any, depths: Sequence[float]) -> Choice:
    """Thresholds that leave something to every exit, or fewer of them where that can't be had."""
    from eellm.evaluation import thresholds

    agreement = AGREEMENT + AGREEMENT_ROOM
    for share in (SHARE + SHARE_ROOM, SHARE):
        try:
            return thresholds.choose(
                confidence, correct, depths, agreement=agreement, least_share=share
            )
        except ValueError:
            continue
    return thresholds.choose(confidence, correct, depths, agreement=agreement)


def _thresholds(trainer: Trainer, data: Data, found: dict[str, Any]) -> Choice:
    """Chooses thresholds on one half of the validation text and judges them on the other."""
    from eellm.data import validation_batches
    from eellm.evaluation import thresholds

    windows = min(2 * CALIBRATION_WINDOWS, data.valid.window_count)
    batches = validation_batches(data.valid, MICRO_BATCH, 1, windows=windows)
    result = trainer.evaluate(batches, collect=True)
    assert result.confidence is not None and result.correct is not None
    half = result.tokens // 2
    depths = found["depths"]
    choice = _choose(result.confidence[:, :half], result.correct[:, :half], depths)
    judged = thresholds.outcome(
        choice.thresholds, result.confidence[:, half:], result.correct[:, half:], depths
    )
    found |= {
        "valid_losses": _bits(result.losses),
        "thresholds": list(choice.thresholds),
        "agreement": judged.agreement,
        "shares": list(judged.shares),
        "mean_depth": judged.mean_depth,
        "judged_tokens": result.tokens - half,
        "chosen_on": {
            "tokens": half,
            "agreement": choice.agreement,
            "shares": list(choice.shares),
            "mean_depth": choice.mean_depth,
        },
    }
    return choice


def _fitting(text: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The tokens of as many last lines of a text as fit in a prompt."""
    lines = text.splitlines(keepends=True)
    for start in range(len(lines)):
        tokens = tokenizer.encode("".join(lines[start:]))
        if len(tokens) <= PROMPT_TOKENS:
            return tokens
    return tokens[-PROMPT_TOKENS:]


def _write(
    model: Model, data: Data, corpus: Corpus, thresholds: Sequence[float], seed: int
) -> dict[str, list[Generation]]:
    """Texts without and with early exits, one prompt after the other, as a user would wait."""
    from eellm.decode import generate

    settings: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "temperature": 0.7,
        "top_p": 0.95,
        "seed": seed,
        "stop_token_ids": (),
        "tokenizer": data.tokenizer,
    }
    prompts = [_fitting(text, data.tokenizer) for text in prompt_texts(corpus)]
    texts: dict[str, list[Generation]] = {"full": [], "early": []}
    for prompt in prompts:
        texts["full"].append(generate(model, prompt, engine="full", **settings))
        texts["early"].append(generate(model, prompt, threshold=list(thresholds), **settings))
    return texts
