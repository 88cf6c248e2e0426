"""What a rank allocates, from the sizes of the model and the lists of the schedule."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from eellm import _core
from eellm.pipeline.costs import Rates
from eellm.pipeline.operations import Operations
from eellm.pipeline.schedule import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    KEEPS,
    RECEIVES,
    SENDS,
)

if TYPE_CHECKING:
    from eellm.config import ModelConfig
    from eellm.pipeline.layout import Layout
    from eellm.pipeline.schedule import Actions, Schedule

_FLOAT = 4
# csrc/model/exit.h, kernels/cpu/matmul.c, csrc/ops/ctx.c
_LOGIT_BYTES = 96 << 20
_DEPTH_BLOCK, _SHARED_BYTES, _PRIVATE_BYTES = 768, 8 << 20, 512 << 10
_SCRATCH_AT_START = 1 << 20
_INPUT_BUFFERS, _MORE_GRADIENTS = 2, 2  # csrc/train/runner.c


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank, by purpose as `Trainer.memory` has them."""

    parameters: int
    gradients: int
    moments: int
    activations: int
    scratch: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


def memory_of(
    config: ModelConfig,
    layout: Layout,
    schedule: Schedule,
    *,
    seq_length: int,
    micro_batch_size: int = 1,
    recompute: str = "none",
    exit_w: str = "fused",
    exact_ties: bool = False,
    threads: int = 1,
) -> list[RankMemory]:
    """What each rank allocates in training."""
    rows = micro_batch_size * seq_length
    sizes = Operations(config, rows, seq_length, recompute, exit_w == "deferred", False, Rates())
    weights = sizes.parameters(layout)
    further = _further_uses(sizes, layout) if exact_ties else np.zeros(layout.ranks)
    buffers = _core.schedule_buffers(schedule.spec, schedule.lists_for_core)
    found = []
    for rank in range(layout.ranks):
        scratch = _scratch(sizes, layout, rank, threads)
        found.append(
            RankMemory(
                parameters=_FLOAT * int(weights[rank]),
                gradients=_FLOAT * int(weights[rank] + further[rank]),
                moments=2 * _FLOAT * int(weights[rank]),
                activations=_activations(sizes, layout, rank, schedule.actions(rank), buffers),
                scratch=max(_SCRATCH_AT_START, int(scratch * 9 / 8)),
            )
        )
    return found


def _further_uses(sizes: Operations, layout: Layout) -> np.ndarray:
    """Elements of further uses of shared matrices and norms on each rank."""
    config = sizes.config
    counts = np.zeros(layout.ranks)
    matrix = config.vocab_size * config.hidden_size
    used: list[set[object]] = [set() for _ in range(layout.ranks)]

    def use(rank: int, what: object, size: int) -> None:
        if what in used[rank]:
            counts[rank] += size
        used[rank].add(what)

    use(0, "embedding", matrix)
    last = layout.ranks - 1
    for g, exits in enumerate(layout.exits):
        for i in exits:
            use(layout.rank_of(g), sizes.matrix_of(i), matrix)
            if config.exits[i].norm == "final":
                use(layout.rank_of(g), "norm", sizes.norm_size)
    use(last, "embedding" if config.tie_word_embeddings else "final", matrix)
    use(last, "norm", sizes.norm_size)
    return counts


# -- Activations --------------------------------------------------------------------------------


def _activations(
    sizes: Operations, layout: Layout, rank: int, actions: Actions, buffers: int
) -> int:
    """Slots, operands that were put off, and buffers of messages."""
    total = float(
        _message_buffers(actions, buffers) * _FLOAT * sizes.rows * sizes.config.hidden_size
    )
    for chunk in range(layout.chunks):
        g = chunk * layout.ranks + rank
        mine = actions[actions["chunk"] == chunk]
        first, last = layout.bounds[g], layout.bounds[g + 1]
        slots, queues = places_of(mine)
        total += slots * sizes.kept_bytes(first, last, layout.exits[g])
        total += queues * sizes.queued_bytes(first, last, layout.exits[g])
        if sizes.recompute != "none":
            total += _FLOAT * sizes.rows * (sizes.layer_floats() - sizes.kept_floats())
    return int(total)


