"""eellm convert."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EPILOG = """\
INPUT is a Hugging Face directory, a hub name, or a llama2.c file (version 0); OUTPUT becomes a
Hugging Face directory.

An exit is LAYER[:KEY=VALUE,...] with the keys of docs/CONFIG.md ([[model.exits]]), e.g. 4,
4:head=mlp or 8:position=before,norm=final.

examples:
  eellm convert stories15M.bin stories15M --tokenizer tokenizer.model
  eellm convert gpt2 gpt2-ee --exit 4 --exit 8:head=mlp
  eellm convert run/model small --dtype bfloat16
"""

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("input", metavar="INPUT", help="model directory, hub name or .bin file")
    parser.add_argument("output", metavar="OUTPUT", help="folder for the result")
    parser.add_argument(
        "--exit",
        action="append",
        default=[],
        metavar="LAYER[:KEY=VALUE,...]",
        help="add an early exit in place of those that the model has; may be given many times",
    )
    parser.add_argument(
        "--exit-init",
        choices=("copy", "random"),
        default="copy",
        help="values of new exits: copies of the model's own parts, or random",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--tokenizer", help="tokenizer file or folder to save with the model")
    parser.add_argument("--seed", type=int, default=0, help="of random values")
    parser.add_argument("--force", action="store_true", help="write into a folder that has files")


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from eellm.data import load_tokenizer
    from eellm.errors import invalid
    from eellm.files import llama2c
    from eellm.model import Model

    exits = [parse_exit(text) for text in options.exit] or None
    output = Path(options.output)
    if output.is_dir() and any(output.iterdir()) and not options.force:
        advice = "choose another folder or add --force"
        raise invalid(f"{output} is not empty", "a new or empty folder", "files", advice)
    if Path(options.input).is_file():
        made = llama2c.convert(options.input, output, options.tokenizer, options.dtype)
        if exits is None:
            layers = made.num_hidden_layers
            print(f"{output}: {made.model_type}, {layers} layers, {options.dtype}")
            return 0
        source = str(output)
    else:
        source = options.input
    model = Model.from_pretrained(source, exits=exits, init=options.exit_init, seed=options.seed)
    model.save_pretrained(output, dtype=options.dtype)
    if options.tokenizer and source == options.input:
        load_tokenizer(options.tokenizer).save(output)
    print(f"{output}: {model!r}, {options.dtype}")
    return 0


def parse_exit(text: str) -> Any:
    """An exit from LAYER[:KEY=VALUE,...]."""
    from eellm.config import ExitConfig
    from eellm.errors import invalid
    from eellm.settings import build, field_types, parse, unknown

    layer, _, rest = text.partition(":")
    if not layer.isdigit():
        raise invalid("--exit", "LAYER[:KEY=VALUE,...]", text, "e.g. --exit 4:head=mlp")
    values: dict[str, Any] = {"layer": int(layer)}
    kinds = field_types(ExitConfig)
    for item in rest.split(",") if rest else []:
        key, separator, value = item.partition("=")
        if not separator:
            raise invalid(f"--exit {text}", "KEY=VALUE after the colon", item)
        if key not in kinds:
            raise unknown("key of --exit", key, kinds)
        if key in ("branch", "norm"):
            values[key] = value
        else:
            values[key] = int(value) if value.isdigit() else parse(value, kinds[key], key)
    return build(ExitConfig, values, "--exit")
