"""How long the parts of a model take on this machine: estimated from operations and bytes, or
measured with the training step itself."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm import _core
from eellm.errors import check_integer
from eellm.pipeline.costs import Costs, Rates
from eellm.pipeline.layout import exits_within
from eellm.pipeline.operations import Operations
from eellm.pipeline.schedule import ACTION as ACTION_TYPE
from eellm.pipeline.schedule import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    KEEPS,
    Schedule,
)
from eellm.pipeline.trace import ACTION, END, KIND, START, WHAT

if TYPE_CHECKING:
    from eellm._core import Comm
    from eellm.config import ModelConfig
    from eellm.pipeline.layout import ChunkCost, Layout
    from eellm.pipeline.schedule import Actions

Floats = npt.NDArray[np.float64]

_FLOAT = 4
# AdamW reads weight, gradient and two moments and writes them again, the norm reads the gradient.
_UPDATE_BYTES = 9 * _FLOAT
_SMALL_VOCABULARY = 32
_LAYERS = (1, 3)  # of the two models whose difference tells what a layer takes
_MICROBATCHES = 4
# Of messages, where they cannot be measured.
_LATENCY, _BANDWIDTH = 5e-5, 5e9


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds that a rank needs, for microbatches of one size.

    A layer: its forward, backward, and the backward's two parts where a schedule splits it. head:
    norm, output matrix and loss of an exit, both ways. embedding: its forward and backward.
    parameter: update of one, its share of the gradient norm included. latency, bandwidth: of
    messages, and bytes a second.
    """

    micro_batch_size: int
    seq_length: int
    forward: float
    backward: float
    backward_input: float
    backward_weight: float
    head: float
    embedding: tuple[float, float]
    parameter: float
    latency: float
    bandwidth: float
    measured: bool = False

    @property
    def rows(self) -> int:
        """Tokens of a microbatch."""
        return self.micro_batch_size * self.seq_length

    def message(self, config: ModelConfig) -> float:
        """Seconds of a message between ranks."""
        return self.latency + _FLOAT * self.rows * config.hidden_size / self.bandwidth

    def costs(
        self,
        config: ModelConfig,
        layout: Layout,
        *,
        recompute: str = "none",
        exit_w: str = "fused",
    ) -> Costs:
        """What the actions of a layout take."""
        count = layout.ranks * layout.chunks
        chunks = _Chunks(self, config, recompute, exit_w == "deferred")
        bounds = layout.bounds
        parts = [chunks.times(bounds[g], bounds[g + 1], layout.exits[g]) for g in range(count)]
        times = np.array(parts)
        none = np.zeros(1)
        return Costs(
            ranks=layout.ranks,
            chunks=layout.chunks,
            forward=times[:, 0],
            backward=times[:, 1],
            backward_input=times[:, 2],
            backward_weight=times[:, 3],
            kept_bytes=none,
            transient_bytes=none,
            static_bytes=none,
            message=self.message(config),
            exit_time=times[:, 4],
            layout=layout,
        )

    def chunk_cost(self, config: ModelConfig, rank_edge: str = "later") -> ChunkCost:
        """What forward and backward of a chunk take, for a split of equal time."""
        chunks = _Chunks(self, config, "none", False)

        def cost(first: int, last: int, chunk: int) -> float:
            found = chunks.times(first, last, exits_within(config, first, last, rank_edge))
            return found[0] + found[1]

        return cost

    def update(self, config: ModelConfig, layout: Layout) -> float:
        """Seconds of a step that are no actions: sums of tied gradients, norm and update."""
        work = Operations(config, self.rows, self.seq_length, "none", False, False, Rates())
        seconds = float(work.parameters(layout).max()) * self.parameter
        size = _FLOAT * config.vocab_size * config.hidden_size
        for ranks in _tied_ranks(work, layout):
            seconds += (ranks - 1) * 2 * (self.latency + size / self.bandwidth)
        return seconds


class _Chunks:
    """Times of any chunk of a model."""

    def __init__(self, speeds: Speeds, config: ModelConfig, recompute: str, deferred: bool) -> None:
        self.speeds, self.config, self.deferred = speeds, config, deferred
        self.work = work = Operations(
            config, speeds.rows, speeds.seq_length, recompute, deferred, False, Rates()
        )
        layers = range(config.num_hidden_layers)
        blocks = np.array([work.block(i) for i in layers])
        # Windows of attention may differ: shares of a layer as they are on average.
        usual = blocks.mean(axis=0)
        again = np.array([work.again(i) for i in layers]) / usual[0] * speeds.forward
        self.layers = np.append(0.0, np.cumsum(blocks.sum(axis=1) / usual.sum()))
        self.again = np.append(0.0, np.cumsum(again))
        self.mlp = 6.0 * speeds.rows * work.mlp_size / float(usual.sum())

    def times(self, first: int, last: int, exits: Sequence[int]) -> tuple[float, ...]:
        """Forward, backward, its two parts; early exits' share of it."""
        s, config = self.speeds, self.config
        layers = float(self.layers[last] - self.layers[first])
        again = float(self.again[last] - self.again[first])
        branches = sum(self._branch(config.exits[i].branch) for i in exits)
        early = len(exits) * s.head
        heads = early + (s.head if last == config.num_hidden_layers else 0.0)
        ahead, behind = s.embedding if first == 0 else (0.0, 0.0)
        # Logits that are computed again, and the weights' product, go to the weight part.
        now = later = 2 / 3 * heads
        if not self.deferred:
            now, later = heads, 0.0
        return (
            layers * s.forward + ahead,
            layers * s.backward + again + heads + branches + behind,
            layers * s.backward_input + again + now + branches + behind,
            layers * s.backward_weight + later,
            early + branches,
        )

    def _branch(self, branch: str | None) -> float:
        """Both ways of an exit's branch."""
        layer = self.speeds.forward + self.speeds.backward
        if branch == "mlp":
            return layer * self.mlp
        return layer if branch == "block" else 0.0


