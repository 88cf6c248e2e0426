"""Token files in Megatron's format: PREFIX.bin holds tokens, PREFIX.idx says where documents end.

The index is, little-endian: the magic `MMIDIDX\\0\\0`, uint64 version 1, uint8 code of the token
type, uint64 number of sequences S, uint64 number of document indices D + 1; then int32 sizes[S]
(tokens of each sequence), int64 pointers[S] (bytes into .bin), int64 documents[D + 1] (document i
is the sequences documents[i] .. documents[i + 1] - 1).
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from eellm.errors import message

Tokens = npt.NDArray[np.integer[Any]]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_FLOATS = {6: "float64", 7: "float32"}
_LARGEST_UINT16_VOCAB = 65500
_SIZE_LIMIT = 2**31 - 1
# Entries that one vectorised check takes, so that checking needs little memory.
_CHUNK = 1 << 20


def file_names(prefix: str | Path) -> tuple[Path, Path]:
    """The .bin and .idx file of a prefix; either file's own name is taken too."""
    text = os.fspath(prefix)
    if text.endswith((".bin", ".idx")):
        text = text[:-4]
    return Path(text + ".bin"), Path(text + ".idx")


class TokenFile:
    """A memory-mapped token file. Everything is checked when it is opened.

    `tokens` is the whole .bin as one array without a copy, `bounds[i] .. bounds[i + 1] - 1` in it
    is document i, `sizes` are the lengths of the sequences.
    """

    def __init__(self, prefix: str | Path):
        self.bin_path, self.idx_path = file_names(prefix)
        index = _map(self.idx_path)
        self.dtype, sequences, marks = self._read_header(index)
        offset = HEADER.size
        self.sizes = _view(index, offset, sequences, "<i4")
        offset += 4 * sequences
        pointers = _view(index, offset, sequences, "<i8")
        documents = _view(index, offset + 8 * sequences, marks, "<i8")
        data = _map(self.bin_path)
        self._check_sizes(pointers, data.size)
        self._check_documents(documents, sequences)
        count = data.size // self.dtype.itemsize
        self.tokens: Tokens = data.view(self.dtype)
        ends = np.append(pointers, count * self.dtype.itemsize)
        self.bounds: npt.NDArray[np.int64] = ends[documents] // self.dtype.itemsize

    def __len__(self) -> int:
        return self.bounds.size - 1

    def __repr__(self) -> str:
        return f"<TokenFile {self.bin_path}: {len(self)} documents, {self.tokens.size} tokens>"

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (str(self.bin_path),)

    def document(self, index: int) -> Tokens:
        """The tokens of a document, a read-only view."""
        if not 0 <= index < len(self):
            expected = f"0 to {len(self) - 1}" if len(self) else "a file that has documents"
            what = f"no such document in {self.bin_path}"
            raise ValueError(message(what, expected, index, "check the document numbers"))
        return self.tokens[self.bounds[index] : self.bounds[index + 1]]

    def largest_token(self) -> int:
        """The largest token id; reads the whole file."""
        starts = range(0, self.tokens.size, _CHUNK)
        return max((int(self.tokens[i : i + _CHUNK].max()) for i in starts), default=-1)

    def _bad(self, path: Path, field: str, expected: object, got: object) -> ValueError:
        advice = "the file is damaged or half written: make it again with eellm data prepare"
        return ValueError(message(f"{path}: bad {field}", expected, got, advice))

    def _read_header(self, index: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
        path = self.idx_path
        if index.size < HEADER.size:
            raise self._bad(path, "length", f"at least {HEADER.size} bytes", index.size)
        header: tuple[bytes, int, int, int, int] = HEADER.unpack(index[: HEADER.size].tobytes())
        magic, version, code, sequences, marks = header
        if magic != MAGIC:
            raise self._bad(path, "magic", MAGIC, magic)
        if version != VERSION:
            raise self._bad(path, "version", VERSION, version)
        if code not in TYPES:
            got = _FLOATS.get(code, "an unknown type")
            known = ", ".join(map(str, TYPES))
            raise self._bad(path, "dtype", f"an integer type: {known}", f"{code}: {got}")
        if marks < 1:
            raise self._bad(path, "document count", "at least 1", marks)
        expected = HEADER.size + 12 * sequences + 8 * marks
        if index.size != expected:
            counts = f"{sequences} sequences and {marks} document indices"
            raise self._bad(path, "length", f"{expected} bytes for {counts}", index.size)
        return TYPES[code], sequences, marks

    def _check_sizes(self, pointers: npt.NDArray[np.int64], data_bytes: int) -> None:
        path, position = self.idx_path, 0
        for start in range(0, self.sizes.size, _CHUNK):
            sizes = self.sizes[start : start + _CHUNK].astype(np.int64)
            if sizes.min() < 0:
                where = start + int(np.argmax(sizes < 0))
                raise self._bad(path, f"size of sequence {where}", "0 or more", self.sizes[where])
            # No overflow: _CHUNK sizes below 2^31 of at most 8 bytes stay below 2^54.
            ends = position + np.cumsum(sizes * self.dtype.itemsize)
            begins = np.append(position, ends[:-1])
            wrong = pointers[start : start + _CHUNK] != begins
            if wrong.any():
                at = int(np.argmax(wrong))
                field = f"pointer of sequence {start + at}"
                raise self._bad(path, field, int(begins[at]), int(pointers[start + at]))
            position = int(ends[-1])
            if position > data_bytes:
                break
        if position != data_bytes:
            expected = f"{position} bytes" if position < data_bytes else f"at least {position}"
            raise self._bad(self.bin_path, "length", f"{expected} as {path.name} says", data_bytes)

    def _check_documents(self, documents: npt.NDArray[np.int64], sequences: int) -> None:
        path = self.idx_path
        if documents[0] != 0:
            raise self._bad(path, "document index 0", 0, int(documents[0]))
        for start in range(0, documents.size - 1, _CHUNK):
            part = documents[start : start + _CHUNK + 1]
            wrong = part[1:] < part[:-1]
            if wrong.any():
                at = int(np.argmax(wrong)) + 1
                field = f"document index {start + at}"
                raise self._bad(path, field, f"at least {part[at - 1]}", int(part[at]))
        if documents[-1] != sequences:
            raise self._bad(path, "last document index", sequences, int(documents[-1]))


class TokenFileWriter:
    """Writes a token file document by document; the files appear when it is closed.

    As a context manager it commits on success and leaves nothing behind on an exception.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None):
        self.bin_path, self.idx_path = file_names(prefix)
        small = vocab_size is not None and vocab_size < _LARGEST_UINT16_VOCAB
        self.dtype = np.dtype("<u2") if small else np.dtype("<i4")
        self._limit = min(int(np.iinfo(self.dtype).max), (vocab_size or 2**31) - 1)
        self._sizes = array("i")
        self._marks = array("q", [0])
        self.token_count = 0
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.tmp"
        self._bin_temporary = Path(f"{self.bin_path}{suffix}")
        self._idx_temporary = Path(f"{self.idx_path}{suffix}")
        self._stream: BinaryIO | None = open(self._bin_temporary, "wb")

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def document_count(self) -> int:
        """Documents written so far."""
        return len(self._marks) - 1

    def add(self, tokens: Tokens | Sequence[int]) -> None:
        """Appends one document."""
        values = np.asarray(tokens)
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            got = f"{values.dtype} of shape {values.shape}"
            advice = "pass the ids of one document"
            raise ValueError(message("bad document", "a row of integers", got, advice))
        self.add_many(values, [values.size])

    def add_many(self, tokens: Tokens, sizes: Sequence[int]) -> None:
        """Appends documents that stand one after the other in `tokens`."""
        if self._stream is None:
            got, advice = "a closed one", "open another writer"
            raise ValueError(message(f"cannot write {self.bin_path}", "an open file", got, advice))
        if sum(sizes) != tokens.size or (len(sizes) and not 0 <= min(sizes) <= max(sizes)):
            advice = "pass one size for each document"
            raise ValueError(message("bad document sizes", tokens.size, sum(sizes), advice))
        if len(sizes) and max(sizes) > _SIZE_LIMIT:
            what, advice = "document is too long", "split it"
            raise ValueError(message(what, f"at most {_SIZE_LIMIT} tokens", max(sizes), advice))
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= self._limit:
            got = f"{tokens.min()} to {tokens.max()}"
            advice = "check that the tokenizer and vocab_size belong together"
            expected = f"0 to {self._limit}"
            what = f"token out of range for {self.bin_path}"
            raise ValueError(message(what, expected, got, advice))
        self._stream.write(tokens.astype(self.dtype).tobytes())
        self._sizes.extend(sizes)
        self._marks.extend(range(len(self._marks), len(self._marks) + len(sizes)))
        self.token_count += int(tokens.size)

    def close(self) -> None:
        """Writes the index and gives both files their names; nothing happens the second time."""
        if self._stream is None:
            return
        try:
            _sync_and_close(self._stream)
            self._stream = None
            self._write_index()
            # Without an index there is no token file, so that a crash in between leaves none.
            self.idx_path.unlink(missing_ok=True)
            os.replace(self._bin_temporary, self.bin_path)
            os.replace(self._idx_temporary, self.idx_path)
            _sync_folder(self.idx_path.parent)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Drops what was written; files of that name that were there before stay."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._bin_temporary.unlink(missing_ok=True)
        self._idx_temporary.unlink(missing_ok=True)

    def _write_index(self) -> None:
        sizes = np.frombuffer(self._sizes, np.int32) if self._sizes else np.zeros(0, np.int32)
        marks = np.frombuffer(self._marks, np.int64)
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, np.int64), ends])[: sizes.size]
        code = next(key for key, dtype in TYPES.items() if dtype == self.dtype)
        stream = open(self._idx_temporary, "wb")
        try:
            stream.write(HEADER.pack(MAGIC, VERSION, code, sizes.size, marks.size))
            for values, dtype in ((sizes, "<i4"), (pointers, "<i8"), (marks, "<i8")):
                stream.write(values.astype(dtype, copy=False).tobytes())
            _sync_and_close(stream)
        finally:
            stream.close()


def merge(prefixes: Sequence[str | Path], output: str | Path, vocab_size: int | None = None) -> int:
    """Joins token files into one; returns the number of documents."""
    sources = [TokenFile(prefix) for prefix in prefixes]
    if not sources:
        raise ValueError(message("nothing to merge", "token files", "none", "name some"))
    targets = {path.resolve() for path in file_names(output)}
    if any(source.bin_path.resolve() in targets for source in sources):
        what = f"cannot merge {output} into itself"
        raise ValueError(message(what, "another output", output, "choose another name"))
    if vocab_size is None and all(source.dtype.itemsize <= 2 for source in sources):
        vocab_size = _LARGEST_UINT16_VOCAB - 1
        if max(source.largest_token() for source in sources) >= vocab_size:
            vocab_size = None
    with TokenFileWriter(output, vocab_size) as writer:
        for source in sources:
            _copy(source, writer)
        return writer.document_count


def _copy(source: TokenFile, writer: TokenFileWriter) -> None:
    bounds = source.bounds
    start = 0
    while start < len(source):
        # As many documents as fit in a chunk, at least one.
        end = int(np.searchsorted(bounds, bounds[start] + _CHUNK, side="right")) - 1
        end = min(max(end, start + 1), len(source))
        sizes = np.diff(bounds[start : end + 1]).tolist()
        writer.add_many(source.tokens[bounds[start] : bounds[end]], sizes)
        start = end


def _map(path: Path) -> npt.NDArray[np.uint8]:
    if not path.is_file():
        advice = "give the prefix of a token file; eellm data prepare makes one"
        raise FileNotFoundError(message(f"no token file {path}", "a file", "nothing", advice))
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def _view(index: npt.NDArray[np.uint8], offset: int, count: int, dtype: str) -> Any:
    size = count * np.dtype(dtype).itemsize
    return index[offset : offset + size].view(dtype)


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
