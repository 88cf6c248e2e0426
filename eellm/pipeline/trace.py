"""Traces of pipelines in Chrome's format, for chrome://tracing and ui.perfetto.dev.

A process for each rank, with rows for actions, waits, sends and receives; arrows lead from a send
to its receive. Times are those of one machine's monotonic clock: ranks of several machines have
clocks of their own, which a trace does not bring together.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.pipeline.schedule import KIND_NAMES

if TYPE_CHECKING:
    from eellm._core import Comm

Events = npt.NDArray[np.float64]

# The columns of an array of events, and enum ee_event_kind (csrc/train/trace.h).
START, END, BYTES, KIND, WHAT, CHUNK, MICROBATCH, PEER, TAG = range(9)
ACTION, WAIT, SEND, RECEIVE = range(4)
_ROWS = ("actions", "waits", "sends", "receives")
_LANES = 100  # rows of one kind that stand below each other


@dataclass(frozen=True, eq=False)
class RankTrace:
    """The events of a rank, as Trainer.recorded gives them, and what it is called."""

    rank: int
    events: Events
    name: str = ""

    def of(self, kind: int) -> Events:
        """The events of a kind, in the order of their starts."""
        found = self.events[self.events[:, KIND] == kind]
        return found[np.argsort(found[:, START], kind="stable")]


@dataclass(frozen=True)
class Transfer:
    """A message between two ranks: under way from `start`, when both sides had begun, to `end`,
    when the receiver had it."""

    source: int
    target: int
    start: float
    end: float
    sent: float
    posted: float
    bytes: int
    tag: int
    microbatch: int

    @property
    def seconds(self) -> float:
        """How long it was under way."""
        return self.end - self.start


def gather(comm: Comm, events: Events, name: str = "") -> list[RankTrace]:
    """The traces of all ranks; a collective."""
    names = comm.all_gather(name.encode())
    parts = comm.all_gather(np.ascontiguousarray(events, np.float64).tobytes())
    return [
        RankTrace(rank, np.frombuffer(part).reshape(-1, 9), title.decode())
        for rank, (part, title) in enumerate(zip(parts, names, strict=True))
    ]


def write_trace(path: str | Path, comm: Comm, events: Events, name: str = "") -> list[RankTrace]:
    """Writes what all ranks recorded into one file, on rank 0; a collective.

    events: this rank's (Trainer.recorded). name: what it is called beside its number.
    """
    ranks = gather(comm, events, name)
    if comm.rank == 0:
        save(path, ranks)
    return ranks


def save(path: str | Path, ranks: Sequence[RankTrace]) -> None:
    """Writes a trace; a file that cannot be written whole leaves the old one as it was."""
    from eellm.files.disk import Folder

    path = Path(path)
    folder = Folder(path.parent, staged=True)
    try:
        with folder.create(path.name) as writer:
            for i, event in enumerate(chrome_events(ranks)):
                writer.write(b",\n" if i else b'{"displayTimeUnit": "ms", "traceEvents": [\n')
                writer.write(json.dumps(event, allow_nan=False).encode())
            writer.write(b"\n]}\n")
        folder.commit()
    except BaseException:
        folder.abort()
        raise


def transfers(ranks: Sequence[RankTrace]) -> list[Transfer]:
    """The messages whose both ends were recorded; those of one tag come in order."""
    sends: dict[tuple[int, int, int], list[Any]] = defaultdict(list)
    for each in ranks:
        for event in each.of(SEND):
            sends[each.rank, int(event[PEER]), int(event[TAG])].append(event)
    found = []
    for each in ranks:
        taken: dict[tuple[int, int, int], int] = defaultdict(int)
        for event in each.of(RECEIVE):
            key = int(event[PEER]), each.rank, int(event[TAG])
            i = taken[key]
            taken[key] += 1
            if i >= len(sends[key]):
                continue
            send = sends[key][i]
            sent, posted, end = float(send[START]), float(event[START]), float(event[END])
            start = min(max(sent, posted), end)
            size, microbatch = int(event[BYTES]), int(event[MICROBATCH])
            source, target, tag = key
            found.append(Transfer(source, target, start, end, sent, posted, size, tag, microbatch))
    return found


def overlap(ranks: Sequence[RankTrace]) -> tuple[float, float]:
    """Seconds of all transfers, and those of them during which the receiver was in an action."""
    actions = {each.rank: each.of(ACTION) for each in ranks}
    total = behind = 0.0
    for each in transfers(ranks):
        own = actions[each.target]
        shared = np.minimum(own[:, END], each.end) - np.maximum(own[:, START], each.start)
        total += each.seconds
        behind += float(shared.clip(min=0).sum())
    return total, behind


def overlap_share(ranks: Sequence[RankTrace]) -> float:
    """The part of all transfer time behind the receivers' actions."""
    total, behind = overlap(ranks)
    return behind / total if total > 0 else 1.0