def _usual_layer(work: Operations) -> np.ndarray:
    """Operations of a layer on average: windows of attention may differ."""
    layers = range(work.config.num_hidden_layers)
    return np.mean([work.block(i) for i in layers], axis=0)


def _tied_ranks(work: Operations, layout: Layout) -> list[int]:
    """For each matrix that is used on several ranks, on how many."""
    config = work.config
    tied: dict[Any, set[int]] = {}
    tied.setdefault("embedding", set()).add(0)
    last = "embedding" if config.tie_word_embeddings else "final"
    tied.setdefault(last, set()).add(layout.ranks - 1)
    for g, exits in enumerate(layout.exits):
        for i in exits:
            tied.setdefault(work.matrix_of(i), set()).add(layout.rank_of(g))
    return [len(ranks) for ranks in tied.values() if len(ranks) > 1]


def estimate(
    config: ModelConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    flops: float = 1e11,
    memory_bandwidth: float = 1e10,
    bandwidth: float = _BANDWIDTH,
    latency: float = _LATENCY,
) -> Speeds:
    """From operations and bytes. flops: of matrix products a second, of a rank; memory_bandwidth:
    bytes a second; bandwidth, latency: of messages."""
    rows = micro_batch_size * seq_length
    work = Operations(config, rows, seq_length, "none", False, False, Rates())
    forward, of_input, of_weights = (float(x) / flops for x in _usual_layer(work))
    hidden = _FLOAT * rows * config.hidden_size
    return Speeds(
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        forward=forward,
        backward=of_input + of_weights,
        backward_input=of_input,
        backward_weight=of_weights,
        head=float(work.head(None, 0).sum()) / flops,
        embedding=(2 * hidden / memory_bandwidth, 3 * hidden / memory_bandwidth),
        parameter=_UPDATE_BYTES / memory_bandwidth,
        latency=latency,
        bandwidth=bandwidth,
    )


# -- Measured -----------------------------------------------------------------------------------


def measure(
    config: ModelConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    together: int = 2,
    threads: int = 1,
    steps: int = 3,
    comm: Comm | None = None,
) -> Speeds:
    """Times small models of the same width with the training step.

    `together` ranks do so at the same time, as threads: ranks share this machine's memory, and may
    share its cores. comm: the ranks of a job, who do it in their place; a collective.
    """
    check_integer("together", together, 1, 1024)
    if comm is not None:
        own = _Run(comm, seq_length, micro_batch_size, threads, steps)
        return _speeds(own, own.gathered(config))
    from eellm.parallel import run_local

    def work(group: Any) -> Speeds:
        return measure(
            config,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            threads=threads,
            steps=steps,
            comm=group.comm,
        )

    return run_local(together, work)[0]


def _speeds(run: _Run, found: Floats) -> Speeds:
    """From the times of the three models, [3, 5], and of messages."""
    few, more, whole = found[:15].reshape(3, 5)
    latency, bandwidth = (float(x) for x in found[15:])
    layer = np.maximum((more - few) / (_LAYERS[1] - _LAYERS[0]), 1e-9)
    rest = np.maximum(few - _LAYERS[0] * layer, 0.0)
    # The head is in a backward, or in its input part.
    head = max(float(whole[1] - few[1] + whole[2] - few[2]) / 2, 1e-9)
    return Speeds(
        micro_batch_size=run.micro_batch_size,
        seq_length=run.seq_length,
        forward=float(layer[0]),
        backward=float(layer[1]),
        backward_input=float(layer[2]),
        backward_weight=float(layer[3]),
        head=head,
        embedding=(float(rest[0]), float(rest[1])),
        parameter=float(whole[4]),
        latency=latency,
        bandwidth=bandwidth,
        measured=True,
    )


def _part(config: ModelConfig, layers: int, vocab: int) -> ModelConfig:
    """A model of few layers of the same kind."""
    kinds = config.layer_types
    return replace(
        config,
        model_type="eellm",
        num_hidden_layers=layers,
        vocab_size=vocab,
        layer_types=None if kinds is None else kinds[:layers],
        bos_token_id=None,
        eos_token_id=None,
        exits=(),
    )


