"""Where the log of a command goes."""

from __future__ import annotations

import logging
import os
import sys

from eellm.errors import invalid

LEVELS = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}


class _Handler(logging.StreamHandler):
    """Plain lines on standard error; warnings and errors say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            return f"eellm: {record.levelname.lower()}: {text}"
        return text


def connect() -> None:
    """Sends the log of the package and of the core to standard error; EELLM_LOG sets the level."""
    name = os.environ.get("EELLM_LOG", "") or "info"
    if name not in LEVELS:
        raise invalid("EELLM_LOG", f"one of {', '.join(LEVELS)}", name, "change or unset it")
    logger = logging.getLogger("eellm")
    logger.setLevel(LEVELS[name])
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler(sys.stderr))
        logger.propagate = False
    from eellm import _core

    _core.set_log(forward)


def forward(level: int, line: str) -> None:
    """A line of the core's log; its levels are numbered from error to debug."""
    logging.getLogger("eellm").log(list(LEVELS.values())[level], "%s", line)
