import gzip
import json
import lzma
import os
import signal
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.data import TokenFile, find_files, iter_documents, load_tokenizer, prepare

# The package's attribute of this name is the function.
module = sys.modules["eellm.data.prepare"]

SEPARATOR = "<|endoftext|>"


def documents(*paths, **options):
    return list(iter_documents(paths, **options))


def test_json_lines(tmp_path):
    texts = ["one", "zwei\nDrei", "", "😀\u2028"]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    content = ("\n\n".join(lines) + "\r\n").encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(content))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.xz"):
        assert documents(tmp_path / name, key="body") == texts
    assert documents(tmp_path, key="body") == texts * 3


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert documents(tmp_path / "a.txt") == ["one\r\ntwo\n"]
    (tmp_path / "b.txt").write_text(f"a\n{SEPARATOR}\nb b\n\n{SEPARATOR}{SEPARATOR}c\n")
    assert documents(tmp_path / "b.txt", separator=SEPARATOR) == ["a", "b b", "", "c\n"]
    (tmp_path / "c.txt").write_text(f"a{SEPARATOR}\n")
    assert documents(tmp_path / "c.txt", separator=SEPARATOR) == ["a"]


@given(st.lists(st.text(alphabet="ab<|>é", max_size=9), min_size=1, max_size=6), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_separators_across_reads(tmp_path_factory, pieces, read):
    text = "x" + "<||>".join(pieces) + "y"
    path = tmp_path_factory.mktemp("split") / "a.txt"
    path.write_text(text)
    before = module._READ
    module._READ = read
    try:
        assert documents(path, separator="<||>") == text.split("<||>")
    finally:
        module._READ = before


def test_folders_are_sorted_and_filtered(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b.txt.gz", "c.py", "a.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [str(file.relative_to(tmp_path)) for file in find_files([tmp_path])]
    assert names == ["a/b.txt.gz", "a/z.md", "b.txt"]
    assert [file.name for file in find_files([tmp_path], [".py"])] == ["c.py"]
    with pytest.raises(ValueError, match="no text in the folder"):
        find_files([tmp_path], [".rst"])
    with pytest.raises(FileNotFoundError, match="no input"):
        find_files([tmp_path / "none"])
    with pytest.raises(ValueError, match="no input"):
        find_files([])


@pytest.mark.parametrize(
    "name, content, fault",
    [
        ("a.txt", b"", "has no text"),
        ("a.txt", b" \n", "has no text"),
        ("a.jsonl", b"", "has no text"),
        ("a.jsonl", b"\n\n", "has no text"),
        ("a.txt", b"ab\xffcd", "is no text .expected UTF-8, got byte 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a.jsonl, line 2 \(expected JSON"),
        ("a.jsonl", b'{"body": "a"}\n', r"line 1 \(expected an object with the key text, got body"),
        ("a.jsonl", b'["text"]\n', "got no object"),
        ("a.jsonl", b'{"text": 3}\n', r"text \(expected a string, got int"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "lone surrogate U.D800"),
        ("a.jsonl", b'{"text": "\xff"}\n', "is no text"),
        ("a.jsonl", b"[" * 100_000, "expected JSON"),
        ("a.txt.gz", b"no gzip", "cannot decompress"),
        ("a.txt.gz", gzip.compress(b"abcd" * 999)[:-9], "cannot decompress"),
        ("a.txt.xz", lzma.compress(b"abcd" * 999)[:-9], "cannot decompress"),
        ("a.txt.xz", b"no xz file", "cannot decompress"),
    ],
)
@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_bad_inputs(tmp_path, name, content, fault, separator):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        documents(tmp_path / name, separator=separator)


def test_prepare(tmp_path, small_tokenizer):
    texts = ["one two", "drei", "", "vier fünf 😀"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    statistics = prepare([tmp_path / "a.jsonl"], tmp_path / "out", small_tokenizer)
    file = TokenFile(tmp_path / "out")
    kept = [text for text in texts if text]
    expected = [[*small_tokenizer.encode(text), small_tokenizer.eod_id] for text in kept]
    assert [file.document(i).tolist() for i in range(len(file))] == expected
    assert (statistics.documents, statistics.empty) == (3, 1)
    assert statistics.tokens == file.tokens.size
    assert statistics.bytes == sum(len(text.encode()) for text in kept)
    assert statistics.bytes_per_token == statistics.bytes / statistics.tokens
    prepare([tmp_path / "a.jsonl"], tmp_path / "bare", small_tokenizer, append_eod=False)
    assert TokenFile(tmp_path / "bare").tokens.size == file.tokens.size - 3


def test_special_tokens_in_the_text(tmp_path, small_tokenizer):
    (tmp_path / "a.txt").write_text(f"a{SEPARATOR}b")
    for special, count in ((True, 2), (False, 1)):
        prepare([tmp_path / "a.txt"], tmp_path / "out", small_tokenizer, special=special)
        tokens = TokenFile(tmp_path / "out").tokens
        assert np.count_nonzero(tokens == small_tokenizer.eod_id) == count


def test_groups_have_a_size(monkeypatch):
    monkeypatch.setattr(module, "_GROUP", 500)
    groups = list(module._grouped(["a" * 300] * 5 + ["b" * 900, "c"]))
    assert [len(group) for group in groups] == [2, 2, 2, 1]


def test_workers_change_nothing(tmp_path, small_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_GROUP", 500)
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"text": "".join(rng.choice(list("abc é😀\n"), int(rng.integers(0, 200))))})
        for _ in range(100)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    results = []
    for workers in (0, 2):
        output = tmp_path / f"out{workers}"
        statistics = prepare([tmp_path / "a.jsonl"], output, small_tokenizer, workers=workers)
        data = [output.with_suffix(end).read_bytes() for end in (".bin", ".idx")]
        results.append((statistics, data))
    assert results[0] == results[1]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """A tokenizer that ends the process that it is sent to."""

    vocab_size, eod_id, source = 10, 1, "nowhere"

    def __reduce__(self):
        return die, ()


def test_a_dead_worker_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(OSError, match="a worker process ended"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", Deadly(), workers=1)
    assert sorted(os.listdir(tmp_path)) == ["a.txt"]


def test_errors_leave_no_file(tmp_path, small_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{')
    for workers in (0, 1):
        with pytest.raises(ValueError, match="line 2"):
            prepare([tmp_path / "a.jsonl"], tmp_path / "out", small_tokenizer, workers=workers)
        assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"no documents to write .* got 1 empty documents"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", small_tokenizer)
    with pytest.raises(ValueError, match="bad number of workers"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", small_tokenizer, workers=-1)
    with pytest.raises(ValueError, match="bad separator"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", small_tokenizer, separator="")


def test_a_tokenizer_without_separator(tmp_path, small_tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(small_tokenizer, "eod_id", None)
    with pytest.raises(ValueError, match="no document separator"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", small_tokenizer)
    prepare([tmp_path / "a.txt"], tmp_path / "out", small_tokenizer, append_eod=False)


def test_progress(tmp_path, small_tokenizer, capsys):
    (tmp_path / "a.txt").write_text("é" * 10)

    class Bar:
        done, closed = 0, False

        def update(self, count):
            self.done += count

        def close(self):
            self.closed = True

    bar = Bar()
    prepare([tmp_path / "a.txt"], tmp_path / "out", small_tokenizer, progress=lambda: bar)
    assert bar.done == 20 and bar.closed
    pytest.importorskip("tqdm")
    prepare([tmp_path / "a.txt"], tmp_path / "out", small_tokenizer, progress=True)
    assert "tokens" in capsys.readouterr().err


def fuzz(path, content, seed, count):
    rng = np.random.default_rng(seed)
    read = 0
    for i in range(count):
        data = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(data)))
            match int(rng.integers(3)):
                case 0:
                    data[place] = rng.integers(256)
                case 1:
                    data[place:place] = rng.bytes(3)
                case 2:
                    del data[max(place, 1) : place + 9]
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            for text in documents(path):
                text.encode()
            read += 1
        except (ValueError, OSError):
            pass
        except BaseException:
            print(f"seed {seed}, input {i}")
            raise
    return read


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt.xz"])
@pytest.mark.parametrize(
    "count", [pytest.param(3_400, id="short"), pytest.param(34_000, marks=pytest.mark.long)]
)
def test_fuzz(tmp_path, name, count):
    content = b'{"text": "ab\\u00e9\\n"}\n{"text": "\xc3\xa9", "n": [1, 2.5, null]}\n'
    pack = {"gz": gzip.compress, "xz": lzma.compress}.get(name.split(".")[-1], bytes)
    assert 0 <= fuzz(tmp_path / name, pack(content), 31, count) < count


def test_fuzz_negative_control(tmp_path, monkeypatch):
    """Without the checks of a line the same inputs raise what no user should see."""
    monkeypatch.setattr(module, "_json_text", lambda line, where, key: json.loads(line)[key])
    with pytest.raises((KeyError, TypeError, AttributeError)):
        test_fuzz(tmp_path, "a.jsonl", 3_400)


def test_real_files(real_data, tmp_path):
    tokenizer = load_tokenizer(real_data("tokenizers/llama2/tokenizer.model"))
    lambada = real_data("eval/lambada_test.jsonl")
    texts = documents(lambada)
    assert len(texts) == 5153
    prepare([lambada], tmp_path / "lambada", tokenizer)
    file = TokenFile(tmp_path / "lambada")
    assert len(file) == len(texts)
    for i in (0, 17, 5152):
        assert file.document(i).tolist() == [*tokenizer.encode(texts[i]), tokenizer.eos_id]
    novels = real_data("corpora/novels_valid.txt.xz")
    pieces = documents(novels, separator=SEPARATOR)
    whole = lzma.decompress(novels.read_bytes()).decode("utf-8-sig")
    assert [p for p in pieces if p] == [
        p for p in (part.strip("\n") for part in whole.split(SEPARATOR)) if p
    ]