@dataclass(frozen=True)
class _Run:
    """Steps of one rank while the others of `comm` take the same."""

    comm: Comm
    seq_length: int
    micro_batch_size: int
    threads: int
    steps: int

    @property
    def rows(self) -> int:
        return self.micro_batch_size * self.seq_length

    def gathered(self, config: ModelConfig) -> Floats:
        """The times of the three models and of messages, on average over the ranks."""
        models = [_Timed(self, _part(config, layers, _SMALL_VOCABULARY)) for layers in _LAYERS]
        models.append(_Timed(self, _part(config, _LAYERS[0], config.vocab_size)))
        # In turns, so that a busy moment of the machine touches all of them.
        for step in range(1 + self.steps):
            for model in models:
                self.comm.barrier("a measured step")
                model.step(keep=step > 0)
        messages = _messages(self.comm, _FLOAT * self.rows * config.hidden_size)
        mine = np.array([x for model in models for x in model.times()] + list(messages))
        everyone = self.comm.all_gather(mine.tobytes())
        mean = np.mean([np.frombuffer(each) for each in everyone], axis=0)
        # Ranks 0 and 1 have measured the messages.
        mean[15:] = np.frombuffer(everyone[0])[15:]
        return mean


class _Timed:
    """A model whose steps are timed, action by action. Every second microbatch has its backward
    in two parts."""

    def __init__(self, run: _Run, config: ModelConfig) -> None:
        self.run, self.config = run, config
        model = _core.Model(config.to_core(), threads=run.threads)
        model.initialize(0.02, 1)
        schedule = Schedule("zero_bubble", 1, _MICROBATCHES, lists=[_mixed_list()])
        self.trainer = _core.Trainer(
            model, rows=run.rows, schedule=schedule.spec, lists=schedule.lists_for_core
        )
        self.trainer.record(64 * _MICROBATCHES)
        self.durations: dict[int, list[float]] = {}
        self.outside: list[float] = []

    def step(self, keep: bool) -> None:
        """One step; keep: it counts."""
        run, count = self.run, _MICROBATCHES
        vocab, shape = self.config.vocab_size, (count, run.rows)
        tokens = np.random.default_rng(0).integers(0, vocab, shape, dtype=np.int32)
        ends = np.arange(0, run.rows + 1, run.seq_length, dtype=np.int32)
        positions = np.tile(np.arange(run.seq_length, dtype=np.int32), run.micro_batch_size)
        start = time.perf_counter()
        self.trainer.step(
            tokens,
            tokens[:, ::-1].copy(),
            np.tile(positions, (count, 1)),
            np.zeros(shape, np.uint64),
            np.tile(ends, count),
            np.full(count, run.micro_batch_size, np.int32),
            exit_weights=[],
            learning_rate=1e-4,
            clip=1.0,
        )
        seconds = time.perf_counter() - start
        events = self.trainer.recorded()
        if not keep:
            return
        actions = events[events[:, KIND] == ACTION]
        self.outside.append(seconds - float(np.ptp(actions[:, [START, END]])))
        for event in actions:
            self.durations.setdefault(int(event[WHAT]), []).append(event[END] - event[START])

    def times(self) -> list[float]:
        """Median seconds of a forward, a backward and its two parts; seconds of the step that are
        no actions, for each parameter."""
        count = self.trainer.memory["parameters"] / _FLOAT
        kinds = [float(np.median(self.durations[kind])) for kind in range(4)]
        return [*kinds, float(np.median(self.outside)) / count]


def _mixed_list() -> Actions:
    actions = []
    for m in range(_MICROBATCHES):
        actions.append((FORWARD, KEEPS, 0, m))
        if m % 2:
            actions += [(BACKWARD_INPUT, 0, 0, m), (BACKWARD_WEIGHT, 0, 0, m)]
        else:
            actions.append((BACKWARD, 0, 0, m))
    return np.array(actions, ACTION_TYPE)


def _messages(comm: Comm, size: int) -> tuple[float, float]:
    """Latency and bytes a second of messages from rank 0 to rank 1 and back."""
    if comm.size == 1:
        return _LATENCY, _BANDWIDTH
    seconds = []
    for count in (2, max(size // _FLOAT, 1 << 16)):
        out, back = np.zeros(count, np.float32), np.zeros(count, np.float32)
        trips = []
        comm.barrier("messages to measure")
        for _ in range(9):
            start = time.perf_counter()
            if comm.rank == 0:
                comm.exchange([(1, 0, out)], [])
                comm.exchange([], [(1, 1, back)])
            elif comm.rank == 1:
                comm.exchange([], [(0, 0, back)])
                comm.exchange([(0, 1, out)], [])
            trips.append((time.perf_counter() - start) / 2)
        seconds.append(float(np.median(trips)))
    latency = seconds[0]
    return latency, _FLOAT * count / max(seconds[1] - latency, 1e-9)


def ranks_at_a_time(ranks: int, threads: int) -> int:
    """How many ranks run on this machine beside each other."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(ranks, cores // max(1, threads)))
