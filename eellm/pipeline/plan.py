"""Plans: how to split a model over ranks, which schedule and microbatches to take, and what that
costs in time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eellm.errors import Shown, check_integer, check_one_of, invalid
from eellm.pipeline.layout import Layout
from eellm.pipeline.memory import RankMemory, memory_of
from eellm.pipeline.schedule import Schedule

if TYPE_CHECKING:
    from eellm.config import ModelConfig
    from eellm.pipeline.measure import Speeds
    from eellm.pipeline.simulation import Simulation

RECOMPUTE = ("none", "attention", "full")
BALANCE = ("layers", "cost")
_NAMES = ("1f1b", "gpipe", "interleaved", "zero_bubble")
_CHUNKS = (2, 4)
_MICRO_BATCHES = 5
# Actions of all candidates that are simulated; beyond, the most promising ones alone.
_ACTIONS = 2 << 20
_MOST_LAYERS = 512  # that are split by cost, which takes the square of them


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a plan decides: the keys of [parallel] and [train] with the same names."""

    schedule: str
    chunks: int
    balance: str
    split: tuple[int, ...]
    micro_batch_size: int
    microbatches: int
    recompute: str

    def settings(self) -> dict[str, dict[str, Any]]:
        """The sections of a run's file."""
        parallel: dict[str, Any] = {"schedule": self.schedule, "balance": self.balance}
        if self.chunks > 1:
            parallel["chunks"] = self.chunks
        if self.balance == "cost":
            del parallel["balance"]
            parallel["split"] = list(self.split)
        train = {"micro_batch_size": self.micro_batch_size, "recompute": self.recompute}
        return {"parallel": parallel, "train": train}


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A choice, and what it costs: seconds of a step (`update` of which are no actions) and the
    memory of each rank."""

    choice: Choice
    simulation: Simulation
    update: float
    memory: tuple[RankMemory, ...]
    limit: float | None

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.simulation.time + self.update

    @property
    def peak(self) -> int:
        """Bytes of the rank that needs most."""
        return max(each.total for each in self.memory)

    @property
    def fits(self) -> bool:
        """Whether every rank keeps to the limit."""
        return self.limit is None or self.peak <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """The plan as values for JSON."""
        return {
            "schedule": self.choice.schedule,
            "chunks": self.choice.chunks,
            "balance": self.choice.balance,
            "split": list(self.choice.split),
            "micro_batch_size": self.choice.micro_batch_size,
            "microbatches": self.choice.microbatches,
            "recompute": self.choice.recompute,
            "seconds": self.seconds,
            "update_seconds": self.update,
            "bubble_share": self.simulation.bubble_share,
            "bytes": [each.total for each in self.memory],
            "fits": self.fits,
            "settings": self.choice.settings(),
        }


def divisors(batch: int, most: int = _MICRO_BATCHES) -> list[int]:
    """Sizes of microbatches that divide a batch, the smallest ones."""
    return [n for n in range(1, batch + 1) if batch % n == 0][:most]


class Planner:
    """Makes plans for a model on some ranks.

    speeds: for a size of microbatches how long parts of the model take (eellm.pipeline.measure).
    limit: bytes that a rank has.
    """

    def __init__(
        self,
        config: ModelConfig,
        ranks: int,
        *,
        seq_length: int,
        global_batch_size: int,
        speeds: Callable[[int], Speeds],
        limit: float | None = None,
        rank_edge: str = "later",
        exit_w: str = "fused",
        exact_ties: bool = False,
        threads: int = 1,
    ) -> None:
        """Checks that the model can be split."""
        check_integer("ranks", ranks, 1, 1 << 16)
        check_integer("global_batch_size", global_batch_size, 1, 1 << 24)
        check_one_of("exit_w", exit_w, ("fused", "deferred"))
        if ranks > config.num_hidden_layers:
            raise invalid(
                "the model has too few layers",
                f"at least {ranks}, one for each rank",
                config.num_hidden_layers,
                "use fewer ranks",
            )
        if limit is not None and not 0 < limit < np.inf:
            raise invalid("memory is invalid", "a number of bytes above 0", limit)
        self.config, self.ranks, self.seq_length = config, ranks, seq_length
        self.batch, self.limit, self.threads = global_batch_size, limit, threads
        self.rank_edge, self.exit_w, self.exact_ties = rank_edge, exit_w, exact_ties
        self._make = speeds
        self._made: dict[int, Speeds] = {}

    def speeds(self, micro_batch_size: int) -> Speeds:
        """How long parts of the model take for microbatches of a size."""
        if micro_batch_size not in self._made:
            self._made[micro_batch_size] = self._make(micro_batch_size)
        return self._made[micro_batch_size]

    def layout(self, chunks: int, balance: str, micro_batch_size: int) -> Layout:
        """Equal shares of layers, or shares of equal time."""
        cost = None
        if balance == "cost":
            cost = self.speeds(micro_batch_size).chunk_cost(self.config, self.rank_edge)
        return Layout.of(self.config, self.ranks, chunks, rank_edge=self.rank_edge, cost=cost)

    def price(
        self, name: str, layout: Layout, balance: str, micro_batch_size: int, recompute: str
    ) -> Plan:
        """The plan of a choice."""
        speeds, count = self.speeds(micro_batch_size), self.batch // micro_batch_size
        schedule = Schedule(name, self.ranks, count, layout.chunks, exits=layout.exit_ranks)
        costs = speeds.costs(self.config, layout, recompute=recompute, exit_w=self.exit_w)
        memory = memory_of(
            self.config,
            layout,
            schedule,
            seq_length=self.seq_length,
            micro_batch_size=micro_batch_size,
            recompute=recompute,
            exit_w=self.exit_w,
            exact_ties=self.exact_ties,
            threads=self.threads,
        )
        choice = Choice(
            schedule=name,
            chunks=layout.chunks,
            balance=balance,
            split=layout.split,
            micro_batch_size=micro_batch_size,
            microbatches=count,
            recompute=recompute,
        )
        return Plan(
            choice=choice,
            simulation=schedule.simulate(costs),
            update=speeds.update(self.config, layout),
            memory=tuple(memory),
            limit=self.limit,
        )

    def plans(
        self,
        *,
        micro_batches: Sequence[int] | None = None,
        names: Sequence[str] = _NAMES,
        recompute: Sequence[str] = RECOMPUTE,
    ) -> list[Plan]:
        """All plans worth a look: those that fit first, then by time and memory."""
        sizes = divisors(self.batch) if micro_batches is None else list(micro_batches)
        for size in sizes:
            check_integer("micro_batch_size", size, 1, self.batch)
            if self.batch % size:
                raise invalid(
                    "micro_batch_size is invalid", f"a divisor of {self.batch}", Shown(size)
                )
        candidates = list(self._candidates(sizes, names, recompute))
        actions = sum(2 * self.ranks * c[1].chunks * (self.batch // c[3]) for c in candidates)
        if actions > _ACTIONS:
            candidates.sort(key=lambda c: self._guess(*c))
            candidates = candidates[: max(4, int(len(candidates) * _ACTIONS / actions))]
        found = [self.price(*each) for each in candidates]
        return sorted(found, key=lambda plan: (not plan.fits, plan.seconds, plan.peak))

    def _candidates(
        self, sizes: Sequence[int], names: Sequence[str], recompute: Sequence[str]
    ) -> Iterator[tuple[str, Layout, str, int, str]]:
        few = self.config.num_hidden_layers <= _MOST_LAYERS
        for size in sizes:
            for name in names:
                for chunks in self._chunks(name):
                    layouts: dict[tuple[int, ...], tuple[Layout, str]] = {}
                    for balance in BALANCE if few else BALANCE[:1]:
                        layout = self.layout(chunks, balance, size)
                        layouts.setdefault(layout.bounds, (layout, balance))
                    for layout, balance in layouts.values():
                        for mode in recompute:
                            yield name, layout, balance, size, mode

    def _chunks(self, name: str) -> list[int]:
        if self.ranks == 1:
            return [1] if name == "1f1b" else []
        if name != "interleaved":
            return [1]
        return [n for n in _CHUNKS if n * self.ranks <= self.config.num_hidden_layers]

    def _guess(self, name: str, layout: Layout, balance: str, size: int, mode: str) -> float:
        """About how long a step takes, from closed forms."""
        costs = self.speeds(size).costs(self.config, layout, recompute=mode, exit_w=self.exit_w)
        ranks = (costs.forward + costs.backward).reshape(layout.chunks, self.ranks).sum(axis=0)
        ends = (self.ranks - 1) / layout.chunks * float(ranks.mean())
        return self.batch // size * float(ranks.max()) + ends * (0.5 if "zero" in name else 1.0)
