"""How a model is spread over the ranks of a job, and which schedule they follow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from eellm.errors import Shown, invalid
from eellm.settings import check_values

if TYPE_CHECKING:
    from eellm._core import Comm
    from eellm.config import ModelConfig
    from eellm.files.peers import Peers
    from eellm.pipeline import Layout, Schedule

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """[parallel]: the grid of ranks, the split of the model and the schedule.

    pipeline 0 takes all ranks of the job. split: layers of each chunk in the order of the model,
    without it equal shares, or with balance = "cost" shares of equal time. docs/PARALLELISM.md
    explains schedules and bubble filling.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 0
    chunks: int = 1
    split: tuple[int, ...] = ()
    balance: Literal["layers", "cost"] = "layers"
    rank_edge: Literal["later", "earlier"] = "later"
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero_bubble"] = "1f1b"
    schedule_file: str | None = None
    exit_w: Literal["fused", "deferred"] = "fused"
    exact_ties: bool = False
    bubble_fill: Literal["none", "extra", "replaced"] = "none"
    bubble_fill_counts: tuple[int, ...] = ()
    bubble_fill_ratio: float = 2.0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("data", "tensor", "chunks"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("pipeline", self.pipeline >= 0, "a number of ranks, or 0 for all")
        self._require("timeout", self.timeout > 0, "seconds, above 0")
        self._require("bubble_fill_ratio", self.bubble_fill_ratio > 0, "a number above 0")
        several = self.schedule == "interleaved" or self.schedule_file is not None
        self._require("chunks", self.chunks == 1 or several, f"1 with {self.schedule}")
        good = len(self.bubble_fill_counts) in (0, 2)
        self._require("bubble_fill_counts", good, "two numbers, or none for as many as fit")
        good = self.bubble_fill == "none" or self.schedule == "1f1b"
        self._require("bubble_fill", good, f"none with {self.schedule}", "1f1b has bubbles to fill")
        both = bool(self.split) and self.balance == "cost"
        self._require("balance", not both, "layers where split is given", "remove one of the two")

    def _require(self, name: str, good: bool, expected: str, advice: str = "") -> None:
        if not good:
            raise invalid(name, expected, getattr(self, name), advice or f"change {name}")


class Group:
    """The ranks that train a model together, as one of them sees it.

    comm: of all ranks of the job (`eellm.distributed.world()`, or one of `_core.comm_local`). They
    form the grid data x tensor x pipeline of the config; `pipeline` is the communicator of this
    rank's pipeline. Raises ValueError unless the factors multiply to the ranks of the job. A
    collective.
    """

    def __init__(self, comm: Comm, config: ParallelConfig | None = None) -> None:
        from eellm import _core

        self.comm, self.config = comm, config or ParallelConfig()
        comm.timeout = self.config.timeout
        data, tensor = self.config.data, self.config.tensor
        pipeline = self.config.pipeline or max(1, comm.size // (data * tensor))
        self.place, (_, _, self.pipeline) = _core.comm_grid(comm, data, tensor, pipeline)

    @property
    def rank(self) -> int:
        """This rank of the pipeline."""
        return self.pipeline.rank

    @property
    def size(self) -> int:
        """Ranks of the pipeline."""
        return self.pipeline.size

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all: it logs, and writes what one alone can write."""
        return self.comm.rank == 0

    @cached_property
    def peers(self) -> Peers:
        """The ranks as those who write files together."""
        from eellm.files.peers import Peers

        return Peers(self.comm)

    def layout(self, model: ModelConfig, seq_length: int = 1024) -> Layout:
        """Which layers and exits of the model each chunk holds."""
        from eellm.pipeline import Costs, Layout

        config = self.config
        if config.balance == "cost":
            costs = Costs.of_model(
                model,
                self.size,
                config.chunks,
                seq_length=min(seq_length, model.max_position_embeddings),
                split="cost",
                rank_edge=config.rank_edge,
            )
            assert costs.layout is not None
            return costs.layout
        return Layout.of(
            model,
            self.size,
            config.chunks,
            split=config.split or None,
            rank_edge=config.rank_edge,
        )

    def part(self, model: ModelConfig) -> tuple[Any, ...]:
        """The part of a model that this rank holds, as the native model takes it."""
        bounds = np.array(self.layout(model).bounds, np.int32)
        earlier = self.config.rank_edge == "earlier"
        exact = self.config.exact_ties or self.config.bubble_fill != "none"
        return (self.size, self.config.chunks, self.rank, bounds, earlier, exact)

    def schedule(self, model: ModelConfig, microbatches: int) -> Schedule:
        """The schedule of a step with a global batch of `microbatches`; those that fill bubbles
        come on top of them or are among them, as bubble_fill says."""
        from eellm.pipeline import Schedule
        from eellm.pipeline.schedule import fill_counts

        config = self.config
        if config.schedule_file is not None:
            return self._load(config.schedule_file, microbatches)
        fill = (0, 0)
        if config.bubble_fill != "none":
            counts = config.bubble_fill_counts or fill_counts(self.size, config.bubble_fill_ratio)
            fill = (counts[0], counts[1])
        full = microbatches - (sum(fill) if config.bubble_fill == "replaced" else 0)
        if full < 1:
            raise invalid(
                "the global batch is too small",
                f"more than the {sum(fill)} microbatches that fill bubbles",
                microbatches,
                'raise global_batch_size, or set bubble_fill = "extra"',
            )
        return Schedule(
            config.schedule,
            self.size,
            full,
            config.chunks,
            fill=fill,
            ratio=config.bubble_fill_ratio,
            exits=self.layout(model).exit_ranks,
        )

    def _load(self, path: str, microbatches: int) -> Schedule:
        from eellm.pipeline import Schedule

        found = Schedule.load(path)
        mine = (self.size, self.config.chunks, microbatches)
        got = (found.ranks, found.chunks, found.total)
        if mine != got:
            names = "ranks, {} chunks and {} microbatches"
            raise invalid(
                f"the schedule {path} does not fit",
                f"{mine[0]} " + names.format(*mine[1:]),
                Shown(f"{got[0]} " + names.format(*got[1:])),
                "make one for this run with eellm schedule --save",
            )
        return found

    def __repr__(self) -> str:
        return f"Group(rank {self.comm.rank} of {self.comm.size}, {self.comm.transport})"


def run_local(
    ranks: int, function: Callable[[Group], T], config: ParallelConfig | None = None
) -> list[T]:
    """Runs `function` on ranks that are threads of this process; what it returned, by rank.

    For notebooks, tests and machines without MPI. Where a rank fails the others are stopped, and
    its error is raised.

    >>> eellm.run_local(2, lambda group: eellm.Model.from_config(config, group=group))
    """
    from eellm import _core

    config = config or ParallelConfig()
    comms = _core.comm_local(ranks, config.timeout)
    failed: list[BaseException] = []

    def work(comm: Comm) -> T:
        try:
            return function(Group(comm, config))
        except BaseException as error:
            failed.append(error)
            comm.abort(f"{type(error).__name__}: {error}")
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(work, comm) for comm in comms]
    if failed:
        raise failed[0]
    return [future.result() for future in futures]
