import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.data import MissingPackageError, StreamDecoder, load_tokenizer, train_bpe
from eellm.data.tokenizers import BpeTokenizer, SentencePieceTokenizer
from tests.data.conftest import TEXTS

TRICKY = "a é 你好 😀 👩‍👩‍👧\u0301\n\t  two  spaces \u200b\ufffd end"


def streamed(tokenizer, ids, **options):
    decoder = tokenizer.stream(**options)
    return [*map(decoder.put, ids), decoder.finish()]


@pytest.mark.parametrize("text", [*TEXTS, TRICKY, "", "\r\n", "\x00"])
def test_byte_level_round_trip(small_tokenizer, text):
    ids = small_tokenizer.encode(text)
    assert ids.dtype == np.int32 and small_tokenizer.decode(ids) == text
    assert "".join(streamed(small_tokenizer, ids)) == text


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_stream_joins_to_decode(small_tokenizer, text):
    ids = small_tokenizer.encode(text, special=False)
    pieces = streamed(small_tokenizer, ids)
    assert "".join(pieces) == small_tokenizer.decode(ids) == text


def bytes_tokenizer():
    """A byte-level tokenizer without merges: every token is one byte."""
    return train_bpe(["a"], 257)


def test_stream_never_shows_half_a_character():
    tokenizer = bytes_tokenizer()
    text = "aé你😀" * 3 + "👩‍👩‍👧"
    ids = tokenizer.encode(text)
    assert ids.size == len(text.encode())
    seen = ""
    decoder = tokenizer.stream()
    for count, token in enumerate(ids, 1):
        seen += decoder.put(token)
        # Exactly the whole characters of the bytes so far, at every split point.
        assert seen == text.encode()[:count].decode("utf-8", errors="ignore")
    assert decoder.finish() == ""


def test_stream_splits_inside_multi_character_tokens():
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode("你😀😀")
    for cut in range(ids.size + 1):
        decoder = tokenizer.stream(ids[:0])
        head = "".join(map(decoder.put, ids[:cut])) + decoder.finish()
        assert head == ids_bytes(tokenizer, ids[:cut]).decode("utf-8", errors="replace")


def ids_bytes(tokenizer, ids):
    table = {tokenizer.encode(chr(i))[0]: i for i in range(128)}
    data = "你😀😀".encode()
    for token, byte in zip(tokenizer.encode("你😀😀"), data, strict=True):
        table[token] = byte
    return bytes(table[token] for token in ids)


@given(st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_stream_of_invalid_bytes_ends_like_python(data):
    tokenizer = bytes_tokenizer()
    table = byte_table(tokenizer)
    pieces = streamed(tokenizer, [table[byte] for byte in data])
    assert "".join(pieces) == data.decode("utf-8", errors="replace")


def byte_table(tokenizer):
    """The id of each byte: printable bytes stand for themselves, the others from U+0100 on."""
    table, spare = {}, 0
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        table[byte] = tokenizer.token_to_id(chr(byte if printable else 256 + spare))
        spare += not printable
    return table


def test_stream_stays_short_on_endless_rubbish():
    tokenizer = bytes_tokenizer()
    half = byte_table(tokenizer)[0xE4]
    pieces = streamed(tokenizer, [half] * 1000)
    assert "".join(pieces) == "\ufffd" * 1000
    assert sum(map(len, pieces[:-1])) >= 900
    special = tokenizer.token_to_id("<|endoftext|>")
    assert "".join(streamed(tokenizer, [special] * 1000)) == ""


def test_stream_negative_control(small_tokenizer):
    """Decoding each id alone, the naive way, breaks characters."""
    ids = small_tokenizer.encode("😄 ž")
    naive = "".join(small_tokenizer.decode([token]) for token in ids)
    assert "\ufffd" in naive and "\ufffd" not in "".join(streamed(small_tokenizer, ids))


def test_training_is_deterministic_over_processes(small_tokenizer, tmp_path):
    code = (
        "import sys; from eellm.data import train_bpe; from tests.data.conftest import TEXTS;"
        "train_bpe(TEXTS, 400).save(sys.argv[1])"
    )
    for seed in "12":
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        subprocess.run(command, check=True, env=environment)
    files = [(tmp_path / seed / "tokenizer.json").read_bytes() for seed in "12"]
    assert files[0] == files[1]
    assert (
        load_tokenizer(tmp_path / "1").encode(TEXTS[0]).tolist()
        == small_tokenizer.encode(TEXTS[0]).tolist()
    )


def test_training_wants_text_and_room():
    for texts, size, options, fault in [
        (["a"], 100, {}, "vocab_size is too small"),
        ([], 300, {}, "no text to train on"),
        ([""], 300, {}, "no text to train on"),
        (["a"], 300, {"special_tokens": ["x", "x"]}, "bad special tokens"),
        (["a\ud800"], 300, {}, "lone surrogate U\\+D800"),
    ]:
        with pytest.raises(ValueError, match=fault):
            train_bpe(texts, size, **options)


def test_special_tokens_as_text(small_tokenizer):
    text = "a<|endoftext|>b"
    eod = small_tokenizer.eod_id
    assert eod == small_tokenizer.eos_id == 0
    assert eod in small_tokenizer.encode(text)
    plain = small_tokenizer.encode(text, special=False)
    assert eod not in plain and small_tokenizer.decode(plain) == text
    assert eod in small_tokenizer.encode(text), "the switch must not stick"
    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids) == "ab"
    assert small_tokenizer.decode(ids, skip_special=False) == text
    assert small_tokenizer.encode("a", add_eos=True)[-1] == eod
    with pytest.raises(ValueError, match="no bos token"):
        small_tokenizer.encode("a", add_bos=True)