def places_of(actions: Actions) -> tuple[int, int]:
    """Slots of activations, and queues of weight gradients, that the list of a chunk needs."""
    kind = actions["kind"]
    keeps = (kind == FORWARD) & (actions["flags"] & KEEPS > 0)
    frees = (kind == BACKWARD) | (kind == BACKWARD_INPUT)
    slots = _most(keeps.astype(np.int64) - frees)
    # A forward whose activations nobody needs has a slot of its own.
    slots += bool(((kind == FORWARD) & ~keeps).any())
    queues = _most((kind == BACKWARD_INPUT).astype(np.int64) - (kind == BACKWARD_WEIGHT))
    return max(slots, 1), queues


def _most(changes: np.ndarray) -> int:
    return int(np.cumsum(changes).max(initial=0))


def _message_buffers(actions: Actions, buffers: int) -> int:
    """As csrc/train/runner.c counts them."""
    forward, flags = actions["kind"] == FORWARD, actions["flags"]
    receives, sends = flags & RECEIVES > 0, flags & SENDS > 0
    inputs = _INPUT_BUFFERS if (forward & receives).any() else 0
    if (~forward & sends).any():
        return inputs + buffers + _MORE_GRADIENTS
    return inputs + (2 if (~forward & receives).any() else 1)


# -- Scratch ------------------------------------------------------------------------------------


def _scratch(sizes: Operations, layout: Layout, rank: int, threads: int) -> float:
    """The most that is in use at a time."""
    c, rows = sizes.config, sizes.rows
    chunks = range(rank, layout.ranks * layout.chunks, layout.ranks)
    exits = [i for g in chunks for i in layout.exits[g]]
    final = layout.ranks * layout.chunks - 1 in chunks
    needs = [_layer_scratch(sizes, threads)]
    if exits or final:
        head = _head_scratch(sizes, threads)
        width = 4.0 * rows * c.hidden_size
        for i in exits:
            branch = c.exits[i].branch
            if branch == "mlp":
                up = c.intermediate_size * (2 if c.gated else 1)
                own = 4.0 * width + _FLOAT * rows * (up + 2)
                active = _FLOAT * rows * c.intermediate_size + _product(sizes, threads)
                needs.append(own + max(head, active))
            elif branch == "block":
                own = _FLOAT * rows * float(sizes.layer_floats()) + 2 * width
                needs.append(own + max(head, needs[0]))
            else:
                needs.append(head)
        needs.append(head)
    return max(needs)


def _layer_scratch(sizes: Operations, threads: int) -> float:
    """Of the backward of a layer."""
    c, rows = sizes.config, sizes.rows
    width, product = float(_FLOAT * rows * c.hidden_size), _product(sizes, threads)
    # A split backward has some of it in its queue.
    mlp = 2 * width + _FLOAT * rows * c.intermediate_size + product
    qkv = sizes.q_width + sizes.kv_width
    attention = 2 * width + _FLOAT * rows * (qkv + sizes.q_width)
    padded = -(-c.head_dim // 16) * 16
    length = -(-sizes.seq_length // 64) * 64
    own = _FLOAT * length * (6 * padded + 2 * c.head_dim + 2) * threads
    return max(mlp, attention + max(own, product))


def _head_scratch(sizes: Operations, threads: int) -> float:
    """Of norm, output matrix and loss over chunks of rows."""
    c = sizes.config
    most = max(1, _LOGIT_BYTES // (_FLOAT * c.vocab_size))
    pieces = -(-sizes.rows // most)
    rows = -(-sizes.rows // pieces)
    product = _panels(c.vocab_size, rows, c.hidden_size, threads)
    return float(_FLOAT * rows * (c.vocab_size + 2 * c.hidden_size + 5)) + product


def _product(sizes: Operations, threads: int) -> float:
    c = sizes.config
    return _panels(c.intermediate_size, sizes.rows, c.hidden_size, threads)


def _panels(one: int, other: int, depth: int, threads: int) -> float:
    """Packed panels of a product; the side with fewer rows is shared."""
    depth = min(depth, _DEPTH_BLOCK)
    shared = min(_FLOAT * min(one, other) * depth, _SHARED_BYTES)
    return float(shared * (1 if threads == 1 else 2) + _PRIVATE_BYTES * threads)
