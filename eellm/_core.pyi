"""The native core. Thin: no defaults that a config knows better, no work per token in Python.

Arrays go in and out without copies: inputs must be C-contiguous and of the stated dtype, else
`ValueError` says what to convert. Calls release the GIL; a handle that is in use raises `Error`
when a second thread calls it. Messages of errors say what was wrong, what was expected, what to do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

class Error(RuntimeError):
    """A failure of the core that is none of Python's own kinds."""

class NonFiniteError(Error):
    """NaN or infinity in a loss, a gradient or in logits."""

class BusyError(Error):
    """No room for another sequence now, or a handle that another call is using."""

class CommError(Error):
    """A failed or overdue exchange between ranks."""

class ParameterRow(TypedDict):
    """A row of the parameter table (csrc/model/params.h)."""

    name: str
    shape: tuple[int, ...]
    offset: int
    held: bool
    owned: bool
    decay: bool
    frozen: bool
    tied: bool
    layer: int
    exit: int
    source: str
    source_row: int
    source_rows: int
    transposed: bool

class Tensor:
    """A view of memory of the core, [rows, cols] or [n], float32 or bfloat16.

    Supports the buffer protocol (float32), DLPack, and `np.asarray(tensor)`, all without a copy;
    the view keeps its owner alive.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Model:
    """A model's config, parameters and threads.

    config: the fields of struct ee_config (csrc/model/config.h), made by
    `eellm.config.ModelConfig.to_core()`. threads: 0 takes all that the process may use. isa:
    "plain", "avx2", "avx512", or "" for the best one. weights=False: without parameters in memory,
    for an Engine made with empty=True; `parameter`, `initialize`, `forward` and Trainer refuse.
    part: (ranks, chunks, rank, bounds int32 [ranks chunks + 1] or None, earlier_edge, exact_ties),
    the part of a rank in a pipeline (csrc/model/layout.h); None: the whole model.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        threads: int = 0,
        isa: str = "",
        weights: bool = True,
        part: tuple[int, int, int, npt.NDArray[np.int32] | None, bool, bool] | None = None,
    ) -> None: ...
    @property
    def table(self) -> list[ParameterRow]: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def parameter(self, name: str, /) -> Tensor:
        """The parameter, to be read and written in place. KeyError if there is none."""

    def initialize(self, initializer_range: float, seed: int, /) -> None:
        """Draws initial values: a function of (seed, name, element) alone."""

    def initialize_parameter(self, name: str, initializer_range: float, seed: int, /) -> None:
        """The same for one parameter (a new exit on a trained model)."""

    def forward(self, tokens: npt.NDArray[np.int32], out: npt.NDArray[np.float32], /) -> None:
        """Logits of every exit, the final one last: tokens [B, T] -> out [E, B, T, V]."""

