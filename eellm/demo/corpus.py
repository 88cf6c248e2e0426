"""The demo's text and tokens."""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eellm.errors import Shown, invalid

if TYPE_CHECKING:
    from eellm.data import PackedDataset, Tokenizer

TRAIN_BYTES = 6 << 20
VALID_BYTES = 500 << 10
LEAST_BYTES = 200 << 10
TOKENIZER_BYTES = 2 << 20
FILE_LIMIT = 150 << 10
PROMPTS = 4
_METHOD = re.compile(r"    def [a-z]\w*\(self\b[^()]*\):")

SKIPPED = ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "lib2to3")
SKIPPED_TOO = ("pydoc_data", "__pycache__", "turtledemo")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and others to check with, by name."""

    name: str
    unit: str
    train: list[str]
    valid: list[str]


def library_corpus() -> Corpus:
    """The standard library's source, files in an order that their names alone decide."""
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for path in root.rglob("*.py"):
        inner = path.relative_to(root)
        if not any(part in (*SKIPPED, *SKIPPED_TOO) for part in inner.parts[:-1]):
            names.append(inner.as_posix())
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    train: list[str] = []
    valid: list[str] = []
    sizes = {"train": 0, "valid": 0}
    for name in names:
        text = _read(root / name)
        if not text.strip() or len(text) > FILE_LIMIT:
            continue
        if sizes["valid"] < VALID_BYTES:
            valid.append(text)
            sizes["valid"] += len(text)
        elif sizes["train"] < TRAIN_BYTES:
            train.append(text)
            sizes["train"] += len(text)
        else:
            break
    if sizes["train"] < LEAST_BYTES:
        got = Shown(f"{sizes['train'] >> 10} KB in {root}")
        advice = "give a text of your own with --text"
        raise invalid("Python's library is too small", f"{LEAST_BYTES >> 10} KB", got, advice)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return Corpus(f"the source of Python {version}", "files", train, valid)


def text_corpus(path: str | Path) -> Corpus:
    """The documents of a file; every tenth piece of about 8 KB is held out."""
    from eellm.data import iter_documents

    pieces = [piece for text in iter_documents([path]) for piece in _cut(text, 8 << 10)]
    size = sum(map(len, pieces))
    if size < LEAST_BYTES:
        expected, advice = f"at least {LEAST_BYTES >> 10} KB", "give a longer text"
        raise invalid(f"{path} is too short", expected, Shown(f"{size >> 10} KB"), advice)
    valid = pieces[9::10]
    train = [piece for i, piece in enumerate(pieces) if i % 10 != 9]
    return Corpus(str(path), "pieces", train, valid)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _cut(text: str, size: int) -> list[str]:
    """Pieces of about `size` characters that end with a line where there is one."""
    pieces, start = [], 0
    while start < len(text):
        end = min(start + size, len(text))
        line = text.rfind("\n", start + size // 2, end)
        if end < len(text) and line >= 0:
            end = line + 1
        pieces.append(text[start:end])
        start = end
    return pieces


def train_tokenizer(corpus: Corpus, folder: Path, vocabulary: int) -> Tokenizer:
    """A byte-level BPE of the first part of the training text, saved in the folder."""
    from eellm.data import train_bpe

    part, size = [], 0
    for text in corpus.train:
        part.append(text)
        size += len(text)
        if size >= TOKENIZER_BYTES:
            break
    tokenizer = train_bpe(part, vocabulary)
    tokenizer.save(folder)
    return tokenizer


def write_tokens(texts: Sequence[str], prefix: Path, tokenizer: Tokenizer) -> int:
    """Writes a token file of the texts, each with a separator; returns its tokens."""
    from eellm.data import TokenFileWriter

    with TokenFileWriter(prefix, tokenizer.vocab_size) as writer:
        for row in tokenizer.encode_batch(texts, special=False):
            writer.add(np.append(row, np.int32(tokenizer.eod_id or 0)))
        return writer.token_count


def unigram_entropy(dataset: PackedDataset) -> float:
    """Bits a token that the best model without context would need for the dataset's targets."""
    tokens, _ = dataset.windows(np.arange(dataset.window_count))
    counts = np.bincount(tokens[:, 1:].ravel()).astype(np.float64)
    parts = counts[counts > 0] / counts.sum()
    return float(-(parts * np.log2(parts)).sum())


def prompt_texts(corpus: Corpus) -> list[str]:
    """Beginnings out of the held-out text: lines that end with the head of a method where there
    are some, else any lines."""
    found: list[str] = []
    for document in corpus.valid:
        lines = document.split("\n")
        heads = [i for i, line in enumerate(lines) if _METHOD.fullmatch(line)]
        if heads:
            at = heads[len(heads) // 2]
            found.append("\n".join(lines[max(0, at - 4) : at + 1]).strip("\n") + "\n")
    found += ["".join(document.splitlines(True)[:4])[:300] for document in corpus.valid]
    return [text for text in found if 30 <= len(text) <= 400][:PROMPTS]


@dataclass(frozen=True)
class Data:
    """Token streams to train on and to validate with."""

    tokenizer: Tokenizer
    train: PackedDataset
    valid: PackedDataset
    train_tokens: int
    valid_tokens: int
    entropy: float


def prepare(corpus: Corpus, folder: Path, seed: int, vocabulary: int, seq_length: int) -> Data:
    """Trains the tokenizer, writes both token files and opens them."""
    from eellm.data import PackedDataset, TokenFile

    tokenizer = train_tokenizer(corpus, folder / "tokenizer", vocabulary)
    train_tokens = write_tokens(corpus.train, folder / "train", tokenizer)
    valid_tokens = write_tokens(corpus.valid, folder / "valid", tokenizer)
    train = PackedDataset(TokenFile(folder / "train"), seq_length, seed=seed)
    valid = PackedDataset(TokenFile(folder / "valid"), seq_length, shuffle=False)
    entropy = unigram_entropy(valid)
    return Data(tokenizer, train, valid, train_tokens, valid_tokens, entropy)
