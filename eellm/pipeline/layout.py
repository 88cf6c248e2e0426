"""Which layers and exits of a model each chunk of a pipeline holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eellm.config import ModelConfig
from eellm.errors import Shown, check_integer, check_one_of, invalid

RANK_EDGES = ("later", "earlier")

# Cost of the layers [first, last) with exits, as a chunk of that number.
ChunkCost = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Layout:
    """Chunk g of ranks x chunks lies on rank g % ranks, as its chunk g // ranks.

    bounds: chunk g holds the layers bounds[g] + 1 to bounds[g + 1]. exits: for each chunk the
    indexes of its early exits.
    """

    ranks: int
    chunks: int
    bounds: tuple[int, ...]
    exits: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        ranks: int,
        chunks: int = 1,
        *,
        split: Sequence[int] | None = None,
        rank_edge: str = "later",
        cost: ChunkCost | None = None,
    ) -> Layout:
        """The layout of a model.

        split: layers of each chunk, in the order of the model; None for equal shares, or with
        `cost` for the largest chunk to be as cheap as can be. rank_edge: whether an exit between
        two chunks belongs to the later or the earlier one.
        """
        check_integer("ranks", ranks, 1, 1 << 16)
        check_integer("chunks", chunks, 1, 1024)
        check_one_of("rank_edge", rank_edge, RANK_EDGES)
        layers, parts = config.num_hidden_layers, ranks * chunks
        if parts > layers:
            raise invalid(
                f"{layers} layers cannot be split",
                f"at least {parts} layers for {ranks} ranks with {chunks} chunks",
                layers,
                "use fewer ranks or chunks",
            )
        if split is not None:
            bounds = _bounds_of(split, layers, parts)
        elif cost is None:
            bounds = tuple(-(-i * layers // parts) for i in range(parts + 1))
        else:
            bounds = _cheapest(layers, parts, cost)
        return cls(ranks, chunks, bounds, _place_exits(config, bounds, rank_edge))

    def rank_of(self, chunk: int) -> int:
        """The rank of a chunk of the model."""
        return chunk % self.ranks

    @property
    def split(self) -> tuple[int, ...]:
        """Layers of each chunk, in the order of the model."""
        return tuple(int(x) for x in np.diff(self.bounds))

    @property
    def exit_ranks(self) -> tuple[int, ...]:
        """Ranks that hold early exits."""
        return tuple(sorted({self.rank_of(g) for g, found in enumerate(self.exits) if found}))


def exits_within(config: ModelConfig, first: int, last: int, rank_edge: str) -> tuple[int, ...]:
    """Early exits of a chunk with the layers first + 1 to last."""
    low, high = 2 * first, 2 * last
    start, end = first == 0, last == config.num_hidden_layers
    later = rank_edge == "later"
    found = []
    for i, each in enumerate(config.exits):
        inside = low < each.depth < high
        at_start = each.depth == low and (later or start)
        at_end = each.depth == high and (not later or end)
        if inside or at_start or at_end:
            found.append(i)
    return tuple(found)


def _place_exits(
    config: ModelConfig, bounds: Sequence[int], rank_edge: str
) -> tuple[tuple[int, ...], ...]:
    pairs = pairwise(bounds)
    return tuple(exits_within(config, first, last, rank_edge) for first, last in pairs)


def _bounds_of(split: Sequence[int], layers: int, parts: int) -> tuple[int, ...]:
    for count in split:
        check_integer("layers of a chunk", count, 1, layers)
    if len(split) != parts or sum(split) != layers:
        raise invalid(
            "split is invalid",
            f"{parts} numbers that add up to {layers} layers",
            Shown(f"{', '.join(map(str, split))}: {len(split)} that add up to {sum(split)}"),
        )
    return (0, *(int(x) for x in np.cumsum(split)))


def _cheapest(layers: int, parts: int, cost: ChunkCost) -> tuple[int, ...]:
    """Bounds whose largest chunk is as cheap as can be; dynamic programming over the chunks."""
    inner = np.full((layers + 1, layers + 1), np.inf)
    for first in range(layers):
        for last in range(first + 1, layers + 1):
            inner[first, last] = cost(first, last, 1)
    best = np.full(layers + 1, np.inf)
    best[0] = 0.0
    choices = []
    for _ in range(parts):
        worst = np.maximum(best[:, None], inner)
        choices.append(worst.argmin(axis=0))
        best = worst.min(axis=0)
    bounds = [layers]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    return tuple(reversed(bounds))
