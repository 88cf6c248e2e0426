"""eellm generate."""

from __future__ import annotations

import argparse
import html
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eellm.decode import Generation, Piece

EPILOG = """\
Without --threshold no token leaves early. A threshold is one number for all early exits, or one for
each: --threshold 0.6,0.8. A token leaves at the first exit whose largest probability reaches it.

examples:
  eellm generate run/model --prompt "def main"
  eellm generate run/model --prompt "def main" --threshold 0.8 --temperature 0.8 --seed 3
  eellm generate run/model --prompt-file prompts.txt --threshold 0.6,0.8 --json
  eellm generate run/model --prompt "class A" --threshold 0.7 --html exits.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", metavar="MODEL", help="model directory or hub name")
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; may be given many times"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="a text to continue; - is stdin")
    parser.add_argument("--threshold", help="confidence at which a token leaves early")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument(
        "--engine", choices=("deferred", "full"), default="deferred", help="full: no early exits"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: all tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="texts for each prompt")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all that the process may use")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    parser.add_argument("--html", metavar="FILE", help="also write a page with coloured tokens")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal, unless NO_COLOR is set",
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from eellm.decode import generate
    from eellm.model import Model

    prompts = _prompts(options)
    model = Model.from_pretrained(options.model, threads=options.threads)
    plain = not options.json and not _coloured(options.color) and len(prompts) == 1
    stream = _echo if plain and options.samples == 1 else None
    if stream:
        sys.stdout.write(prompts[0])
    results = generate(
        model,
        prompts,
        stream=stream,
        threshold=thresholds(options.threshold),
        max_new_tokens=options.max_new_tokens,
        engine=options.engine,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        samples=options.samples,
        dtype=options.dtype,
    )
    if options.html:
        Path(options.html).write_text(page(results), encoding="utf-8")
    for result in results:
        if options.json:
            print(json.dumps(as_json(result)))
        elif not stream:
            print(result.to_ansi() if _coloured(options.color) else result_text(result))
    if not options.json:
        tell(results, bool(stream))
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    from eellm.errors import Shown, invalid

    prompts = list(options.prompt)
    if options.prompt_file == "-":
        prompts.append(sys.stdin.read())
    elif options.prompt_file is not None:
        try:
            prompts.append(Path(options.prompt_file).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            got = Shown("other bytes")
            raise invalid(options.prompt_file, "UTF-8 text", got, "convert the file") from None
    if not prompts:
        raise invalid("no prompt", "--prompt TEXT or --prompt-file FILE", Shown("neither"))
    return prompts


def thresholds(text: str | None) -> float | tuple[float, ...] | None:
    """One number, or one for each early exit."""
    from eellm.errors import invalid

    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        expected, advice = "numbers between 0 and 1", "e.g. 0.8 or 0.6,0.8"
        raise invalid("--threshold", expected, text, advice) from None
    return values[0] if len(values) == 1 else values


def _coloured(choice: str) -> bool:
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _echo(piece: Piece) -> None:
    sys.stdout.write(piece.text)
    sys.stdout.flush()


def result_text(result: Generation) -> str:
    """Prompt and text without colours."""
    return f"{result.prompt_text or ''}{result}"


def tell(results: list[Generation], newline: bool) -> None:
    """Shares of exits and speed, on standard error."""
    if newline:
        print(flush=True)
    for result in results:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result.exit_shares.items())
        print(
            f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s, "
            f"mean depth {result.mean_depth:.1f} of {result.exit_depths[-1]:g} layers: {shares}",
            file=sys.stderr,
        )


def as_json(result: Generation) -> dict[str, Any]:
    """A text and where its tokens left."""
    return {
        "prompt": result.prompt_text,
        "text": result.text,
        "tokens": result.tokens.tolist(),
        "exits": result.exits.tolist(),
        "confidences": [round(value, 6) for value in result.confidences.tolist()],
        "logprobs": [round(value, 6) for value in result.logprobs.tolist()],
        "exit_shares": result.exit_shares,
        "mean_depth": result.mean_depth,
        "tokens_per_second": result.tokens_per_second,
        "finish": result.finish,
    }


def page(results: list[Generation]) -> str:
    """A page that shows all texts."""
    title = html.escape("Where each token left the model")
    parts = "\n<hr>\n".join(result._repr_html_() for result in results)
    style = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{style}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n'
        f"<body><h1>{title}</h1>\n{parts}\n</body></html>\n"
    )