class Trainer:
    """Gradients, moments, activation slots and the schedule of a training step.

    rows: tokens of a microbatch (micro batch size x sequence length); schedule: a name, for
    `microbatches` and the model's ranks and chunks, or a spec (see schedule_actions) that says all;
    lists: those of all ranks in place of what the schedule gives; comm: the ranks of the pipeline,
    needed where the model is a part; recompute: "none", "attention" or "full"; defer_exits: in
    split backwards, output matrices of exits in the weight part; exit_temperature [E - 1]: of the
    training loss of each early exit; dynamic_weights: token-wise weights of early exits; fault:
    (kind "kill", "delay" or "corrupt", run, action, seconds), for tests.

    step and evaluate are collectives: all ranks call them with the same arguments.
    """

    def __init__(
        self,
        model: Model,
        *,
        rows: int,
        microbatches: int | None = None,
        schedule: str | tuple[Any, ...] = "1f1b",
        lists: Sequence[npt.NDArray[np.uint64]] | None = None,
        comm: Comm | None = None,
        recompute: str = "none",
        defer_exits: bool = False,
        exit_temperature: Sequence[float] = (),
        dynamic_weights: bool = False,
        fault: tuple[str, int, int, float] | None = None,
    ) -> None: ...
    def step(
        self,
        tokens: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        row_ids: npt.NDArray[np.uint64],
        segments: npt.NDArray[np.int32],
        segment_counts: npt.NDArray[np.int32],
        *,
        exit_weights: Sequence[float],
        learning_rate: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip: float = 0.0,
        max_loss: float = ...,
        max_grad_norm: float = ...,
        dropout_seed: int = 0,
        update: bool = True,
        signal: int = 0,
    ) -> dict[str, Any]:
        """One optimizer step over all microbatches.

        tokens, targets (below 0: masked), positions [M, N]; row_ids [M, N]: global sample << 24 |
        position in the sample, the key of dropout; segments: for each microbatch its boundaries
        0 < ... < N (segment_counts[m] + 1 numbers, one microbatch after the other): a row attends
        within its segment. exit_weights [E - 1]. clip 0: no clipping. Where a loss or the gradient
        norm is not finite, or lies above max_loss / max_grad_norm, nothing is updated and the
        gradients are zeroed. update=False only accumulates gradients. With bubble filling M counts
        its microbatches too, which come last.

        Returns losses [E] (mean over the unmasked tokens that the exit was trained on, float64),
        confidence [E] (mean), tokens (unmasked, of microbatches that run in full), grad_norm
        (before clipping), finite, updated, signal (the largest of all ranks).
        """

    def evaluate(
        self,
        tokens: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        segments: npt.NDArray[np.int32],
        segment_counts: npt.NDArray[np.int32],
    ) -> dict[str, Any]:
        """Sums over the unmasked tokens of up to M microbatches, without gradients or dropout:
        loss_sum [E], agreement [E] (tokens whose argmax equals the final exit's), tokens, and
        confidence, correct: float32 / bool [E, M, N] for thresholds to be chosen from (correct:
        argmax equals the final exit's)."""

    def gradient(self, name: str, /) -> Tensor: ...
    def moment1(self, name: str, /) -> Tensor: ...
    def moment2(self, name: str, /) -> Tensor: ...
    def zero_gradients(self) -> None: ...
    def record(self, capacity: int, /) -> None:
        """Records up to `capacity` events of this rank from now on; 0 ends it."""

    def recorded(self) -> npt.NDArray[np.float64]:
        """The events since the last call, [n, 9]: start, end, bytes, kind, what, chunk,
        microbatch, peer, tag (struct ee_trace_event, csrc/train/trace.h)."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken: AdamW's step count; may be set when resuming."""

    @steps.setter
    def steps(self, value: int, /) -> None: ...
    @property
    def memory(self) -> dict[str, int]:
        """Bytes: parameters, gradients, moments, activations, scratch."""

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products of one step (2 per multiply-add)."""

class Engine:
    """Decoding: packed weights, the key-value cache, and the sequences in flight.

    The weights are copied when the engine is made; with empty=True they come with `load` instead.
    dtype of theirs: "float32" or "bfloat16". max_sequences: in flight at a time. max_length:
    positions of a sequence, 0: the model's context. positions: what the cache holds over all
    sequences, 0: as much as they could ever need.

    Where the model is a part, comm is the communicator of all parts; every rank makes an Engine
    with the same options, ranks behind the first call `serve`, and rank 0 takes the requests, with
    the engines "pipeline" and "full" (csrc/infer/pipeline.h). stage_seconds above 0: nothing is
    computed, the part takes so long a pass. trace: how many passes are noted.
    """

    def __init__(
        self,
        model: Model,
        *,
        dtype: str = "float32",
        max_sequences: int = 1,
        max_length: int = 0,
        positions: int = 0,
        empty: bool = False,
        comm: Comm | None = None,
        stage_seconds: float = 0.0,
        trace: int = 0,
    ) -> None: ...
    def load(self, name: str, values: npt.NDArray[Any], /) -> None:
        """Packs a parameter: float32, float16, or the bits of bfloat16 as uint16, in its shape. A
        matrix may be a transposed or sliced view with contiguous rows or columns."""

    def add(
        self,
        tokens: npt.NDArray[np.int32],
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        engine: str = "deferred",
        thresholds: Sequence[float] = (),
        all_confidences: bool = False,
        max_deferred: int = 15,
        full_depth: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        sample: int = 0,
        stop_tokens: Sequence[int] = (),
        forced: npt.NDArray[np.int32] | None = None,
        replay: npt.NDArray[np.int32] | None = None,
    ) -> int:
        """Admits a prompt and returns its sequence number, which is never used again.

        engine: "full", "deferred", "recompute", "speculative" or "pipeline". thresholds: one for
        each early exit, one for all, or none (1.0); exits with threshold 1 are not run, unless
        all_confidences. max_deferred: rows, or drafts in a row. full_depth: events of kind 1 for
        tokens that left early. forced: tokens that the text goes on with, whatever is chosen.
        replay: the exit that each new token leaves at, whatever the confidence (speculative: 0 or
        1, whether a draft of it is accepted). Raises BusyError when there is no room now.
        """

    def score(self, tokens: npt.NDArray[np.int32], /) -> int:
        """Admits a text, of which every token but the first gets an event of kind 2."""

    def step(self) -> npt.NDArray[np.void]:
        """One batch step: a structured array of events.

        Fields, all of 4 bytes: sequence; kind (0 a new token, 1 the final exit's view of a token
        that left early, 2 a scored token); position of the token in its sequence; token; exit;
        done (0 no, 1 length, 2 stop token, 3 finished); confidence and logprob at that exit; and
        exits [E] of (confidence, logprob, token): what each exit said (NaN, NaN, -1: not run; the
        token is the largest logit, the logprob that of the event's token where it was known).

        Each sequence whose prompt is read runs one new row, which makes a token, or a draft, or
        verifies several; a long prompt is read over several steps. Sequences that are done leave.
        NonFiniteError ends the sequence that it names; the events of the others come with the next
        call."""

    def finish(self, sequence: int, /) -> int:
        """Ends a sequence; with full_depth after its deferred rows have run to the last layer.
        Returns how many events are still to come, the last one done (3)."""

    def remove(self, sequence: int, /) -> None:
        """Ends a sequence at once and frees its place in the cache."""

    def _cache(
        self, sequence: int, layer: int, /
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Copies of the keys and values that stand in a layer, [fill, K, D]."""

    @property
    def active(self) -> int:
        """Sequences in flight, and those whose last events have not been handed out."""

    @property
    def dtype(self) -> str:
        """Of the packed weights: "float32" or "bfloat16"."""

    def serve(self) -> None:
        """Works for rank 0 of a pipeline until that calls `stop`, however long it asks nothing."""

    def stop(self) -> None:
        """Ends all sequences, and lets the other ranks of a pipeline return from `serve`; nothing
        on one rank. So does the end of rank 0's Engine."""

    @property
    def trace(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
        """What this rank of a pipeline did, an entry for each sequence in each pass: [n, 3] start,
        end, when its token was decided here or NaN; and [n, 6] sequence, rows [first, last),
        layers [first, last), exit that decided or -1."""

    @property
    def stats(self) -> dict[str, int]:
        """steps; half_layers (that ran, summed over rows) and head_rows (rows through an output
        matrix); bytes_read (of packed matrices, each counted once a product); drafts (those that
        were verified) and accepted;
        bytes: weight_bytes, cache_bytes."""

class Comm:
    """This rank's side of a numbered group of ranks (csrc/comm/comm.h).

    Made by the functions comm_self, comm_local and comm_adopt, and by split. Every method but
    `exchange` and `abort` is called by all ranks, in the same order. A failed exchange raises
    CommError, after which the communicators of the job are of no more use; a wait lasts at most
    `timeout` seconds. Each Comm is for one thread at a time: a second one gets BusyError.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def transport(self) -> str:
        """ "self", "local" (threads of this process) or "mpi"."""

    @property
    def timeout(self) -> float:
        """Seconds, more than 0; may be set."""

    @timeout.setter
    def timeout(self, value: float, /) -> None: ...
    @property
    def polling(self) -> float:
        """Seconds for which a wait polls before it naps in between; at least 0, may be set. More
        than a few microseconds are for ranks with cores of their own (csrc/comm/comm.h)."""

    @polling.setter
    def polling(self, value: float, /) -> None: ...
    def barrier(self, what: str = "barrier") -> None:
        """Returns once every rank has called it; `what` names it in errors."""

    def all_gather(self, data: bytes, /) -> list[bytes]:
        """The data of every rank in rank order; each may have another length."""

    def broadcast(self, data: bytes | None, root: int = 0) -> bytes:
        """The data of rank `root`; what the others give does not matter."""

    def all_reduce(self, array: npt.NDArray[Any], op: str = "sum") -> npt.NDArray[Any]:
        """Reduces an array over the ranks in place, with the same bits on each, and returns it.

        op: "sum" or "max". The array is contiguous, of float32, float64, int32 or int64, and of
        the same shape on every rank."""

    def split(self, colour: int, key: int, /) -> Comm | None:
        """A communicator of the ranks that give the same colour, ordered by key and then by rank;
        None for a negative colour."""

    def exchange(
        self,
        sends: list[tuple[int, int, npt.NDArray[Any]]],
        receives: list[tuple[int, int, npt.NDArray[Any]]],
        /,
    ) -> None:
        """Starts messages (peer, tag >= 0, contiguous array), all at once, and waits for them."""

    def abort(self, reason: str, /) -> None:
        """Makes the calls of all ranks fail with the reason, also those that wait now."""

class Replay:
    """A schedule's runner and messages, with each action replaced by a wait of a given length.

    spec, lists: as schedule_walk has them; seconds: float64 [4, chunks], of each kind of action
    and chunk of this rank; comm: the ranks of the pipeline; floats: of a message. run is a
    collective.
    """

    def __init__(
        self,
        spec: tuple[Any, ...],
        seconds: npt.NDArray[np.float64],
        comm: Comm,
        floats: int,
        lists: Sequence[npt.NDArray[np.uint64]] | None = None,
    ) -> None: ...
    def run(self) -> tuple[float, float, float]:
        """One step after a barrier: start and end of this rank, on the clock of
        `time.monotonic()`, and the seconds between them that its actions took."""

    def record(self, capacity: int, /) -> None:
        """Records up to `capacity` events of this rank from now on; 0 ends it."""

    def recorded(self) -> npt.NDArray[np.float64]:
        """The events since the last call, as Trainer.recorded gives them."""

def comm_self() -> Comm:
    """The communicator of one rank."""

def comm_local(size: int, timeout: float = 300.0) -> list[Comm]:
    """The communicators of ranks that are threads of this process, one for each thread."""

def comm_grid(
    comm: Comm, data: int, tensor: int, pipeline: int, /
) -> tuple[tuple[int, int, int], list[Comm]]:
    """The process grid (csrc/comm/grid.h): this rank's coordinates (data, tensor, pipeline), and
    for each the communicator of the ranks that differ in it alone. A collective. Raises ValueError
    unless the factors multiply to the ranks of `comm`, NotImplementedError for data or tensor
    above 1."""

def comm_adopt(capsule: Any, /) -> Comm:
    """Takes over the communicator that a transport made, in a capsule named "eellm.comm"."""

def host() -> Any:
    """What a transport gets from the core, in a capsule named "eellm.host" (csrc/comm/host.h)."""

def build_info() -> dict[str, Any]: ...
def measure_bandwidth(threads: int, mebibytes: int, /) -> float:
    """Read bandwidth of memory in bytes/s, best of several passes."""

def measure_flops(threads: int, isa: str, /) -> float:
    """Rate of a large matrix product of this package in FLOP/s."""

def schedule_actions(spec: tuple[Any, ...], rank: int, /) -> npt.NDArray[np.uint64]:
    """The list of a pipeline rank, an action in 8 bytes: kind and flags uint8, chunk uint16,
    microbatch int32. spec: (name, ranks, chunks, microbatches, fill1, fill2_depths int32 or None,
    exit_ranks bool [P] or None), see csrc/train/schedule.h."""

def schedule_fill(ranks: int, ratio: float, count: int, /) -> tuple[int, npt.NDArray[np.int32]]:
    """How many microbatches fit each part of the bubbles of 1F1B where a backward takes `ratio`
    times as long as a forward, and through how many of the last ranks the backwards of the first
    `count` of Part 2 may run (below 1: none)."""

def schedule_walk(
    spec: tuple[Any, ...],
    costs: Mapping[str, Any] | None,
    lists: Sequence[npt.NDArray[np.uint64]] | None,
    trace: bool,
    grid: npt.NDArray[np.float64] | None = None,
    time: float = 0.0,
    /,
) -> dict[str, Any]:
    """Proves the lists of a spec, or `lists` in their place, and says what they take.

    costs: float64 [P chunks] forward, backward, backward_input, backward_weight, kept_bytes,
    queued_bytes, transient_bytes; static_bytes [P]; message. Returns start, end, busy, peak_bytes,
    slots, actions [P], and with trace the times [sum of actions, 2], rank by rank, else None. grid
    [rows, buckets] += the busy time of neighbouring ranks in equal parts of `time`."""

def schedule_buffers(
    spec: tuple[Any, ...], lists: Sequence[npt.NDArray[np.uint64]] | None, /
) -> int:
    """How many gradients that a rank sends may be under way: the least number with which the
    lists cannot come to a stop (ee_walk_buffers, csrc/train/walk.h)."""

def alloc_stats() -> tuple[int, int, int]:
    """(allocations since start, live allocations, live bytes)"""

def set_log(callback: Callable[[int, str], object] | None, /) -> None:
    """callback(level: int, line: str) receives the core's log; None restores the default."""

def _symbols() -> dict[str, int]: ...
def _alloc_fail_at(n: int, /) -> None: ...