def test_ids_outside_the_vocabulary(small_tokenizer):
    size = small_tokenizer.vocab_size
    ids = [*small_tokenizer.encode("ab"), size, size + 9, *small_tokenizer.encode("c")]
    assert small_tokenizer.decode(ids) == "ab\ufffd\ufffdc"
    assert "".join(streamed(small_tokenizer, ids)) == "ab\ufffd\ufffdc"
    assert small_tokenizer.id_to_token(size) is None and small_tokenizer.id_to_token(-1) is None
    assert small_tokenizer.token_to_id("no such token") is None
    with pytest.raises(ValueError, match="token id out of range"):
        small_tokenizer.decode([-1])


@pytest.mark.parametrize("bad", ["a\ud800", b"bytes", None])
def test_encode_refuses_what_is_no_text(small_tokenizer, bad):
    with pytest.raises(ValueError, match="not a"):
        small_tokenizer.encode(bad)


def test_save_and_load(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    again = pickle.loads(pickle.dumps(loaded))
    assert (tmp_path / "tokenizer_config.json").exists()
    for other in (loaded, again, load_tokenizer(tmp_path / "tokenizer.json")):
        assert other.encode(TRICKY).tolist() == small_tokenizer.encode(TRICKY).tolist()
        assert (other.vocab_size, other.eos_id, other.eod_id) == (400, 0, 0)


def test_special_tokens_come_from_the_files_beside(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "a"}, "eos_token": "b"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.bos_id == loaded.token_to_id("a") and loaded.eos_id == loaded.token_to_id("b")
    assert loaded.eod_id == 0
    config.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": [9, 10]}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (7, 9)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json \(expected JSON"):
        load_tokenizer(tmp_path)


