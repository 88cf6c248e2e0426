"""Records a few steps of a run for `eellm train --trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eellm import _core

# Steps that warm up before those that are recorded, and those, where the run has as many.
_WARM_UP, _RECORDED = 2, 3
# Of an action: itself, two messages and the waits for them.
_EVENTS_OF_AN_ACTION = 6


class Tracer:
    """Records steps 3 to 5 of a run, or all of a shorter one, and writes them to a file.

    Every rank has one and calls its methods around each step.
    """

    def __init__(self, path: Path, core: _core.Trainer, comm: _core.Comm, steps: int, actions: int):
        """steps: that the run has left; actions: of this rank in a step."""
        self.path, self._core, self._comm = path, core, comm
        self._first = _WARM_UP if steps >= _WARM_UP + _RECORDED else 0
        self._last = min(self._first + _RECORDED, steps)
        self._capacity = actions * _EVENTS_OF_AN_ACTION * _RECORDED + 1000
        self._step = 0

    def before_step(self) -> None:
        """Starts the recording when it is time."""
        if self._step == self._first:
            self._core.record(self._capacity)

    def after_step(self) -> None:
        """Writes the file after the last recorded step."""
        self._step += 1
        if self._step != self._last:
            return
        from eellm.pipeline.trace import write_trace

        write_trace(self.path, self._comm, self._core.recorded())
        self._core.record(0)
