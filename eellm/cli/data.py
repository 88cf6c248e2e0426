"""eellm data."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

EPILOG = """\
examples:
  eellm data prepare texts/ more.jsonl.gz -o corpus --tokenizer model/tokenizer.json
  eellm data prepare novels.txt.xz -o novels --tokenizer gpt2/ --separator "<|endoftext|>"
  eellm data tokenizer texts/ -o tokenizer/ --vocab-size 8192
  eellm data inspect corpus --tokenizer model/
"""

PREPARE = """\
Inputs are text files, JSON lines and folders of them, plain, .gz or .xz. A line of a .jsonl file is
a document, under --key; a text file is one document, or several between --separator texts. OUTPUT
becomes OUTPUT.bin and OUTPUT.idx in Megatron's format.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommands."""
    parser.set_defaults(action=None)
    commands = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    plain = argparse.RawDescriptionHelpFormatter

    prepare = commands.add_parser(
        "prepare", help="text to a token file", epilog=PREPARE, formatter_class=plain
    )
    _add_inputs(prepare)
    prepare.add_argument("-o", "--output", required=True, metavar="PREFIX", help="token file")
    prepare.add_argument(
        "--tokenizer", required=True, help="tokenizer.json, a SentencePiece .model, or a folder"
    )
    prepare.add_argument("--workers", type=int, default=0, help="processes that encode")
    prepare.add_argument(
        "--no-eod", action="store_true", help="write no separator token after documents"
    )
    prepare.add_argument(
        "--plain", action="store_true", help="read special tokens in the text as plain text"
    )

    train = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer")
    _add_inputs(train)
    train.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for it")
    train.add_argument("--vocab-size", type=int, default=8192, help="default 8192")

    inspect = commands.add_parser("inspect", help="what a token file holds")
    inspect.add_argument("prefix", help="token file")
    inspect.add_argument("--tokenizer", help="shows the beginning as text")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders")
    parser.add_argument("--key", default="text", help="key of the text in JSON lines")
    parser.add_argument("--separator", help="text between the documents of a text file")
    parser.add_argument(
        "--extensions", default=".jsonl,.txt,.md", help="types of files that a folder gives"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    actions = {"prepare": _prepare, "tokenizer": _tokenizer, "inspect": _inspect}
    return actions[options.action](options)


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    extensions = tuple(part.strip() for part in options.extensions.split(",") if part.strip())
    return {"key": options.key, "separator": options.separator, "extensions": extensions}


def _prepare(options: argparse.Namespace) -> int:
    from eellm.data import load_tokenizer, prepare

    tokenizer = load_tokenizer(options.tokenizer)
    result = prepare(
        options.inputs,
        options.output,
        tokenizer,
        append_eod=not options.no_eod,
        special=not options.plain,
        workers=options.workers,
        progress=sys.stderr.isatty(),
        **_reading(options),
    )
    print(
        f"{options.output}: {result.documents:,} documents, {result.tokens:,} tokens, "
        f"{result.bytes_per_token:.2f} bytes a token"
        + (f", {result.empty} empty documents left out" if result.empty else "")
    )
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from eellm.data import iter_documents, train_bpe

    documents = iter_documents(options.inputs, **_reading(options))
    tokenizer = train_bpe(documents, options.vocab_size)
    tokenizer.save(options.output)
    print(f"{options.output}: {tokenizer.vocab_size:,} tokens")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    import numpy as np

    from eellm.data import TokenFile, load_tokenizer

    file = TokenFile(options.prefix)
    lengths = np.diff(file.bounds)
    found: dict[str, Any] = {
        "file": str(file.bin_path),
        "dtype": str(file.dtype),
        "documents": len(file),
        "tokens": int(file.tokens.size),
        "largest_token": file.largest_token(),
        "shortest_document": int(lengths.min()) if lengths.size else 0,
        "median_document": float(np.median(lengths)) if lengths.size else 0.0,
        "longest_document": int(lengths.max()) if lengths.size else 0,
    }
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
        found["begins"] = tokenizer.decode(file.tokens[:100].tolist())
    if options.json:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        shown = f"{value:,}" if isinstance(value, int | float) else value
        print(f"{key.replace('_', ' '):<18} {shown}")
    return 0