def test_added_tokens_of_the_config(tmp_path):
    plain = train_bpe(["a <|im_end|> b"] * 50, 280, special_tokens=())
    plain.save(tmp_path)
    word = "<|im_end|>"
    token = plain.encode(word)[0]
    entry = {str(token): {"content": plain.id_to_token(token), "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entry}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode([token]) == "" and loaded.decode([token], skip_special=False)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"9": entry[str(token)]}})
    )
    with pytest.raises(ValueError, match="disagrees"):
        load_tokenizer(tmp_path)


def test_missing_and_ambiguous_files(tmp_path, small_tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in the folder .*copy the tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "none.json")
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"got a\.model, b\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"{}", b"[]", b"null", b"[" * 100_000, b'{"model": 3}', b"\xff{", b"\x00"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_corrupt_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read the tokenizer .* fetch it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_missing_package(tmp_path, name, monkeypatch):
    package = "tokenizers" if name.endswith("json") else "sentencepiece"
    (tmp_path / name).write_bytes(b"{}" if name.endswith("json") else b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"run: pip install {package}"):
        load_tokenizer(tmp_path)


def test_libraries_are_loaded_late():
    code = (
        "import sys, eellm.data;"
        "print([m for m in ('tokenizers', 'sentencepiece', 'tqdm', 'torch') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(len(data)))
        match int(rng.integers(4)):
            case 0:
                data[place] = rng.integers(256)
            case 1:
                data[place:place] = rng.bytes(int(rng.integers(1, 9)))
            case 2:
                del data[place : place + int(rng.integers(1, 9))]
            case 3:
                del data[max(place, 1) :]
    return bytes(data)


def fuzz(kind, data, seed, count):
    rng = np.random.default_rng(seed)
    loaded = 0
    for i in range(count):
        try:
            tokenizer = kind(mutated(data, rng), {}, "fuzz")
            tokenizer.decode(tokenizer.encode("Once upon a time, w\u00f6rld"))
            tokenizer.decode(range(min(tokenizer.vocab_size, 50)), skip_special=False)
            loaded += 1
        except ValueError:
            pass
        except BaseException:
            print(f"seed {seed}, input {i}")
            raise
    return loaded


@pytest.mark.parametrize(
    "count", [pytest.param(10_000, id="short"), pytest.param(100_000, marks=pytest.mark.long)]
)
def test_fuzz_tokenizer_json(count):
    data = train_bpe(["a b"], 257)._data
    assert 0 < fuzz(BpeTokenizer, data, 11, count) < count


@pytest.mark.parametrize(
    "count", [pytest.param(10_000, id="short"), pytest.param(100_000, marks=pytest.mark.long)]
)
def test_fuzz_sentencepiece(count, real_data):
    data = real_data("models/stories260K/tok512.model").read_bytes()
    assert 0 < fuzz(SentencePieceTokenizer, data, 12, count) < count


def test_gpt2_against_the_library(real_data):
    tokenizers = pytest.importorskip("tokenizers")
    path = real_data("tokenizers/gpt2/tokenizer.json")
    text = real_data("corpora/tinyshakespeare.txt").read_text()[:200_000] + TRICKY
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    expected = theirs.encode(text, add_special_tokens=False).ids
    ids = ours.encode(text)
    assert ids.tolist() == expected
    assert ours.decode(ids) == theirs.decode(expected) == text
    assert (ours.vocab_size, ours.eos_id, ours.eod_id) == (50257, 50256, 50256)
    assert "".join(streamed(ours, ids[-3000:])) == ours.decode(ids[-3000:])


@pytest.mark.parametrize(
    "name", ["tokenizers/llama2/tokenizer.model", "models/stories260K/tok512.model"]
)
def test_sentencepiece_against_the_library(real_data, name, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = real_data(name)
    text = real_data("corpora/tinystories_valid.txt").read_text()[:20_000] + TRICKY
    ours = load_tokenizer(path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = ours.encode(text, add_bos=True)
    assert ids.tolist() == [1, *theirs.encode(text)]
    assert ours.decode(ids) == theirs.decode(theirs.encode(text))
    assert "".join(streamed(ours, ids)) == ours.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.eod_id) == (1, 2, 2)
    assert ours.vocab_size == theirs.vocab_size()
    assert ours.encode("a", add_bos=True, add_eos=True).tolist()[::2] == [1, 2]
    assert ours.decode([1, *theirs.encode("a"), 2], skip_special=False) == "<s>a</s>"
    assert ours.token_to_id("<s>") == 1 and ours.id_to_token(2) == "</s>"
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()
    again = pickle.loads(pickle.dumps(load_tokenizer(tmp_path)))
    assert again.encode(text).tolist() == theirs.encode(text)


def test_sentencepiece_bytes_and_prompt(real_data):
    tokenizer = load_tokenizer(real_data("tokenizers/llama2/tokenizer.model"))
    for text in ["Hello 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 world", "ⵣ😀ⵣ", "a  b\n\n  c"]:
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
        for cut in range(1, ids.size):
            if "\ufffd" in tokenizer.decode(ids[:cut]):
                continue
            rest = "".join(streamed(tokenizer, ids[cut:], prompt=ids[:cut]))
            assert tokenizer.decode(ids[:cut]) + rest == text
    assert isinstance(tokenizer.stream(), StreamDecoder)


def test_transformers_reads_what_is_saved(small_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    small_tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, TRICKY]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert small_tokenizer.encode(text).tolist() == ids
        assert theirs.decode(ids) == small_tokenizer.decode(ids)
    assert theirs.eos_token_id == small_tokenizer.eos_id


def test_transformers_agrees_on_the_small_real_tokenizer(real_data):
    transformers = pytest.importorskip("transformers")
    folder = real_data("tokenizers/small")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    text = "a<|endoftext|>b <|pad|> c"
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)
    assert ours.eod_id == theirs.convert_tokens_to_ids("<|endoftext|>")
    assert ours.eos_id == theirs.eos_token_id and ours.bos_id == theirs.bos_token_id
