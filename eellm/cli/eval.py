"""eellm eval."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EPILOG = """\
Every exit reads the text, windows of it at a time: loss, perplexity, and agreement, which is the
part of the tokens where its most likely one is that of full depth. Then the speed of thresholds
from 1 to 0, and a search for the exits and thresholds with the most speed at --agreement, found on
one half of the windows and judged on the other. Take text that the model was not trained on; some
20,000 tokens make agreements good to a few tenths of a percent.

examples:
  eellm eval run/model --text held_out.txt
  eellm eval run/model --text a.txt --text b.txt --tokens 20000 --png curve.png
  eellm eval run/model --text held_out.txt --agreement 0.995 --dtype bfloat16 --html page.html
  eellm eval run/model --text held_out.txt --speed-tokens 0 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", metavar="MODEL", help="model directory or hub name")
    parser.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        required=True,
        help="a text to be evaluated on; may be given many times",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.99,
        metavar="P",
        help="part of the tokens that thresholds shall keep; default 0.99",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="no more than so many of the text")
    parser.add_argument(
        "--window",
        type=int,
        metavar="W",
        help="tokens that are read together; default 512, or the model's context",
    )
    parser.add_argument(
        "--speed-tokens",
        type=int,
        default=256,
        metavar="N",
        help="decoded three times to time each threshold; 0 times nothing; default 256",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights; default bfloat16 where the files have it, else float32",
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all that the process may use")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="also write a page with tables and picture")
    parser.add_argument("--png", metavar="FILE", help="also draw the curve into a file")


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from eellm.evaluation import evaluate
    from eellm.evaluation.report import to_page

    found = evaluate(
        options.model,
        [_read(Path(name)) for name in options.text],
        agreement=options.agreement,
        window=options.window,
        tokens=options.tokens,
        speed_tokens=options.speed_tokens,
        dtype=options.dtype,
        threads=options.threads,
    )
    if options.png:
        found.plot().savefig(options.png)
    if options.html:
        page = to_page(found, f"Early exits of {options.model}")
        Path(options.html).write_text(page, encoding="utf-8")
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0


def _read(path: Path) -> str:
    from eellm.errors import Shown, invalid

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise invalid(str(path), "UTF-8 text", Shown("other bytes"), "convert the file") from None