# -- Chrome's format ----------------------------------------------------------------------------


def chrome_events(ranks: Sequence[RankTrace]) -> Iterator[dict[str, Any]]:
    """The objects of "traceEvents"."""
    filled = [each.events[:, START].min() for each in ranks if len(each.events)]
    zero = float(min(filled, default=0.0))
    for each in ranks:
        title = f"rank {each.rank}" + (f" ({each.name})" if each.name else "")
        yield _meta("process_name", each.rank, 0, name=title)
        yield _meta("process_sort_index", each.rank, 0, sort_index=each.rank)
        yield from _rank_events(each, zero)
    yield from _transfer_events(ranks, zero)


def _meta(kind: str, rank: int, row: int, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": row, "args": values}


def _slice(
    name: str, rank: int, row: int, start: float, end: float, zero: float, **values: Any
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": _ROWS[row // _LANES],
        "pid": rank,
        "tid": row,
        "ts": _micro(start - zero),
        "dur": _micro(end - start),
        "args": values,
    }


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def _rank_events(each: RankTrace, zero: float) -> Iterator[dict[str, Any]]:
    """Actions and waits, which follow each other."""
    chunks = len(set(each.of(ACTION)[:, CHUNK].tolist())) > 1
    for kind in (ACTION, WAIT):
        row = kind * _LANES
        yield _meta("thread_name", each.rank, row, name=_ROWS[kind])
        yield _meta("thread_sort_index", each.rank, row, sort_index=row)
        for event in each.of(kind):
            name = "wait"
            values: dict[str, Any] = {}
            if kind == ACTION:
                values = {"microbatch": int(event[MICROBATCH]), "chunk": int(event[CHUNK])}
                name = f"{KIND_NAMES[int(event[WHAT])]} {values['microbatch']}"
                name += f".{values['chunk']}" if chunks else ""
            yield _slice(name, each.rank, row, event[START], event[END], zero, **values)


def _lanes(spans: Iterable[tuple[float, float]]) -> list[int]:
    """The lowest lane of each span, in ascending order of starts, in which none overlap."""
    ends: list[float] = []
    lanes = []
    for start, end in spans:
        lane = next((i for i, free in enumerate(ends) if free <= start), len(ends))
        lane = min(lane, _LANES - 1)
        if lane == len(ends):
            ends.append(end)
        ends[lane] = max(ends[lane], end)
        lanes.append(lane)
    return lanes


def _transfer_events(ranks: Sequence[RankTrace], zero: float) -> Iterator[dict[str, Any]]:
    """Messages on both sides, each from when it was under way, and the arrows between them."""
    found = sorted(transfers(ranks), key=lambda each: (each.start, each.end))
    lanes: dict[tuple[int, int], int] = {}
    for kind in (SEND, RECEIVE):
        for rank in {each.source if kind == SEND else each.target for each in found}:
            mine = [i for i, t in enumerate(found) if rank == (t.source, t.target)[kind == RECEIVE]]
            rows = _lanes((found[i].start, found[i].end) for i in mine)
            for i, lane in zip(mine, rows, strict=True):
                lanes[kind, i] = kind * _LANES + lane
            for row in sorted({kind * _LANES + lane for lane in rows}):
                yield _meta("thread_name", rank, row, name=_ROWS[kind])
                yield _meta("thread_sort_index", rank, row, sort_index=row)
    for i, each in enumerate(found):
        yield from _message_events(i, each, lanes, zero)


def _message_events(
    i: int, each: Transfer, lanes: dict[tuple[int, int], int], zero: float
) -> Iterator[dict[str, Any]]:
    way = "gradient" if each.tag & 2 else "output"
    name = f"{way} {each.microbatch}"
    for kind, rank, peer in ((SEND, each.source, each.target), (RECEIVE, each.target, each.source)):
        values = {
            ("to" if kind == SEND else "from"): peer,
            "bytes": each.bytes,
            "send started": _micro(each.sent - zero),
            "receive posted": _micro(each.posted - zero),
        }
        row = lanes[kind, i]
        yield _slice(name, rank, row, each.start, each.end, zero, **values)
        point = {"name": way, "cat": "message", "id": i, "pid": rank, "tid": row}
        if kind == SEND:
            yield {"ph": "s", "ts": _micro(each.start - zero), **point}
        else:
            yield {"ph": "f", "bp": "e", "ts": _micro(each.end - zero), **point}
