"""A model spread over ranks, each of which decodes with its own layers.

The ranks are threads of this process, or the processes of a job of mpirun. Rank 0 takes the
requests; the others serve it (csrc/infer/pipeline.h).
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.errors import invalid

if TYPE_CHECKING:
    from eellm._core import Comm, Engine
    from eellm.config import ModelConfig

__all__ = ["Servers", "load_rank", "part_of", "serve", "spread", "threads_of"]

Part = tuple[int, int, int, npt.NDArray[np.int32], bool, bool]
Trace = tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]

_JOIN_SECONDS = 10.0


def part_of(
    config: ModelConfig, ranks: int, rank: int, split: Sequence[int] | None = None
) -> Part | None:
    """The part of a rank, as `_core.Model` takes it; None for the whole model.

    split: how many layers each rank has, by default equal shares.
    """
    from eellm.pipeline import Layout

    bounds = Layout.of(config, ranks, split=split).bounds
    return None if ranks == 1 else (ranks, 1, rank, np.array(bounds, np.int32), False, False)


def threads_of(threads: int, ranks: int) -> int:
    """Threads of each of several ranks that share this process's cores; 0 stays 0 for one rank."""
    if ranks == 1:
        return threads
    given = os.environ.get("EELLM_THREADS", "")
    every = threads or (int(given) if given.isdigit() else 0) or len(os.sched_getaffinity(0))
    return max(1, every // ranks)


class Servers:
    """Ranks behind the first that serve in threads of this process."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Starts a thread for each engine but the first."""
        self.engines = list(engines)
        self._threads = [
            threading.Thread(target=_serve, args=(engine,), name=f"rank {i}", daemon=True)
            for i, engine in enumerate(engines[1:], 1)
        ]
        for thread in self._threads:
            thread.start()
        # At the end of the interpreter too, before its threads lose the ground under them.
        self.close: Callable[[], None] = weakref.finalize(self, _stop, engines[0], self._threads)

    def traces(self) -> list[Trace]:
        """What each rank did, after `close` (see `_core.Engine.trace`)."""
        return [engine.trace for engine in self.engines]


def _serve(engine: Engine) -> None:
    from eellm._core import CommError, Error

    try:
        engine.serve()
    except (Error, CommError, ValueError, MemoryError):
        pass  # the job has been aborted: rank 0 raises the same


def _stop(engine: Engine, threads: Sequence[threading.Thread]) -> None:
    try:
        engine.stop()
    finally:
        for thread in threads:
            thread.join(_JOIN_SECONDS)


def spread(ranks: int, make: Callable[[int, Comm], Engine], timeout: float = 300.0) -> Servers:
    """Ranks as threads of this process. make: gives the engine of a rank."""
    from eellm import _core

    comms = _core.comm_local(ranks, timeout)
    return Servers([make(rank, comm) for rank, comm in enumerate(comms)])


def load_rank(
    folder: str | os.PathLike[str],
    comm: Comm,
    options: dict[str, Any],
    threads: int = 0,
    progress: bool = False,
) -> tuple[ModelConfig, Engine]:
    """The engine of this rank, with its own layers from a model directory.

    options: dtype, max_sequences, max_length, cache_tokens and split, equal on all ranks; threads:
    of this rank.
    """
    from eellm.files import packed
    from eellm.files.directory import read_config

    given = dict(options)
    whole = read_config(Path(folder))
    config, _, engine = packed.load_engine(
        folder,
        threads=threads,
        progress=progress,
        part=part_of(whole, comm.size, comm.rank, given.pop("split", None)),
        comm=comm,
        **given,
    )
    return config, engine


def begin_job(comm: Comm, options: dict[str, Any]) -> None:
    """On rank 0 of a job: tells the ranks that serve how to make their engines."""
    comm.broadcast(json.dumps(options).encode())


def serve(path: str | os.PathLike[str], comm: Comm, threads: int = 0) -> None:
    """On the ranks of a job behind the first: serves a Generator that rank 0 makes with the same
    communicator, until that closes it.

    path: the model, as on rank 0. threads: 0 shares the cores of the node among its ranks.
    """
    from eellm.distributed import threads_per_rank
    from eellm.files.locate import find_folder

    if comm.rank == 0:
        raise invalid("serve is for the ranks behind the first", "rank 1 or more", 0)
    options = json.loads(comm.broadcast(None))
    folder = find_folder(path)
    _, engine = load_rank(folder, comm, options, threads or threads_per_rank())
    engine.serve()
