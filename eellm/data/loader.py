"""Batches for the core: step k is a function of the dataset and k alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from eellm.data.packing import POSITION_BITS, Bools, Dataset, Int32s, Int64s, check_samples
from eellm.errors import message

MASKED = -1


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step, M microbatches of B samples of T tokens, N = B * T rows.

    tokens, targets (-1: masked), positions: int32 [M, N]. row_ids: uint64 [M, N], global sample
    << 24 | position in the window, the key of dropout. segments: the boundaries 0 < ... < N of
    attention in microbatch m are segment_counts[m] + 1 numbers, one microbatch after the other.
    samples: int64 [M, B], the global sample numbers.
    """

    step: int
    tokens: Int32s
    targets: Int32s
    positions: Int32s
    row_ids: npt.NDArray[np.uint64]
    segments: Int32s
    segment_counts: Int32s
    samples: Int64s

    @property
    def unmasked(self) -> int:
        """Targets that count in the loss, in this rank's part."""
        return int(np.count_nonzero(self.targets >= 0))

    def boundaries(self, microbatch: int) -> Int32s:
        """The boundaries of the attention segments of one microbatch (cu_seqlens)."""
        starts = np.concatenate([[0], np.cumsum(self.segment_counts + 1)])
        return self.segments[starts[microbatch] : starts[microbatch + 1]]

    def arguments(self) -> dict[str, Any]:
        """The arrays by the names under which the core's trainer takes them."""
        names = ("tokens", "targets", "positions", "row_ids", "segments", "segment_counts")
        return {name: getattr(self, name) for name in names}


