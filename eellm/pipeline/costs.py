"""What the actions of a pipeline cost: time and bytes of each chunk of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, check_integer, check_one_of, invalid
from eellm.pipeline.layout import Layout, exits_within

if TYPE_CHECKING:
    from eellm.config import ModelConfig
    from eellm.pipeline.schedule import Schedule

Floats = npt.NDArray[np.float64]
_OF_CHUNKS = (
    "forward",
    "backward",
    "backward_input",
    "backward_weight",
    "kept_bytes",
    "queued_bytes",
    "transient_bytes",
    "exit_time",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
    """Costs of each chunk of the model [ranks x chunks], in its order, in any unit of time.

    backward is both parts in one, backward_input and backward_weight those of zero-bubble
    schedules; early exits run in backward and backward_input, forward and all. kept_bytes: what a
    microbatch keeps from its forward to its backward or backward_input, queued_bytes: from there to
    its backward_weight; transient_bytes: while a backward runs; static_bytes [ranks]: weights,
    gradients, moments. message: from the end of an action to the
    start of what needs its result on another rank. exit_time: the part of a backward that is the
    early exits', for pictures.
    """

    ranks: int
    chunks: int
    forward: Floats
    backward: Floats
    backward_input: Floats
    backward_weight: Floats
    kept_bytes: Floats
    transient_bytes: Floats
    static_bytes: Floats
    queued_bytes: Floats = field(default_factory=lambda: np.zeros(1))
    message: float = 0.0
    exit_time: Floats = field(default_factory=lambda: np.zeros(1))
    layout: Layout | None = None

    def __post_init__(self) -> None:
        check_integer("ranks", self.ranks, 1, 1 << 16)
        check_integer("chunks", self.chunks, 1, 1024)
        parts = self.ranks * self.chunks
        for name in (*_OF_CHUNKS, "static_bytes"):
            count = self.ranks if name == "static_bytes" else parts
            object.__setattr__(self, name, numbers(name, getattr(self, name), count))
        object.__setattr__(self, "message", float(numbers("message", self.message, 1)[0]))

    def to_core(self) -> dict[str, Any]:
        """The fields of struct ee_walk_costs (csrc/train/walk.h)."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _OF_CHUNKS[:-1]}
        return values | {"static_bytes": self.static_bytes, "message": self.message}

    def check_fits(self, schedule: Schedule) -> None:
        """Raises ValueError unless these are costs of as many ranks and chunks."""
        mine, wanted = (self.ranks, self.chunks), (schedule.ranks, schedule.chunks)
        if mine != wanted:
            raise invalid(
                "costs do not fit the schedule",
                f"{wanted[0]} ranks with {wanted[1]} chunks",
                Shown(f"{mine[0]} with {mine[1]}"),
                "make costs for the same ranks and chunks",
            )

    @classmethod
    def uniform(
        cls,
        ranks: int,
        chunks: int = 1,
        forward: float = 1.0,
        backward: float = 2.0,
        *,
        backward_weight: float | None = None,
        message: float = 0.0,
        exits: Iterable[int] = (),
        exit: tuple[float, float] = (0.1, 0.2),
        head: tuple[float, float] = (0.0, 0.0),
        embedding: tuple[float, float] = (0.0, 0.0),
        kept_bytes: float = 1.0,
        queued_bytes: float = 0.0,
        exit_bytes: float = 0.0,
        head_bytes: float = 0.0,
        embedding_bytes: float = 0.0,
        static_bytes: float = 0.0,
    ) -> Costs:
        """Equal layers everywhere: forward and backward are those of a rank, over all its chunks.

        backward_weight: of `backward`, half of it unless set. exits: the chunk of each early exit,
        counted in the order of the model (with one chunk a rank: its rank). exit, head, embedding:
        forward and backward of an early exit, of the final one on the last chunk, of the embedding
        on the first. exit_bytes and head_bytes are transient, embedding_bytes and kept_bytes kept
        by each microbatch.
        """
        check_integer("ranks", ranks, 1, 1 << 16)
        check_integer("chunks", chunks, 1, 1024)
        weight = backward / 2 if backward_weight is None else backward_weight
        if not 0 <= weight <= backward:
            raise invalid("backward_weight is invalid", f"0 to backward = {backward:g}", weight)
        parts = ranks * chunks
        counts = np.zeros(parts)
        for each in exits:
            check_integer("the chunk of an exit", each, 0, parts - 1, "chunks count from 0")
            counts[each] += 1
        first, last = np.zeros(parts), np.zeros(parts)
        first[0] = last[-1] = 1.0
        of_exits = counts * sum(exit)
        heads = of_exits + last * sum(head)
        ahead, behind = first * embedding[0], first * embedding[1]
        return cls(
            ranks=ranks,
            chunks=chunks,
            forward=forward / chunks + ahead,
            backward=backward / chunks + heads + behind,
            backward_input=(backward - weight) / chunks + heads,
            backward_weight=weight / chunks + behind,
            kept_bytes=kept_bytes / chunks + first * embedding_bytes,
            queued_bytes=np.full(parts, queued_bytes / chunks),
            transient_bytes=counts * exit_bytes + last * head_bytes,
            static_bytes=np.full(ranks, float(static_bytes)),
            message=message,
            exit_time=of_exits,
        )

    @classmethod
    def of_model(
        cls,
        config: ModelConfig,
        ranks: int,
        chunks: int = 1,
        *,
        seq_length: int,
        micro_batch_size: int = 1,
        split: Sequence[int] | str | None = None,
        rank_edge: str = "later",
        recompute: str = "none",
        exit_w: str = "fused",
        exit_step: str = "backward",
        rates: Rates | None = None,
    ) -> Costs:
        """Costs of a model, from the operations and bytes of its layers and exits.

        split: layers of each chunk, None for equal shares, "cost" for shares of equal time.
        rank_edge: whether an exit between two ranks belongs to the "later" or the "earlier" one.
        recompute: activations that the backward computes again: "none", "attention", "full".
        exit_w: weight gradients of exits in the input part ("fused") or in the weight part, with
        their logits computed again ("deferred"). exit_step: "backward", or "forward" for early
        exits that keep their logits from the forward on, as naive implementations do.
        """
        check_integer("seq_length", seq_length, 1, 1 << 24)
        check_integer("micro_batch_size", micro_batch_size, 1, 1 << 24)
        check_one_of("recompute", recompute, ("none", "attention", "full"))
        check_one_of("exit_w", exit_w, ("fused", "deferred"))
        check_one_of("exit_step", exit_step, ("backward", "forward"))
        from eellm.pipeline.operations import Operations

        model = Operations(
            config,
            micro_batch_size * seq_length,
            seq_length,
            recompute,
            exit_w == "deferred",
            exit_step == "forward",
            rates or Rates(),
        )
        cost = None
        if isinstance(split, str):
            check_one_of("split", split, ("cost",))

            def cost(first: int, last: int, chunk: int) -> float:
                exits = exits_within(config, first, last, rank_edge)
                return float(sum(model.work(first, last, exits)[:3]))

            split = None
        layout = Layout.of(config, ranks, chunks, split=split, rank_edge=rank_edge, cost=cost)
        return model.costs(layout)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a rank can do, and how many bytes things take.

    flops: operations of matrix products a second. bandwidth: bytes a second from one rank to
    another, None if messages take no time; latency: seconds more. parameter_bytes: weight,
    gradient and moments of a parameter; 16 in float32. activation_bytes: a layer's, for each token
    and channel; None for what this package keeps. logit_bytes: None for logits in chunks of rows as
    this package has them, else the bytes of a logit kept from an exit's forward on, and those more
    while its backward runs. element_bytes: of a message's element.
    """

    flops: float = 1e11
    bandwidth: float | None = None
    latency: float = 0.0
    parameter_bytes: float = 16.0
    activation_bytes: float | None = None
    logit_bytes: tuple[float, float] | None = None
    element_bytes: float = 4.0

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise invalid(f"{name} is invalid", "a number above 0", value)


def numbers(name: str, values: Any, count: int) -> Floats:
    """A read-only array of `count` finite numbers of at least 0."""
    try:
        array = np.array(values, np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise invalid(f"{name} is invalid", f"{count} numbers", values) from None
    if array.size == 1 and count > 1:
        array = np.repeat(array, count)
    if array.size != count:
        raise invalid(f"{name} has the wrong length", str(count), array.size)
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if len(wrong):
        raise invalid(f"{name} is invalid", "numbers of at least 0", float(array[wrong[0]]))
    array.setflags(write=False)
    return array


def upper_bound(
    microbatches: int,
    layers: float,
    exits: npt.ArrayLike,
    *,
    head: float = 0.0,
    embedding: float = 0.0,
) -> float:
    """A step of 1f1b with exits takes at most that long (EE-LLM, appendix A.3).

    layers: forward and backward of a rank's layers together. exits [P], head, embedding: the same
    of the early exits on each rank, of the final exit and of the embedding.
    """
    early = np.array(exits, np.float64)
    each = layers + early
    each[0] += embedding
    each[-1] += head
    start = embedding + (len(each) - 1) * layers + float(early[:-1].sum())
    return start + microbatches * float(each.max())
