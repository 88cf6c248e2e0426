"""The command `eellm`.

Exit status: 0 done, 1 a run that failed, 2 a wrong call or setting, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from eellm._version import __version__

COMMANDS = {
    "demo": "train a small early-exit model on real text and watch it write (three minutes)",
    "train": "train a model from a TOML file",
    "launch": "run a command as the ranks of a job, on this machine or on several",
    "generate": "write text with a model, tokens coloured by the exit where they left",
    "eval": "losses, agreement and speed of every exit on a text; find the best thresholds",
    "data": "make and inspect token files",
    "convert": "turn a model into a Hugging Face directory, add exits, change the number format",
    "schedule": "show, check, price and draw the schedule of a training pipeline",
    "plan": "how to split a model over ranks: schedules, microbatches, time and memory",
    "info": "print what was built in, threads, bandwidth and matrix rate",
}

EPILOG = """\
examples:
  eellm demo                                     three minutes from text to a writing model
  eellm data prepare texts/ -o corpus --tokenizer tokenizer.json
  eellm train run.toml --set train.learning_rate=1e-3
  eellm generate run/model --prompt "def main" --threshold 0.8
  eellm eval run/model --text held_out.txt
  eellm COMMAND --help                           what a command takes, with examples

EELLM_DEBUG=1 shows tracebacks; docs/CONFIG.md lists all settings and environment variables.
"""


# As csrc/mpi/job.c has it.
_GONE = re.compile(r"^rank \d+: the process of rank \d+ has ended")
_CHOICE = re.compile(r"argument (.+): invalid choice: (.+) \(choose from (.+)\)")


class Parser(argparse.ArgumentParser):
    """Reports a wrong call in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits."""
        choice = _CHOICE.fullmatch(message)
        if choice:
            name, got, known = choice.groups()
            choices = [each.strip(" '") for each in known.split(",")]
            near = difflib.get_close_matches(got.strip("'"), choices, 1)
            advice = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
            message = f"{name} (expected one of {', '.join(choices)}, got {got}); {advice}"
        else:
            message = f"{message}; see {self.prog} --help"
        sys.exit(fail(message, 2))


def fail(text: str, status: int, echo: bool = False) -> int:
    """Prints an error as one line on standard error; returns the status.

    echo: it comes from the end of another rank of the job, whose own error says why.
    """
    line = " ".join(str(text).split("\n"))
    _end_job(f"eellm: error: {line}", status, echo)
    print(f"eellm: error: {line}", file=sys.stderr, flush=True)
    return status


def _end_job(line: str, status: int, echo: bool = False) -> None:
    """On a rank of a job, ends the job with one line of one rank; else does nothing."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMIX_RANK" in os.environ:
        from eellm.distributed import report_failure

        report_failure(line, status, echo)


def make_parser(command: str | None = None) -> Parser:
    """The whole parser; only the module of `command` is imported."""
    parser = Parser(
        prog="eellm",
        description="Train and run early-exit large language models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"eellm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, text in COMMANDS.items():
        if name == command:
            module = importlib.import_module(f"eellm.cli.{name}")
            child = commands.add_parser(
                name,
                help=text,
                description=text[0].upper() + text[1:] + ".",
                epilog=module.EPILOG,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            module.add_arguments(child)
            child.set_defaults(run=module.run)
        else:
            commands.add_parser(name, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((each for each in arguments if not each.startswith("-")), None)
    try:
        parser = make_parser(command if command in COMMANDS else None)
        options = parser.parse_args(arguments)
        if options.command is None:
            parser.print_help()
            return 2 if arguments else 0
        if "LOCAL_RANK" in os.environ and options.command in ("train", "generate"):
            from eellm.distributed import refuse_torchrun

            refuse_torchrun()
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        _end_job("eellm: interrupted", 130)
        print("eellm: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("EELLM_DEBUG", "") not in ("", "0"):
            raise
        return fail(_text(error), _status(error), _is_echo(error))


def _text(error: Exception) -> str:
    """The message; what is no error of ours is named by its type."""
    if isinstance(error, OSError) and error.strerror:
        if error.filename is not None and str(error.filename) not in error.strerror:
            return f"{error.filename}: {error.strerror}"
        return error.strerror
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "eellm._core":
        return "the native core is not built; run `make build` or `pip install .`"
    if isinstance(error, MemoryError):
        return text or "out of memory; use a smaller model, micro batch or sequence length"
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    ours = isinstance(error, ValueError | OSError | NotImplementedError | ImportError)
    if ours or _is_core(error):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}; set EELLM_DEBUG=1 to see where"


def _status(error: Exception) -> int:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return 2
    return 2 if isinstance(error, ValueError | NotImplementedError | ImportError) else 1


def _is_echo(error: Exception) -> bool:
    return type(error).__name__ == "PeerError" or bool(_GONE.search(str(error)))


def _is_core(error: Exception) -> bool:
    core = sys.modules.get("eellm._core")
    return core is not None and isinstance(error, core.Error)


__all__ = ["COMMANDS", "Parser", "fail", "main", "make_parser"]
