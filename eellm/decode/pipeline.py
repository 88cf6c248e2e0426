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

from eellm.errors import Shown, invalid

if TYPE_CHECKING:
    from eellm._core import Comm, Engine
    from eellm.config import ModelConfig

__all__ = ["Servers", "bounds_of", "load_rank", "part_of", "serve", "spread", "threads_of"]

Part = tuple[int, int, int, npt.NDArray[np.int32] | None, bool, bool]
Trace = tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]

_JOIN_SECONDS = 10.0


def bounds_of(split: Sequence[int] | None, ranks: int, layers: int) -> npt.NDArray[np.int32] | None:
    """Where the layers of each rank begin and end; None for equal shares.

    split: how many layers each rank has.
    """
    if split is None:
        return None
    counts = [int(count) for count in split]
    if len(counts) != ranks or min(counts) < 1 or sum(counts) != layers:
        expected = f"{ranks} counts of layers above 0 that add up to {layers}"
        raise invalid("split is invalid", expected, counts)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def part_of(ranks: int, rank: int, bounds: npt.NDArray[np.int32] | None) -> Part | None:
    """The part of a rank, as `_core.Model` takes it; None for the whole model."""
    return None if ranks == 1 else (ranks, 1, rank, bounds, False, False)


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
    layers = read_config(Path(folder)).num_hidden_layers
    bounds = bounds_of(given.pop("split", None), comm.size, layers)
    config, _, engine = packed.load_engine(
        folder,
        threads=threads,
        progress=progress,
        part=part_of(comm.size, comm.rank, bounds),
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


def check_ranks(ranks: int, engine: str, layers: int) -> None:
    """Refuses a number of ranks that a model or an engine has no use for."""
    if ranks > layers:
        advice = "every rank needs a layer"
        raise invalid("ranks is too large", f"at most the model's {layers} layers", ranks, advice)
    if ranks > 1 and engine not in ("pipeline", "full"):
        advice = 'leave engine out, or use engine "pipeline"'
        raise invalid(
            f'engine "{engine}" runs on one rank', "1 rank", Shown(f"{ranks} ranks"), advice
        )
