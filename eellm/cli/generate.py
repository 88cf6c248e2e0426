"""eellm generate."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eellm.decode.settings import DRAFT_LENGTH, DTYPES, ENGINES, MAX_DEFERRED
from eellm.errors import Shown, invalid

if TYPE_CHECKING:
    from eellm._core import Comm
    from eellm.decode import Generator

EPILOG = """\
A token leaves at the first early exit whose largest probability reaches the threshold. Without
--threshold none does. Engines:
  deferred      leaves early; layers left out run later, where they are needed (default)
  full          every token at full depth
  speculative   exits draft, all layers verify: the text of full, in less time
  recompute     deferred that starts again from the first layer, for comparison
  pipeline      the layers are spread over ranks; a token that leaves starts the next one at once

examples:
  eellm generate run/model --prompt "def main"
  eellm generate run/model --prompt "def main" --threshold 0.8 --temperature 0.8 --seed 3
  eellm generate run/model --prompt "def main" --threshold 0.8 --active-exits 1
  eellm generate run/model --prompt "def main" --engine speculative
  eellm generate run/model --prompt-file prompt.txt --threshold 0.6,0.8 --json
  eellm generate run/model --prompt "class A" --threshold 0.7 --html exits.html
  eellm generate run/model --prompt "def f" --stop $'\\n\\n' --logit-bias 198=-2
  eellm generate run/model --prompt "def main" --engine pipeline --ranks 2 --threshold 0.8
  mpirun -n 4 eellm generate run/model --prompt "def main" --engine pipeline --threshold 0.8

Text goes to standard output, on a terminal each token on the colour of its exit; shares of exits
and speed go to standard error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", metavar="MODEL", help="model directory or hub name")
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; may be given many times"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="a text to continue; - is stdin")
    _add_exits(parser.add_argument_group("exits"))
    _add_length(parser.add_argument_group("texts"))
    _add_sampling(parser.add_argument_group("choosing tokens"))
    _add_output(parser.add_argument_group("output and machine"))


def _add_exits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engine", choices=ENGINES, default="deferred", help="see below; default deferred"
    )
    group.add_argument(
        "--threshold",
        metavar="P",
        help="confidence at which a token leaves early, from 0 to 1 (never, the default): one "
        "number for all early exits, or one for each: 0.6,0.8",
    )
    group.add_argument(
        "--active-exits", metavar="I,J", help="only these early exits are tried, counted from 0"
    )
    group.add_argument(
        "--max-deferred",
        type=int,
        metavar="N",
        help=f"tokens that may wait at early exits (default {MAX_DEFERRED}); with speculative "
        f"drafts in a row (default {DRAFT_LENGTH})",
    )
    group.add_argument(
        "--all-confidences", action="store_true", help="run every exit that a token passes"
    )
    group.add_argument(
        "--full-depth-logprobs",
        action="store_true",
        help="also compute each token's log-probability at full depth, shown by --json",
    )


