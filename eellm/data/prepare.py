"""Text to token files: JSON lines, text files and folders of them, plain, .gz or .xz."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import multiprocessing
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np

from eellm.data.indexed import TokenFileWriter, Tokens
from eellm.data.tokenizers import Tokenizer
from eellm.errors import message

EXTENSIONS = (".jsonl", ".txt", ".md")
_PACKED = {".gz", ".xz"}
# Characters of text that are read, and sent to a worker, at a time.
_READ = 1 << 20
_GROUP = 1 << 20


@dataclass(frozen=True)
class Statistics:
    """What `prepare` did; `empty` documents were left out."""

    documents: int
    tokens: int
    bytes: int
    empty: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text to a token."""
        return self.bytes / self.tokens


class Progress(Protocol):
    """The part of tqdm that is used."""

    def update(self, n: int) -> object:
        """Counts n bytes of text."""

    def close(self) -> None:
        """Ends the bar."""


def find_files(paths: Iterable[str | Path], extensions: Sequence[str] = EXTENSIONS) -> list[Path]:
    """The files of the paths in order; a folder gives its files of these types, sorted."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and _inner_suffix(file) in extensions
            )
            if not found:
                what, expected = f"no text in the folder {path}", f"files {', '.join(extensions)}"
                raise ValueError(message(what, expected, "none", "name files or extensions"))
            files += found
        elif path.is_file():
            files.append(path)
        else:
            advice = "give text files or folders"
            raise FileNotFoundError(message(f"no input {path}", "a file", "nothing", advice))
    if not files:
        raise ValueError(message("no input", "files or folders", "none", "name some"))
    return files


def iter_documents(
    paths: Iterable[str | Path],
    *,
    key: str = "text",
    separator: str | None = None,
    extensions: Sequence[str] = EXTENSIONS,
) -> Iterator[str]:
    """The documents of files and folders.

    A line of a .jsonl file is a document, under `key`. A text file is one document, or several
    between `separator`s; newlines next to a separator are dropped. Empty documents come out as "".
    """
    if separator == "":
        advice = 'leave it out or name one like "<|endoftext|>"'
        raise ValueError(message("bad separator", "a text", "an empty one", advice))
    for file in find_files(paths, extensions):
        with _open_text(file) as stream:
            if _inner_suffix(file) == ".jsonl":
                yield from _json_documents(stream, file, key)
            elif separator is None:
                text = stream.read()
                _require_text(text, file)
                yield text
            else:
                yield from _split(stream, file, separator)


def prepare(
    paths: Iterable[str | Path],
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    key: str = "text",
    separator: str | None = None,
    extensions: Sequence[str] = EXTENSIONS,
    append_eod: bool = True,
    special: bool = True,
    workers: int = 0,
    progress: bool | Callable[[], Progress] = False,
) -> Statistics:
    """Writes the documents of files and folders to a token file; returns what it did.

    `workers` processes encode (0: this one); the result does not depend on their number.
    `special=False` reads special tokens that stand in the text as plain text.
    """
    if workers < 0:
        raise ValueError(message("bad number of workers", "0 or more", workers, "change it"))
    if append_eod and tokenizer.eod_id is None:
        what = f"the tokenizer {tokenizer.source} has no document separator"
        advice = "name an eos_token in tokenizer_config.json or turn the separators off"
        raise ValueError(message(what, "an eod or eos token", "none", advice))
    job = _Job(tokenizer, tokenizer.eod_id if append_eod else None, special)
    documents = iter_documents(paths, key=key, separator=separator, extensions=extensions)
    bar = _bar(progress)
    total_bytes = empty = 0
    try:
        with TokenFileWriter(output, tokenizer.vocab_size) as writer:
            for result in _encode(_grouped(documents), job, workers):
                writer.add_many(result.tokens, result.sizes)
                total_bytes += result.bytes
                empty += result.empty
                if bar is not None:
                    bar.update(result.bytes)
            if not writer.document_count:
                advice = "check the inputs and the key"
                what = "no documents to write"
                raise ValueError(message(what, "text", f"{empty} empty documents", advice))
            return Statistics(writer.document_count, writer.token_count, total_bytes, empty)
    finally:
        if bar is not None:
            bar.close()


@dataclass(frozen=True)
class _Encoded:
    tokens: Tokens
    sizes: list[int]
    bytes: int
    empty: int


@dataclass(frozen=True)
class _Job:
    """What a worker needs to encode a group of documents."""

    tokenizer: Tokenizer
    eod: int | None
    special: bool

    def __call__(self, texts: list[str]) -> _Encoded:
        kept = [text for text in texts if text]
        rows = self.tokenizer.encode_batch(kept, special=self.special)
        if self.eod is not None:
            rows = [np.append(row, np.int32(self.eod)) for row in rows]
        rows = [row for row in rows if row.size]
        joined = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        size = sum(len(text.encode("utf-8")) for text in kept)
        return _Encoded(joined, [row.size for row in rows], size, len(texts) - len(rows))


_worker_job: _Job | None = None


def _start_worker(job: _Job) -> None:
    global _worker_job
    _worker_job = job


def _work(texts: list[str]) -> _Encoded:
    return cast(_Job, _worker_job)(texts)


def _encode(groups: Iterator[list[str]], job: _Job, workers: int) -> Iterator[_Encoded]:
    """Encodes groups in order, a bounded number of them ahead."""
    if workers == 0:
        yield from map(job, groups)
        return
    # A forked child of a process with threads (the tokenizers package has some) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job,))
    pending: deque[Future[_Encoded]] = deque()
    try:
        for group in groups:
            pending.append(pool.submit(_work, group))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        advice = "use fewer workers: memory may have run out"
        what = "a worker process ended"
        raise OSError(message(what, "it to encode its part", "its death", advice)) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _grouped(documents: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bar(progress: bool | Callable[[], Progress]) -> Progress | None:
    if callable(progress):
        return progress()
    if not progress:
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return cast(Progress, tqdm(unit="B", unit_scale=True, desc="tokens", mininterval=0.5))


def _inner_suffix(file: Path) -> str:
    """The type of a file without its compression: .txt for a.txt.gz."""
    suffixes = file.suffixes
    if suffixes and suffixes[-1] in _PACKED:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def _open_text(file: Path) -> Iterator[io.TextIOWrapper]:
    """Opens a text; damaged compression and encoding become one kind of error."""
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(file.suffix)
    raw = cast(BinaryIO, opener(file) if opener else open(file, "rb"))
    advice = "fetch or convert the file again"
    try:
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as stream:
            yield stream
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x}"
        raise ValueError(message(f"{file} is no text", "UTF-8", got, advice)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        what = f"cannot decompress {file}"
        raise ValueError(message(what, f"valid {file.suffix}", error, advice)) from None


def _json_documents(stream: Iterable[str], file: Path, key: str) -> Iterator[str]:
    any_line = False
    for number, line in enumerate(stream, 1):
        if line.strip():
            any_line = True
            yield _json_text(line, f"{file}, line {number}", key)
    if not any_line:
        _require_text("", file)


def _json_text(line: str, where: str, key: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        advice = "give one JSON object a line"
        raise ValueError(message(where, "JSON", error, advice)) from None
    advice = "name the key that holds the text"
    if not isinstance(entry, dict) or key not in entry:
        got = ", ".join(sorted(entry)[:5]) if isinstance(entry, dict) else "no object"
        raise ValueError(message(where, f"an object with the key {key}", got, advice))
    text = entry[key]
    if not isinstance(text, str):
        got = type(text).__name__
        raise ValueError(message(f"{where}: {key}", "a string", got, advice))
    if "\\u" in line:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            got = f"the lone surrogate U+{ord(text[error.start]):04X}"
            advice = "drop or repair this document"
            raise ValueError(message(f"{where}: {key}", "Unicode", got, advice)) from None
    return text


def _split(stream: io.TextIOWrapper, file: Path, separator: str) -> Iterator[str]:
    """The texts between separators; a separator may lie across two reads."""
    parts: list[str] = []
    tail, any_text, first = "", False, True
    while chunk := stream.read(_READ):
        any_text = any_text or not chunk.isspace()
        pieces = (tail + chunk).split(separator)
        for piece in pieces[:-1]:
            yield _trim("".join([*parts, piece]), first, False)
            parts, first = [], False
        # A piece of a separator at the end must be seen again together with the next chunk.
        keep = min(len(separator) - 1, len(pieces[-1]))
        cut = len(pieces[-1]) - keep
        parts.append(pieces[-1][:cut])
        tail = pieces[-1][cut:]
    if not any_text:
        _require_text("", file)
    last = _trim("".join([*parts, tail]), first, True)
    if last.strip():
        yield last


def _trim(text: str, first: bool, last: bool) -> str:
    text = text if first else text.lstrip("\n")
    return text if last else text.rstrip("\n")


def _require_text(text: str, file: Path) -> None:
    if not text.strip():
        advice = "leave the file out"
        raise ValueError(message(f"{file} has no text", "a document", "an empty file", advice))
