"""Ends a run between two steps when the process is asked to stop."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

from eellm import distributed

log = logging.getLogger("eellm")


class StopSignals:
    """While active, SIGINT and SIGTERM are remembered; a second SIGINT aborts at once.

    In a job of mpirun SIGUSR1 counts as SIGTERM: `eellm launch` sends it first, since mpirun passes
    it on and leaves the ranks the time that a checkpoint takes.

    Outside the main thread nothing is changed, as Python allows handlers there alone.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            asks = [signal.SIGINT, signal.SIGTERM]
            if distributed.is_job():
                asks.append(signal.SIGUSR1)
            for number in asks:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received == signal.SIGINT:
                raise KeyboardInterrupt
            log.warning("stopping after this step; press Ctrl-C again to abort at once")
        self.received = signal.SIGTERM if number == signal.SIGUSR1 else number

    def leave(self) -> None:
        """Raises what the remembered signal asks for: KeyboardInterrupt or SystemExit(143)."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