def _add_length(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    group.add_argument("--min-new-tokens", type=int, default=0, metavar="N", help="default 0")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text, which is not shown; may be given many times",
    )
    group.add_argument(
        "--stop-token-ids", metavar="T,U", help="tokens that end a text (default: the model's)"
    )
    group.add_argument("--n", type=int, default=1, metavar="N", help="texts for each prompt")
    group.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="put the start token before a prompt (default: where the tokenizer is "
        "SentencePiece's, or the prompt is empty)",
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    numbers: dict[str, tuple[Any, Any, str]] = {
        "temperature": (float, 0.0, "0, the default, takes the likeliest token; above it they are "
                        "drawn"),
        "top-k": (int, 0, "draw from so many of the likeliest; 0, the default: all"),
        "top-p": (float, 1.0, "draw from the fewest that have this probability; default 1: all"),
        "min-p": (float, 0.0, "draw from those at least so likely as this part of the likeliest; "
                  "0, the default: all"),
        "seed": (int, 0, "another seed, another text; default 0"),
        "repetition-penalty": (float, 1.0, "above 1: tokens in prompt or text come less often"),
        "presence-penalty": (float, 0.0, "taken from the logits of tokens in the text"),
        "frequency-penalty": (float, 0.0, "the same, for each time that they came"),
    }  # fmt: skip
    for name, (kind, default, text) in numbers.items():
        group.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=text)
    group.add_argument(
        "--logit-bias",
        action="append",
        metavar="TOKEN=X",
        help="add to the logit of a token; -100 bans it; may be given many times",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="print one JSON object a text")
    group.add_argument(
        "--html", metavar="FILE", help="also write a page: tokens coloured by exit, with the "
        "confidences of all exits that they passed under the mouse"
    )  # fmt: skip
    group.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal, unless NO_COLOR is set",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, help="of the weights in memory (default: as in the files)"
    )
    group.add_argument(
        "--ranks", type=int, metavar="N", help="spread the layers over so many threads, with "
        "--engine pipeline (default 1; in a job of mpirun its ranks)"
    )  # fmt: skip
    group.add_argument("--split", metavar="N,M", help="layers of each rank (default: equal shares)")
    group.add_argument(
        "--threads", type=int, default=0, metavar="N", help="0: all that the process may use"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    comm = _job(options)
    if comm is not None and comm.rank > 0:
        from eellm.decode import serve

        serve(options.model, comm, options.threads)
        return 0
    prompts = _prompts(options)
    settings = _settings(options)
    with closing(_load(options, prompts, settings, comm)) as generator:
        return _write(options, prompts, settings, generator)


def _job(options: argparse.Namespace) -> Comm | None:
    """The ranks of a job of mpirun; None where this process is alone."""
    from eellm import distributed

    if not distributed.is_job():
        return None
    comm = distributed.world()
    if comm.size == 1:
        return None
    if options.engine != "pipeline":
        raise invalid(
            "generate in a job of several ranks", "--engine pipeline", options.engine,
            "start other engines without mpirun",
        )  # fmt: skip
    if options.ranks not in (None, comm.size):
        raise invalid("--ranks", f"the {comm.size} ranks of the job", options.ranks, "leave it out")
    return comm


def _write(
    options: argparse.Namespace,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    generator: Generator,
) -> int:
    from eellm.cli.show import Printer, as_json, page, tell

    exits = len(generator.config.exits) + 1
    printer = None if options.json else Printer(prompts, options.n, options.color, exits)
    results = generator.generate(prompts, stream=printer, **settings)
    if options.html:
        Path(options.html).write_text(page(results), encoding="utf-8")
    if printer is None:
        for result in results:
            print(json.dumps(as_json(result)))
    else:
        printer.legend(results)
        tell(results)
    return 0


def _load(
    options: argparse.Namespace,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    comm: Comm | None,
) -> Generator:
    """The model, with a cache for these texts. What is wrong with them is said before the weights
    are read, which may take long."""
    from eellm.data.tokenizers import load_tokenizer
    from eellm.decode import MAX_SEQUENCES, Generator, Settings
    from eellm.decode.prompts import Reader
    from eellm.files.directory import read_config
    from eellm.files.locate import find_folder

    chosen = Settings.of(settings)
    folder = find_folder(options.model)
    config = read_config(folder)
    chosen.options(config)
    tokenizer = load_tokenizer(folder)
    context = config.max_position_embeddings
    _, read, _ = Reader(config.vocab_size, context, lambda: tokenizer).read(prompts, chosen.add_bos)
    longest = max(prompt.tokens.size for prompt in read) + chosen.max_new_tokens
    return Generator.from_pretrained(
        folder,
        dtype=options.dtype,
        threads=options.threads,
        max_sequences=min(len(prompts) * chosen.n, MAX_SEQUENCES),
        max_length=min(longest, context),
        tokenizer=tokenizer,
        ranks=1 if options.ranks is None or comm is not None else options.ranks,
        split=_integers("--split", options.split),
        engine=chosen.engine,
        comm=comm,
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of `generate`."""
    plain = (
        "engine", "max_new_tokens", "min_new_tokens", "max_deferred", "temperature", "top_k",
        "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
        "n", "stop", "add_bos", "all_confidences", "full_depth_logprobs",
    )  # fmt: skip
    return {name: getattr(options, name) for name in plain} | {
        "threshold": thresholds(options.threshold),
        "active_exits": _integers("--active-exits", options.active_exits),
        "stop_token_ids": _integers("--stop-token-ids", options.stop_token_ids),
        "logit_bias": _bias(options.logit_bias),
    }


def _prompts(options: argparse.Namespace) -> list[str]:
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
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        expected, advice = "numbers between 0 and 1", "e.g. 0.8 or 0.6,0.8"
        raise invalid("--threshold", expected, text, advice) from None
    return values[0] if len(values) == 1 else values


def _integers(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise invalid(name, "whole numbers with commas between", text, "e.g. 0,2") from None


def _bias(items: list[str] | None) -> dict[int, float] | None:
    found = {}
    for item in items or ():
        token, _, value = item.partition("=")
        try:
            found[int(token)] = float(value)
        except ValueError:
            raise invalid("--logit-bias", "TOKEN=NUMBER", item, "e.g. 198=-2.5") from None
    return found or None
