"""The stream of training samples: documents joined and cut into windows of seq_length + 1 tokens.

In each epoch the documents are joined in a shuffled order, the result is cut into windows that
overlap by one token (so that each token but the first is a target once), and the windows are
shuffled too. The last tokens that fill no window are left out in that epoch. Sample i is window
i % n of epoch i // n, so that the stream has no end and any sample can be read alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from eellm.data.indexed import Tokens
from eellm.errors import message

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# What a permutation is for; part of the key of its random numbers.
DOCUMENTS, WINDOWS, SPLIT = range(3)

# Sample and position share a 64-bit number, see the row ids of a batch.
POSITION_BITS = 24
SAMPLE_LIMIT = 1 << (64 - POSITION_BITS)


class Window(NamedTuple):
    """One sample: `tokens` [T + 1], and `ends` [T]: the input is the last token of a document."""

    tokens: Int32s
    ends: Bools

    @property
    def inputs(self) -> Int32s:
        """The tokens that the model reads."""
        return self.tokens[:-1]

    @property
    def targets(self) -> Int32s:
        """The tokens that it should say next."""
        return self.tokens[1:]


class TokenSource(Protocol):
    """All tokens in one array; document i is tokens[bounds[i] : bounds[i + 1]]."""

    @property
    def tokens(self) -> Tokens:
        """The tokens of all documents."""

    @property
    def bounds(self) -> Int64s:
        """Where documents begin, and the end of the last one."""


class Dataset(Protocol):
    """An endless sequence of windows."""

    @property
    def seq_length(self) -> int:
        """Inputs of a window."""

    @property
    def window_count(self) -> int:
        """Windows of one epoch."""

    def windows(self, samples: Int64s) -> tuple[Int32s, Bools]:
        """Tokens [n, T + 1] and document ends [n, T] of samples [n]."""


class TokenArray:
    """A token source in memory; documents end after each `eod_id`, if one is given."""

    def __init__(self, tokens: Tokens | Sequence[int], eod_id: int | None = None):
        values = np.asarray(tokens)
        if values.ndim != 1 or values.size == 0 or values.dtype.kind not in "iu":
            got = f"{values.dtype} of shape {values.shape}"
            advice = "pass the ids of a text"
            raise ValueError(message("bad tokens", "a row of integers", got, advice))
        self.tokens: Tokens = values
        ends = np.zeros(values.size, dtype=np.bool_) if eod_id is None else values == eod_id
        inner = np.flatnonzero(ends[:-1]) + 1
        self.bounds: Int64s = np.concatenate([[0], inner, [values.size]]).astype(np.int64)

    def __len__(self) -> int:
        return self.bounds.size - 1


class _Epoch(NamedTuple):
    starts: Int64s  # in the source, of the documents in their order
    offsets: Int64s  # in the joined stream, and its length
    order: Int64s | None  # of the windows


class PackedDataset:
    """Windows of a token source; see the module's text.

    `documents` restricts it to some documents. Where `eod_id` is given, its occurrences end a
    document too (a text file that holds many is one document of a token file).
    """

    def __init__(
        self,
        source: TokenSource,
        seq_length: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        eod_id: int | None = None,
        documents: Sequence[int] | Int64s | None = None,
    ):
        if not 1 <= seq_length < 1 << POSITION_BITS:
            expected = f"1 to {(1 << POSITION_BITS) - 1}"
            raise ValueError(message("bad seq_length", expected, seq_length, "change it"))
        self.source = source
        self.seq_length = int(seq_length)
        self.seed = check_seed(seed)
        self.shuffle = shuffle
        self.eod_id = eod_id
        bounds = source.bounds
        count = bounds.size - 1
        chosen = np.arange(count) if documents is None else np.asarray(documents, dtype=np.int64)
        if chosen.size and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
            got = f"{chosen.min()} to {chosen.max()}"
            what, expected = "document number out of range", f"0 to {count - 1}"
            raise ValueError(message(what, expected, got, "check the split"))
        self._starts: Int64s = bounds[chosen]
        self._sizes: Int64s = bounds[chosen + 1] - self._starts
        self.token_count = int(self._sizes.sum())
        self._count = (self.token_count - 1) // self.seq_length
        if self._count < 1:
            expected = f"at least seq_length + 1 = {seq_length + 1} tokens"
            got = f"{self.token_count} tokens in {chosen.size} documents"
            advice = "add text or lower seq_length"
            raise ValueError(message("too little data", expected, got, advice))
        self._epochs: dict[int, _Epoch] = {}

    @property
    def window_count(self) -> int:
        """Windows of one epoch."""
        return self._count

    def sample(self, index: int) -> Window:
        """One window."""
        tokens, ends = self.windows(np.array([index], dtype=np.int64))
        return Window(tokens[0], ends[0])

    def windows(self, samples: Int64s) -> tuple[Int32s, Bools]:
        """Tokens [n, T + 1] and document ends [n, T] of samples [n]."""
        samples = check_samples(samples)
        tokens = np.empty((samples.size, self.seq_length + 1), dtype=np.int32)
        ends = np.zeros((samples.size, self.seq_length), dtype=np.bool_)
        epochs, places = np.divmod(samples, self._count)
        for row in range(samples.size):
            epoch = self._epoch(int(epochs[row]))
            place = int(places[row]) if epoch.order is None else int(epoch.order[places[row]])
            self._read(epoch, place * self.seq_length, tokens[row], ends[row])
        if self.eod_id is not None:
            ends |= tokens[:, :-1] == self.eod_id
        return tokens, ends

    def _epoch(self, number: int) -> _Epoch:
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = self._build(number)
            # A batch may reach into a second epoch. Threads share this object, so that the
            # dictionary is replaced and never changed.
            last = list(self._epochs.items())[-1:]
            self._epochs = {**dict(last), number: epoch}
        return epoch

    def _build(self, number: int) -> _Epoch:
        starts, sizes, order = self._starts, self._sizes, None
        if self.shuffle:
            documents = permutation(self.seed, number, DOCUMENTS, starts.size)
            starts, sizes = starts[documents], sizes[documents]
            order = permutation(self.seed, number, WINDOWS, self._count)
        offsets = np.zeros(starts.size + 1, dtype=np.int64)
        np.cumsum(sizes, out=offsets[1:])
        return _Epoch(starts, offsets, order)

    def _read(self, epoch: _Epoch, start: int, tokens: Int32s, ends: Bools) -> None:
        """Copies the window that begins at `start` of the stream."""
        stop = start + tokens.size
        first = int(np.searchsorted(epoch.offsets, start, side="right")) - 1
        last = int(np.searchsorted(epoch.offsets, stop, side="left"))
        offsets = epoch.offsets[first : last + 1]
        shifts = epoch.starts[first:last] - offsets[:-1]
        if shifts.size == 1:
            begin = start + int(shifts[0])
            values = self.source.tokens[begin : begin + tokens.size]
        else:
            cuts = np.clip(offsets, start, stop)
            places = np.repeat(shifts, np.diff(cuts)) + np.arange(start, stop)
            values = self.source.tokens[places]
            ends[cuts[1:-1] - start - 1] = True
        if values.dtype.kind != "u" or values.dtype.itemsize >= 4:
            check_tokens(values)
        tokens[:] = values


def permutation(seed: int, epoch: int, purpose: int, count: int) -> Int64s:
    """A permutation of 0 .. count - 1 that depends on its arguments alone.

    It sorts raw words of a counter-based generator, because NumPy promises that those never change;
    the results of its `shuffle` and `permutation` may differ between versions.
    """
    key = np.array([seed, (epoch << 8) | purpose], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")


def check_seed(seed: int) -> int:
    """The seed, if it is one."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
        raise ValueError(message("bad seed", "0 to 2^64 - 1", seed, "choose another seed"))
    return int(seed)


def check_samples(samples: Any) -> Int64s:
    """The sample numbers as an array, if they are in range."""
    values = np.asarray(samples, dtype=np.int64)
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < SAMPLE_LIMIT:
        got = f"{values.min()} to {values.max()}"
        what, expected = "sample number out of range", f"0 to {SAMPLE_LIMIT - 1}"
        raise ValueError(message(what, expected, got, "check the step number"))
    return values


def check_tokens(tokens: Tokens) -> None:
    """Raises unless all tokens fit in a non-negative int32."""
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most > 2**31 - 1:
        what, expected = "token out of range", "0 to 2147483647"
        advice = "prepare the data again with the model's tokenizer"
        raise ValueError(message(what, expected, least if least < 0 else most, advice))
