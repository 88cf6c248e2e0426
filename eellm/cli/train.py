"""eellm train."""

from __future__ import annotations

import argparse
import os
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

  [parallel]                       # for several ranks
  schedule = "1f1b"                # gpipe, interleaved, zero_bubble

  [output]
  folder = "run"

examples:
  eellm train run.toml
  eellm train run.toml --set train.learning_rate=3e-4 --set model.exits.0.layer=5
  eellm train run.toml --print-config > complete.toml
  eellm train run.toml --resume auto         go on from the last good checkpoint
  eellm launch -n 4 -- train run.toml        four ranks, each with a quarter of the layers
  mpirun -n 4 eellm train run.toml           the same

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
        "--schedule", metavar="FILE", help="short for --set parallel.schedule_file=FILE"
    )
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write what the ranks do in steps 3 to 5, for chrome://tracing or ui.perfetto.dev",
    )
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
    if options.schedule is not None:
        values.setdefault("parallel", {})["schedule_file"] = options.schedule
    if options.output is not None:
        values.setdefault("output", {})["folder"] = options.output
    settings = RunSettings.from_values(values)
    if options.print_config:
        sys.stdout.write(settings.to_toml())
        return 0
    logs.connect()
    trainer = make_trainer(settings, options.resume, options.trace, _fault())
    folder = trainer.folder
    assert folder is not None
    first = trainer.group is None or trainer.group.first
    if first:
        (folder.path / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
    trainer.train()
    if first:
        print(f"saved {Path(folder.model)}", file=sys.stderr)
    return 0


def _fault() -> tuple[str, int, int, float] | None:
    """EELLM_FAULT=RANK:KIND:STEP:ACTION[:SECONDS], which tests set: what happens on a rank."""
    text = os.environ.get("EELLM_FAULT")
    if not text:
        return None
    from eellm import distributed
    from eellm.errors import invalid

    parts = text.split(":")
    try:
        rank, kind, step, action = int(parts[0]), parts[1], int(parts[2]), int(parts[3])
        seconds = float(parts[4]) if len(parts) > 4 else 0.0
    except (IndexError, ValueError):
        expected = "RANK:KIND:STEP:ACTION or RANK:delay:STEP:ACTION:SECONDS"
        raise invalid("EELLM_FAULT is invalid", expected, text) from None
    return (kind, step, action, seconds) if distributed.world().rank == rank else None