class Batches:
    """An iterator of batches that can be placed at any step.

    A step has world * microbatches * micro_batch_size samples, numbered on from the step before;
    rank r of `world` data-parallel ranks takes every world-th microbatch. So the samples of a step
    depend on no layout that keeps their number.

    reset_positions: positions restart after each document. reset_attention: tokens see their own
    document only. mask_separators: the last token of a document predicts nothing. `windows` ends
    the iterator after that many samples (the last step is filled up with masked rows). `prefetch`
    makes the next batch in a thread.
    """

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        microbatches: int = 1,
        *,
        rank: int = 0,
        world: int = 1,
        reset_positions: bool = False,
        reset_attention: bool = False,
        mask_separators: bool = False,
        windows: int | None = None,
        prefetch: bool = False,
    ):
        sizes = {"micro_batch_size": micro_batch_size, "microbatches": microbatches, "world": world}
        if windows is not None:
            sizes["windows"] = windows
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(message(f"bad {name}", "at least 1", value, "change it"))
        if not 0 <= rank < world:
            advice = "pass the data-parallel rank and size"
            raise ValueError(message("bad rank", f"0 to {world - 1}", rank, advice))
        if micro_batch_size * dataset.seq_length > 2**31 - 1:
            rows, advice = micro_batch_size * dataset.seq_length, "lower micro_batch_size"
            raise ValueError(message("microbatch is too large", "below 2^31 tokens", rows, advice))
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.microbatches = microbatches
        self.rank, self.world = rank, world
        self.reset_positions = reset_positions
        self.reset_attention = reset_attention
        self.mask_separators = mask_separators
        self.windows = windows
        self.step = 0
        self._pool = ThreadPoolExecutor(1, "eellm-data") if prefetch else None
        self._ahead: tuple[int, Future[Batch]] | None = None

    @property
    def global_batch(self) -> int:
        """Samples of one step over all ranks."""
        return self.world * self.microbatches * self.micro_batch_size

    @property
    def steps(self) -> int | None:
        """Steps until the end, or None if there is none."""
        return None if self.windows is None else -(-self.windows // self.global_batch)

    def batch(self, step: int) -> Batch:
        """The batch of a step; changes nothing."""
        samples = self._samples(step)
        wanted = samples.reshape(-1)
        if self.windows is None:
            tokens, ends = self.dataset.windows(wanted)
            targets = tokens[:, 1:].copy()
        else:
            tokens, ends = self.dataset.windows(wanted % self.windows)
            targets = tokens[:, 1:].copy()
            targets[wanted >= self.windows] = MASKED
        if self.mask_separators:
            targets[ends] = MASKED
        length = self.dataset.seq_length
        shape = (self.microbatches, self.micro_batch_size * length)
        offsets = np.arange(length, dtype=np.uint64)
        row_ids = (wanted.astype(np.uint64)[:, None] << np.uint64(POSITION_BITS)) | offsets
        segments, counts = self._segments(ends)
        return Batch(
            step,
            np.ascontiguousarray(tokens[:, :-1]).reshape(shape),
            targets.reshape(shape),
            positions_of(ends, self.reset_positions).reshape(shape),
            row_ids.reshape(shape),
            segments,
            counts,
            samples,
        )

    def _samples(self, step: int) -> Int64s:
        size = self.micro_batch_size
        last = (step + 1) * self.global_batch - 1
        check_samples([step if step < 0 else min(last, 2**63 - 1)])
        rows = np.arange(self.microbatches, dtype=np.int64)[:, None] * self.world + self.rank
        return step * self.global_batch + rows * size + np.arange(size, dtype=np.int64)

    def _segments(self, ends: Bools) -> tuple[Int32s, Int32s]:
        length = self.dataset.seq_length
        starts = np.zeros(ends.shape, dtype=np.bool_)
        starts[:, 0] = True
        if self.reset_attention:
            starts[:, 1:] = ends[:, :-1]
        rows = self.micro_batch_size * length
        starts = np.pad(starts.reshape(self.microbatches, rows), ((0, 0), (0, 1)))
        starts[:, rows] = True
        boundaries = np.nonzero(starts)[1].astype(np.int32)
        return boundaries, (np.count_nonzero(starts, axis=1) - 1).astype(np.int32)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.steps is not None and self.step >= self.steps:
            raise StopIteration
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == self.step:
            batch = ahead[1].result()
        else:
            batch = self.batch(self.step)
        self.step += 1
        if self._pool is not None and (self.steps is None or self.step < self.steps):
            self._ahead = (self.step, self._pool.submit(self.batch, self.step))
        return batch

    def state_dict(self) -> dict[str, int]:
        """All that resuming needs."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the step of a saved state."""
        step = state.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            advice = "pass what state_dict returned"
            raise ValueError(message("bad loader state", "a step of 0 or more", step, advice))
        self.step = step

    def close(self) -> None:
        """Ends the prefetch thread; the iterator goes on without one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._ahead = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def validation_batches(
    dataset: Dataset,
    micro_batch_size: int,
    microbatches: int = 1,
    *,
    windows: int | None = None,
    **options: Any,
) -> Batches:
    """Batches over the first `windows` windows (default: all), each once and in order.

    The dataset should be built with shuffle=False: its windows then follow each other in the text,
    and every token but the first is predicted once.
    """
    count = dataset.window_count if windows is None else windows
    if not 1 <= count <= dataset.window_count:
        expected, advice = f"1 to {dataset.window_count} windows", "ask for fewer or add text"
        raise ValueError(message("bad validation size", expected, count, advice))
    return Batches(dataset, micro_batch_size, microbatches, windows=count, **options)


def positions_of(ends: Bools, reset: bool) -> Int32s:
    """Positions [n, T]; with `reset` they restart after each document end."""
    places = np.broadcast_to(np.arange(ends.shape[1], dtype=np.int32), ends.shape)
    if not reset:
        return np.ascontiguousarray(places)
    starts = np.zeros(ends.shape, dtype=np.int32)
    starts[:, 1:] = np.where(ends[:, :-1], places[:, 1:], 0)
    positions: Int32s = places - np.maximum.accumulate(starts, axis=1)
    return positions
