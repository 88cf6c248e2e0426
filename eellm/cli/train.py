"""eellm train."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EPILOG = """\
A run is described by a TOML file; every key has a default but data.train and the model's sizes:

  [model]
  hidden_size = 256
  num_hidden_layers = 8
  num_attention_heads = 4
  tie_word_embeddings = true
  [[model.exits]]
  layer = 4
  head = "norm"                    # embedding, norm, mlp or block

  [data]
  train = "corpus"                 # corpus.bin and corpus.idx, from eellm data prepare
  valid = "heldout"
  tokenizer = "tokenizer.json"

  [train]
  steps = 2000
  seq_length = 256
  micro_batch_size = 8
  global_batch_size = 16
  learning_rate = 1e-3
  warmup_steps = 100
  exit_weights = [0.3]
  valid_interval = 200
  checkpoint_interval = 200

  [output]
  folder = "run"

examples:
  eellm train run.toml
  eellm train run.toml --set train.learning_rate=3e-4 --set model.exits.0.layer=5
  eellm train run.toml --print-config > complete.toml
  eellm train run.toml --resume auto         go on from the last good checkpoint

The folder gets metrics.jsonl, checkpoints/ and at the end model/, a Hugging Face directory.
Ctrl-C and SIGTERM save a checkpoint before they end the run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("config", nargs="?", help="TOML file with the settings")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a setting; may be given many times",
    )
    parser.add_argument(
        "--resume",
        choices=("none", "auto"),
        default="none",
        help="auto: go on from the last good checkpoint of the folder, or start there",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="short for --set output.folder=DIR")
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete settings and exit"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from eellm.cli import logs
    from eellm.settings import apply_overrides, load_toml
    from eellm.train.run import SCHEMA, RunSettings, make_trainer

    values: dict[str, Any] = load_toml(options.config) if options.config else {}
    values = apply_overrides(SCHEMA, values, options.set)
    if options.output is not None:
        values.setdefault("output", {})["folder"] = options.output
    settings = RunSettings.from_values(values)
    if options.print_config:
        sys.stdout.write(settings.to_toml())
        return 0
    logs.connect()
    trainer = make_trainer(settings, options.resume)
    assert trainer.folder is not None
    (trainer.folder.path / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
    trainer.train()
    print(f"saved {Path(trainer.folder.model)}", file=sys.stderr)
    return 0
