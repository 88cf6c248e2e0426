"""The model that exits are measured on: a small Llama that has read Python's standard library.

EELLM_DATA (by default ../shared/data beside the project) may hold one that was trained longer,
models/code16. Where it does not, the recipe below trains one of the same config once, at most 20
minutes on two cores, and keeps it under EELLM_CACHE (by default ~/.cache/eellm).
"""

import json
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT

RECIPE = "code16-1"  # changes with whatever changes the model
SECONDS = 16 * 60.0  # of training
VOCABULARY = 4096
SEQ_LENGTH, MICRO_BATCH = 256, 8
FILES, PROMPT, TOKENS = 50, 64, 200


def find(threads):
    """(model directory, texts that it was not trained on)."""
    data = Path(os.environ.get("EELLM_DATA", ROOT.parent / "shared/data"))
    folder = data / "models/code16"
    if folder.is_dir():
        names = json.loads((folder / "held_out_files.json").read_text())
        library = Path(sysconfig.get_path("stdlib"))
        texts = [_read(library / name) for name in names]
        return folder, [text for text in texts if text]
    cache = Path(os.environ.get("EELLM_CACHE", Path.home() / ".cache/eellm")) / RECIPE
    if not (cache / "held_out.json").is_file():
        _train(cache, threads)
    return cache / "model", json.loads((cache / "held_out.json").read_text())


def documents(folder, texts):
    """Tokens of the held-out texts."""
    from eellm.data import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return [np.asarray(row, np.int32) for row in tokenizer.encode_batch(texts, special=False)]


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _config(tokenizer):
    from eellm.config import ExitConfig, ModelConfig

    return ModelConfig.llama(
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.03,
        eos_token_id=tokenizer.eod_id,
        exits=tuple(ExitConfig(layer, head="norm", output="embedding") for layer in (4, 8, 12)),
    )


def _settings(steps):
    from eellm.train.config import TrainConfig

    return TrainConfig(
        steps=steps,
        seq_length=SEQ_LENGTH,
        micro_batch_size=MICRO_BATCH,
        global_batch_size=MICRO_BATCH,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        warmup_steps=max(1, steps // 20),
        exit_weights=(0.3,),
        seed=1,
    )


def _train(cache, threads):
    from eellm.demo.corpus import library_corpus, prepare
    from eellm.model import Model
    from eellm.train.trainer import Trainer

    print(f"training the benchmark's model, once: about {SECONDS / 60:.0f} min", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    corpus = library_corpus()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        data = prepare(corpus, Path(folder), 1, VOCABULARY, SEQ_LENGTH)
        config = _config(data.tokenizer)
        trial = Trainer(
            Model.from_config(config, threads=threads), _settings(100), data.train, progress="none"
        )
        start = time.perf_counter()
        per_step = float(np.median([trial.step()["seconds"] for _ in range(6)]))
        steps = max(50, int((SECONDS - (time.perf_counter() - start)) / per_step))
        model = Model.from_config(config, seed=1, threads=threads)
        Trainer(model, _settings(steps), data.train, tokenizer=data.tokenizer).train()
        model.save_pretrained(cache / "model", dtype="bfloat16")
        data.tokenizer.save(cache / "model")
    # Last, because it says that all is there.
    (cache / "held_out.json").write_text(json.dumps(corpus.valid))
