"""Tokenizers, token files, sample streams and batches."""

from eellm.data.blend import Blend, split_documents
from eellm.data.indexed import TokenFile, TokenFileWriter, merge
from eellm.data.loader import Batch, Batches, validation_batches
from eellm.data.packing import Dataset, PackedDataset, TokenArray, TokenSource, Window
from eellm.data.prepare import Statistics, find_files, iter_documents, prepare
from eellm.data.tokenizers import StreamDecoder, Tokenizer, load_tokenizer, train_bpe
from eellm.errors import MissingPackageError

__all__ = [
    "Batch",
    "Batches",
    "Blend",
    "Dataset",
    "MissingPackageError",
    "PackedDataset",
    "Statistics",
    "StreamDecoder",
    "TokenArray",
    "TokenFile",
    "TokenFileWriter",
    "TokenSource",
    "Tokenizer",
    "Window",
    "find_files",
    "iter_documents",
    "load_tokenizer",
    "merge",
    "prepare",
    "split_documents",
    "train_bpe",
    "validation_batches",
]
