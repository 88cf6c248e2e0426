"""eellm demo."""

from __future__ import annotations

import argparse
import json

EPILOG = """\
The demo trains a byte-level BPE tokenizer and a small Llama with two early exits on the source of
Python's standard library, then lets it write with and without early exits. The folder gets the
model (a Hugging Face directory), the token files, metrics.jsonl and two pictures.

examples:
  eellm demo
  eellm demo --text novel.txt --out novel
  eellm demo --seconds 60 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="default demo-out")
    parser.add_argument("--text", metavar="FILE", help="train on this text, at least 200 KB")
    parser.add_argument(
        "--seconds", type=float, default=135.0, help="time to aim at in all (default 135)"
    )
    parser.add_argument("--steps", type=int, help="training steps, instead of a time to aim at")
    parser.add_argument("--seed", type=int, default=1, help="of all random numbers (default 1)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object of what it found"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from eellm import demo
    from eellm.cli import logs

    logs.connect()
    found = demo.run(
        options.out,
        text=options.text,
        seconds=options.seconds,
        steps=options.steps,
        seed=options.seed,
        quiet=options.json,
    )
    if options.json:
        print(json.dumps(found))
    return 0
