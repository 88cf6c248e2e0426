"""What a run tells: one line a step for people, JSON lines for programs, TensorBoard on request."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from eellm.errors import Shown, invalid

log = logging.getLogger("eellm")

Record = Mapping[str, Any]
ProgressKind = Literal["auto", "bar", "log", "none"]


# -- For programs ------------------------------------------------------------------------------


class MetricsFile:
    """A file of JSON lines, one a record; numbers that are not finite become null."""

    def __init__(self, path: Path, keep_steps: int | None = None):
        """Opens the file; with `keep_steps`, records of later steps are dropped first."""
        self.path = path
        kept: list[str] = []
        if keep_steps is not None and path.is_file():
            kept = [line for line, record in _records(path) if record["step"] <= keep_steps]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._stream: TextIO = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, record: Record) -> None:
        """Appends a record."""
        json.dump(_finite(record), self._stream, separators=(",", ":"))
        self._stream.write("\n")

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off is left out."""
    return [record for _, record in _records(Path(path))]


def _records(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if isinstance(record["step"], int):
                yield line, record
        except (ValueError, KeyError, TypeError) as error:
            if number >= len(lines) - 1:
                return
            where = f"{path}, line {number}"
            advice = "remove the line"
            raise invalid(where, "a JSON object with a step", Shown(str(error)), advice) from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def require_tensorboard() -> None:
    """Raises an error that says how to get the package, where it is missing."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        what = "output.tensorboard needs the package tensorboard"
        expected = "(expected it installed, got no such module)"
        raise ImportError(f'{what} {expected}; pip install "eellm[tensorboard]"') from None


class TensorBoard:
    """Scalars as TensorBoard's event files; needs the package tensorboard."""

    def __init__(self, folder: Path):
        require_tensorboard()
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def write(self, record: Record) -> None:
        """Adds the numbers of a record, lists as one scalar for each exit."""
        kind = record["kind"]
        values = []
        for key, value in record.items():
            if key in ("kind", "step"):
                continue
            items = value if isinstance(value, list) else [value]
            for i, item in enumerate(items):
                if isinstance(item, int | float) and not isinstance(item, bool):
                    tag = f"{kind}/{key}" + (f"/exit{i}" if isinstance(value, list) else "")
                    values.append(self._summary.Value(tag=tag, simple_value=float(item)))
        summary = self._summary(value=values)
        event = self._event(wall_time=time.time(), step=record["step"], summary=summary)
        self._writer.add_event(event)

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


# -- For people --------------------------------------------------------------------------------


def losses_text(losses: Iterable[float]) -> str:
    """The final loss, early exits in brackets."""
    *early, final = losses
    inner = " ".join(f"{loss:.3f}" for loss in early)
    return f"{final:.3f}" + (f" (exits {inner})" if early else "")


def step_line(record: Record, steps: int) -> str:
    """A step's record as one line."""
    if record["kind"] == "valid":
        line = f"step {record['step']}/{steps}  validation loss {losses_text(record['losses'])}"
        return line + f"  perplexity {record['perplexities'][-1]:.2f}"
    parts = [
        f"step {record['step']}/{steps}",
        f"loss {losses_text(record['losses'])}",
        f"lr {record['learning_rate']:.2e}",
        f"norm {record['grad_norm']:.2f}",
        _speed(record),
    ]
    if record["skipped"]:
        parts.append(f"skipped: {record['skipped']}")
    return "  ".join(parts)


def _speed(record: Record) -> str:
    text = f"{record['tokens_per_second']:,.0f} tok/s"
    if record.get("matrix_share") is not None:
        text += f"  {100 * record['matrix_share']:.0f} % of matrix rate"
    return text


def bar_text(record: Record) -> str:
    """Losses and speed, short enough for a terminal of 80 columns."""
    *early, final = record["losses"]
    inner = " ".join(f"{loss:.2f}" for loss in early)
    text = f"loss {final:.2f}" + (f" ({inner})" if early else "")
    text += f" {record['tokens_per_second']:,.0f} tok/s"
    if record.get("matrix_share") is not None:
        text += f" {100 * record['matrix_share']:.0f}% matrix rate"
    return text


class Display:
    """Shows records: a progress bar on a terminal, else lines through logging."""

    def __init__(self, kind: ProgressKind, steps: int, done: int, log_interval: int):
        if kind == "auto":
            kind = "bar" if sys.stderr.isatty() else "log"
        self._steps, self._interval = steps, log_interval
        self._log_steps = kind == "log"
        self._bar: Any = None
        if kind == "bar":
            from tqdm import tqdm

            shape = "{percentage:3.0f}%|{bar:10}| {n}/{total} {remaining} {desc}"
            self._bar = tqdm(
                total=steps,
                initial=done,
                bar_format=shape,
                dynamic_ncols=True,
                file=sys.stderr,
                leave=True,
            )

    def show(self, record: Record) -> None:
        """Shows one record."""
        line = step_line(record, self._steps)
        if record["kind"] == "step":
            if self._bar is not None:
                self._bar.set_description_str(bar_text(record), refresh=False)
                self._bar.update(record["step"] - self._bar.n)
            due = record["step"] % self._interval == 0 or record["step"] == self._steps
            log.log(logging.INFO if self._log_steps and due else logging.DEBUG, line)
            if record["skipped"]:
                self.message(line, logging.WARNING)
        else:
            self.message(line)

    def message(self, text: str, level: int = logging.INFO) -> None:
        """Logs a line without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        log.log(level, text)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
