"""Tokenizers: one interface over the packages `tokenizers` and `sentencepiece`.

Both packages are imported when a tokenizer of their kind is loaded, not before.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eellm.errors import message, missing_package

Ids = Sequence[int] | npt.NDArray[np.integer[Any]]

REPLACEMENT = "\ufffd"

# Files beside a tokenizer that tell its special tokens; the first three are saved with it.
_SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
_SAVED_SIDE_FILES = _SIDE_FILES[:3]
_SIDE_LIMIT = 16 << 20

_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[SEP]")
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eod>")


class StreamDecoder:
    """Turns ids into text piece by piece, never printing half a character.

    The pieces of the ids of a text join to `decode(ids)`. `prompt` holds the ids that come before,
    so that a word's leading space is kept. Bytes that never become a character come out as U+FFFD.
    """

    _CONTEXT = 8
    # Half a character has at most three bytes and shows as at most so many U+FFFD.
    _HALF = 3
    # Ids that are decoded together while no character ends, or no text comes at all.
    _LIMIT = 128

    def __init__(self, tokenizer: Tokenizer, prompt: Ids = (), *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._context = [int(token) for token in prompt[-self._CONTEXT :]]
        self._pending: list[int] = []
        self._told = 0

    def put(self, token: int) -> str:
        """Takes the next id; returns the text that is now certain, often empty."""
        self._pending.append(int(token))
        text = self._text()
        half = min(len(text) - len(text.rstrip(REPLACEMENT)), self._HALF)
        if not text and len(self._pending) >= self._LIMIT:
            self._pending = []
        if half == len(text) and len(self._pending) < self._LIMIT:
            return ""
        if half == 0 or len(self._pending) >= self._LIMIT:
            return self._take(text)
        piece = text[self._told : len(text) - half]
        self._told = max(self._told, len(text) - half)
        return piece

    def finish(self) -> str:
        """Returns what was held back; ids that follow belong to the same text."""
        return self._take(self._text()) if self._pending else ""

    def _text(self) -> str:
        """The text of the pending ids."""
        before = self._tokenizer.decode(self._context, skip_special=self._skip)
        after = self._tokenizer.decode(self._context + self._pending, skip_special=self._skip)
        return after[len(before) :]

    def _take(self, text: str) -> str:
        piece = text[self._told :]
        if text:
            self._context = self._pending
        self._pending, self._told = [], 0
        return piece


class Tokenizer(ABC):
    """Text to ids and back. Get one from `load_tokenizer` or `train_bpe`."""

    kind: str
    file_name: str

    def __init__(self, data: bytes, side: Mapping[str, bytes], source: str):
        self._data = data
        self._side = dict(side)
        self.source = source
        self._size = 0
        self._open()
        config = _read_json_files(self._side, source)
        self.bos_id = self._special("bos", config, _BOS_NAMES)
        self.eos_id = self._special("eos", config, _EOS_NAMES)
        eod = [self.token_to_id(name) for name in _EOD_NAMES]
        self.eod_id: int | None = next((i for i in eod if i is not None), self.eos_id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._size} tokens from {self.source}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._data, self._side, self.source)

    @abstractmethod
    def _open(self) -> None:
        """Builds the library's object from self._data and sets self._size."""

    @abstractmethod
    def _encode_batch(self, texts: list[str], special: bool) -> list[list[int]]:
        """Encodes valid Unicode strings, adding nothing."""

    @abstractmethod
    def _decode(self, ids: list[int], skip_special: bool) -> str:
        """Decodes ids that are all within the vocabulary."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, or None."""

    @abstractmethod
    def id_to_token(self, token: int) -> str | None:
        """The token of an id as the vocabulary writes it, or None."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._size

    def encode(
        self, text: str, *, add_bos: bool = False, add_eos: bool = False, special: bool = True
    ) -> npt.NDArray[np.int32]:
        """The ids of a text. `special=False` reads "<|endoftext|>" and the like as plain text."""
        return self.encode_batch([text], add_bos=add_bos, add_eos=add_eos, special=special)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_bos: bool = False,
        add_eos: bool = False,
        special: bool = True,
    ) -> list[npt.NDArray[np.int32]]:
        """The ids of each text."""
        texts = list(texts)
        for text in texts:
            _check_text(text)
        first = [self._required("bos", self.bos_id)] if add_bos else []
        last = [self._required("eos", self.eos_id)] if add_eos else []
        return [
            np.array([*first, *ids, *last] if first or last else ids, dtype=np.int32)
            for ids in self._encode_batch(texts, special)
        ]

    def decode(self, ids: Ids, *, skip_special: bool = True) -> str:
        """The text of ids. Ids past the vocabulary (padded models have them) give U+FFFD."""
        values = [int(token) for token in ids]
        if values and min(values) < 0:
            got, advice = min(values), "remove padding and masked targets first"
            raise ValueError(message("token id out of range", "0 or more", got, advice))
        if not values or max(values) < self._size:
            return self._decode(values, skip_special)
        text, start = "", 0
        for i, token in enumerate(values):
            if token >= self._size:
                text += self._decode(values[start:i], skip_special) + REPLACEMENT
                start = i + 1
        return text + self._decode(values[start:], skip_special)

    def stream(self, prompt: Ids = (), *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes one id at a time; see StreamDecoder."""
        return StreamDecoder(self, prompt, skip_special=skip_special)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into a model folder, with the files that Transformers wants."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file_name).write_bytes(self._data)
        files = {k: v for k, v in self._side.items() if k in _SAVED_SIDE_FILES}
        files.setdefault("tokenizer_config.json", self._default_config())
        for name, data in files.items():
            (folder / name).write_bytes(data)

    def _default_config(self) -> bytes:
        config: dict[str, Any] = {"tokenizer_class": self._transformers_class}
        for role, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            if token is not None:
                config[f"{role}_token"] = self.id_to_token(token)
        config["clean_up_tokenization_spaces"] = False
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()

    _transformers_class = "PreTrainedTokenizerFast"

    def _required(self, role: str, token: int | None) -> int:
        if token is None:
            what = f"the tokenizer {self.source} has no {role} token"
            advice = f"name it as {role}_token in tokenizer_config.json beside it"
            raise ValueError(message(what, f"a {role} token", "none", advice))
        return token

    def _special(
        self, role: str, config: Mapping[str, Mapping[str, Any]], names: Sequence[str]
    ) -> int | None:
        """The id of a role: from the files beside the tokenizer, else by its usual names."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = config.get(name, {}).get(f"{role}_token")
            if isinstance(token, dict):
                token = token.get("content")
            found = self.token_to_id(token) if isinstance(token, str) else None
            if found is not None:
                return found
        for name in ("generation_config.json", "config.json"):
            found = config.get(name, {}).get(f"{role}_token_id")
            if isinstance(found, list) and found:
                found = found[0]
            if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < self._size:
                return found
        known = (self.token_to_id(name) for name in names)
        return next((token for token in known if token is not None), None)


class BpeTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face, whatever its model is."""

    kind = "tokenizers"
    file_name = "tokenizer.json"

    def _open(self) -> None:
        library = _import_tokenizers()
        parsed = _parse_json(self._data, self.source)
        if "model" not in parsed:
            got = ", ".join(sorted(parsed)[:5]) or "no keys"
            raise _corrupt(self.source, "a tokenizer.json with the key model", got)
        with _library_errors(self.source):
            self._main = library.Tokenizer.from_buffer(self._data)
            self._main.no_truncation()
            self._main.no_padding()
            self._add_config_tokens(library)
            vocab = self._main.get_vocab(with_added_tokens=True)
        if not vocab:
            raise _corrupt(self.source, "a vocabulary", "none")
        self._size = max(vocab.values()) + 1
        self._plain: Any = None

    def _add_config_tokens(self, library: Any) -> None:
        """Marks the special tokens that only tokenizer_config.json names, as Transformers does."""
        name = "tokenizer_config.json"
        listed = _read_json_files(self._side, self.source).get(name, {}).get("added_tokens_decoder")
        if not isinstance(listed, dict):
            return
        tokens = []
        for key, entry in listed.items():
            content = entry.get("content") if isinstance(entry, dict) else None
            if not isinstance(content, str) or self._main.token_to_id(content) is None:
                continue
            if str(self._main.token_to_id(content)) != key:
                got, advice = f"{content!r} with id {key}", "use the two files of one model"
                expected = f"the id {self._main.token_to_id(content)} of tokenizer.json"
                what = f"{name} of {self.source} disagrees"
                raise ValueError(message(what, expected, got, advice))
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            options = {flag: bool(entry[flag]) for flag in flags if flag in entry}
            tokens.append(library.AddedToken(content, **options))
        special = [token for token in tokens if token.special]
        self._main.add_special_tokens(special)
        self._main.add_tokens([token for token in tokens if not token.special])

    def _encode_batch(self, texts: list[str], special: bool) -> list[list[int]]:
        if not special and self._plain is None:
            # A tokenizer of its own: the switch belongs to the object and threads share it.
            plain = type(self._main).from_str(self._main.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        library = self._main if special else self._plain
        with _library_errors(self.source):
            if len(texts) == 1:
                return [library.encode(texts[0], add_special_tokens=False).ids]
            encoded = library.encode_batch_fast(texts, add_special_tokens=False)
            return [one.ids for one in encoded]

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        with _library_errors(self.source):
            return str(self._main.decode(ids, skip_special_tokens=skip_special))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, or None."""
        found: int | None = self._main.token_to_id(token)
        return found

    def id_to_token(self, token: int) -> str | None:
        """The token of an id as the vocabulary writes it, or None."""
        known = 0 <= token < self._size
        found: str | None = self._main.id_to_token(token) if known else None
        return found


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`, as Llama 2 and llama2.c use."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"
    _transformers_class = "LlamaTokenizer"

    def _open(self) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise missing_package("a SentencePiece .model", "sentencepiece") from None
        if not self._data:
            raise _corrupt(self.source, "a SentencePiece model", "an empty file")
        with _library_errors(self.source):
            self._main = sentencepiece.SentencePieceProcessor(model_proto=self._data)
            self._size = self._main.vocab_size()
            if self._size <= 0:
                raise ValueError("it has no pieces")
            ids = range(self._size)
            self._control = frozenset(i for i in ids if self._main.is_control(i))

    def _encode_batch(self, texts: list[str], special: bool) -> list[list[int]]:
        # Control symbols never come from text in SentencePiece, so `special` has nothing to do.
        with _library_errors(self.source):
            ids: list[list[int]] = self._main.encode(texts, out_type=int)
            return ids

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        with _library_errors(self.source):
            if skip_special or not self._control.intersection(ids):
                return str(self._main.decode(ids))
            text, start = "", 0
            for i, token in enumerate(ids):
                if token in self._control:
                    text += str(self._main.decode(ids[start:i])) + self._main.id_to_piece(token)
                    start = i + 1
            return text + str(self._main.decode(ids[start:]))

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece as the vocabulary writes it, or None."""
        found: int = self._main.piece_to_id(token)
        known = 0 <= found < self._size and self._main.id_to_piece(found) == token
        return found if known else None

    def id_to_token(self, token: int) -> str | None:
        """The piece of an id as the vocabulary writes it, or None."""
        return str(self._main.id_to_piece(token)) if 0 <= token < self._size else None

    def _special(
        self, role: str, config: Mapping[str, Mapping[str, Any]], names: Sequence[str]
    ) -> int | None:
        own = int(self._main.bos_id() if role == "bos" else self._main.eos_id())
        return own if own >= 0 else super()._special(role, config, names)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from a file or a model folder.

    In a folder, `tokenizer.json` is preferred, then `tokenizer.model`, then the only `*.model`.
    Special tokens are read from the usual JSON files beside it.
    """
    path = Path(path)
    file = _find(path) if path.is_dir() else path
    if not file.is_file():
        advice = "give a tokenizer file or a model folder that holds one"
        raise FileNotFoundError(message(f"no tokenizer at {path}", "a file", "nothing", advice))
    data = file.read_bytes()
    side = {}
    for name in _SIDE_FILES:
        beside = file.parent / name
        if beside.is_file() and beside != file:
            if beside.stat().st_size > _SIDE_LIMIT:
                raise _corrupt(str(beside), f"at most {_SIDE_LIMIT} bytes", beside.stat().st_size)
            side[name] = beside.read_bytes()
    is_json = file.suffix == ".json" or data.lstrip()[:1] == b"{"
    kind: type[Tokenizer] = BpeTokenizer if is_json else SentencePieceTokenizer
    return kind(data, side, str(file))


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ("<|endoftext|>",)
) -> Tokenizer:
    """Trains a byte-level BPE; equal texts give equal tokenizers.

    The special tokens come first; of a small corpus the vocabulary may stay below `vocab_size`.
    """
    library = _import_tokenizers()
    specials = list(special_tokens)
    if len(set(specials)) != len(specials) or not all(specials):
        advice = "remove the repeated or empty one"
        raise ValueError(message("bad special tokens", "distinct names", specials, advice))
    least = 256 + len(specials)
    if vocab_size < least:
        what, advice = "vocab_size is too small for byte-level BPE", "enlarge it"
        expected = f"at least {least}: 256 bytes and the special tokens"
        raise ValueError(message(what, expected, vocab_size, advice))

    empty = True

    def checked() -> Iterator[str]:
        nonlocal empty
        for text in texts:
            _check_text(text)
            empty = empty and not text
            yield text

    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(checked(), trainer=trainer)
    if empty:
        raise ValueError(message("no text to train on", "some text", "none", "check the inputs"))
    return BpeTokenizer(tokenizer.to_str(pretty=True).encode(), {}, "train_bpe")


def _find(folder: Path) -> Path:
    for name in (BpeTokenizer.file_name, SentencePieceTokenizer.file_name):
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    names = ", ".join(file.name for file in models) if models else "none of them"
    expected = "tokenizer.json, tokenizer.model or one *.model"
    advice = "name the file" if models else "copy the tokenizer of the model there"
    what = f"no tokenizer in the folder {folder}"
    raise FileNotFoundError(message(what, expected, names, advice))


def _import_tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise missing_package("a tokenizer.json", "tokenizers") from None
    return tokenizers


def _corrupt(source: str, expected: object, got: object) -> ValueError:
    advice = "the file is damaged or not a tokenizer: fetch it again"
    return ValueError(message(f"cannot read the tokenizer {source}", expected, got, advice))


@contextmanager
def _library_errors(source: str) -> Iterator[None]:
    """Turns what the libraries raise (Rust panics among it) into one ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise _corrupt(source, "a valid tokenizer", text) from None


def _parse_json(data: bytes, source: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:200] if len(data) else "an empty file"
        raise _corrupt(source, "JSON", text) from None
    if not isinstance(parsed, dict):
        raise _corrupt(source, "a JSON object", type(parsed).__name__)
    return parsed


def _read_json_files(side: Mapping[str, bytes], source: str) -> dict[str, dict[str, Any]]:
    parsed = {}
    for name, data in side.items():
        if name.endswith(".json"):
            parsed[name] = _parse_json(data, f"{Path(source).parent / name}")
    return parsed


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(message("not a text", "str", type(text).__name__, "decode it first"))
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            got = f"the lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
            advice = "drop such documents or replace the character"
            raise ValueError(message("not a Unicode text", "UTF-8", got, advice)) from None
