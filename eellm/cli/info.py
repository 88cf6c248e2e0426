"""eellm info."""

from __future__ import annotations

import argparse
import json

EPILOG = """\
examples:
  eellm info
  eellm info --json --no-measure
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--no-measure", action="store_true", help="leave out what takes seconds to measure"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    from eellm.info import collect, lines

    found = collect(measure=not options.no_measure)
    print(json.dumps(found) if options.json else "\n".join(lines(found)))
    return 0
