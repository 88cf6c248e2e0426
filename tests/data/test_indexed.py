import itertools
import os
import pickle
import struct
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.data import TokenFile, TokenFileWriter, merge

DOCUMENTS = [[1, 2, 3], [], [65000], list(range(500)), [7, 7]]


def write(prefix, documents=DOCUMENTS, vocab_size=65499):
    with TokenFileWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def naive_read(prefix):
    """Reads the two files with struct alone, number by number."""
    codes = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
    with open(f"{prefix}.idx", "rb") as stream:
        assert stream.read(9) == b"MMIDIDX\x00\x00"
        assert struct.unpack("<Q", stream.read(8)) == (1,)
        code = codes[stream.read(1)[0]]
        sequences, marks = struct.unpack("<QQ", stream.read(16))
        sizes = struct.unpack(f"<{sequences}i", stream.read(4 * sequences))
        pointers = struct.unpack(f"<{sequences}q", stream.read(8 * sequences))
        documents = struct.unpack(f"<{marks}q", stream.read(8 * marks))
        assert stream.read() == b""
    with open(f"{prefix}.bin", "rb") as stream:
        data = stream.read()
    rows = [
        list(struct.unpack_from(f"<{size}{code}", data, pointer))
        for size, pointer in zip(sizes, pointers, strict=True)
    ]
    pairs = itertools.pairwise(documents)
    return [list(itertools.chain(*rows[begin:end])) for begin, end in pairs]


@pytest.mark.parametrize(
    "vocab_size, dtype", [(65499, "<u2"), (65500, "<i4"), (None, "<i4"), (2**31, "<i4")]
)
def test_round_trip(tmp_path, vocab_size, dtype):
    prefix = write(tmp_path / "data", vocab_size=vocab_size)
    assert naive_read(prefix) == DOCUMENTS
    for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        file = TokenFile(name)
        assert file.dtype == np.dtype(dtype) and len(file) == len(DOCUMENTS)
        assert [file.document(i).tolist() for i in range(len(file))] == DOCUMENTS
        assert file.sizes.tolist() == [len(document) for document in DOCUMENTS]
        assert file.largest_token() == 65000
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.idx"]
    copy = pickle.loads(pickle.dumps(file))
    assert copy.tokens.tolist() == file.tokens.tolist()


def test_exact_bytes(tmp_path):
    write(tmp_path / "data", [[258, 3], [4]])
    assert (tmp_path / "data.bin").read_bytes() == b"\x02\x01\x03\x00\x04\x00"
    expected = b"MMIDIDX\0\0" + b"\1" + bytes(7) + b"\x08" + b"\2" + bytes(7) + b"\3" + bytes(7)
    expected += b"\2\0\0\0\1\0\0\0" + bytes(8) + b"\4" + bytes(7)
    expected += bytes(8) + b"\1" + bytes(7) + b"\2" + bytes(7)
    assert (tmp_path / "data.idx").read_bytes() == expected


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=8))
@settings(max_examples=60, deadline=None)
def test_round_trip_of_anything(tmp_path_factory, documents):
    prefix = write(tmp_path_factory.mktemp("any") / "data", documents, None)
    file = TokenFile(prefix)
    assert naive_read(prefix) == documents
    assert [file.document(i).tolist() for i in range(len(file))] == documents


def test_reading_copies_nothing(tmp_path):
    file = TokenFile(write(tmp_path / "data"))
    view = file.document(3)
    assert not view.flags.owndata and np.shares_memory(view, file.tokens)
    assert not view.flags.writeable


def test_documents_of_several_sequences(tmp_path):
    prefix = write(tmp_path / "data", [[1, 2], [3], [4, 5]])
    index = bytearray((tmp_path / "data.idx").read_bytes())
    struct.pack_into("<Q", index, 26, 3)
    del index[-32:]
    index += struct.pack("<3q", 0, 2, 3)
    (tmp_path / "data.idx").write_bytes(index)
    file = TokenFile(prefix)
    assert [file.document(i).tolist() for i in range(len(file))] == [[1, 2, 3], [4, 5]]
    assert naive_read(prefix) == [[1, 2, 3], [4, 5]]


def test_checks_cross_chunks(tmp_path, monkeypatch):
    documents = [[i] * (i % 4) for i in range(50)]
    monkeypatch.setattr("eellm.data.indexed._CHUNK", 7)
    file = TokenFile(write(tmp_path / "data", documents))
    assert [file.document(i).tolist() for i in range(50)] == documents
    assert file.largest_token() == 49
    merge([tmp_path / "data", tmp_path / "data"], tmp_path / "both")
    assert naive_read(tmp_path / "both") == documents * 2


def test_an_exception_leaves_what_was_there(tmp_path):
    prefix = write(tmp_path / "data", [[1]])
    with pytest.raises(RuntimeError), TokenFileWriter(prefix, 100) as writer:
        writer.add([5, 6])
        raise RuntimeError
    assert naive_read(prefix) == [[1]]
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.idx"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_failed_writes_never_leave_a_wrong_file(tmp_path, monkeypatch, failing, at):
    """After any failed step the file is the old one, the new one, or said to be missing."""
    prefix = write(tmp_path / "data", [[1]])
    real, calls = getattr(os, failing), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise OSError("disk full")
        return real(*arguments)

    monkeypatch.setattr(os, failing, fails)
    try:
        write(prefix, [[2, 3], [4]])
        failed = False
    except OSError:
        failed = True
    monkeypatch.undo()
    assert failed == (at <= len(calls))
    assert not list(tmp_path.glob("*.tmp"))
    try:
        assert [d.tolist() for d in map(TokenFile(prefix).document, [0])] in ([[1]], [[2, 3]])
        assert naive_read(prefix) in ([[1]], [[2, 3], [4]])
    except FileNotFoundError:
        assert failed


def test_writer_refuses_bad_documents(tmp_path):
    with TokenFileWriter(tmp_path / "data", 100) as writer:
        for bad, fault in [
            ([100], "token out of range .* got 100 to 100"),
            ([-1], "token out of range"),
            ([1.5], "bad document"),
            ([[1]], "bad document"),
        ]:
            with pytest.raises(ValueError, match=fault):
                writer.add(bad)
        with pytest.raises(ValueError, match="bad document sizes"):
            writer.add_many(np.array([1, 2]), [1])
        writer.add([99])
    with pytest.raises(ValueError, match="a closed one"):
        writer.add([1])
    assert naive_read(tmp_path / "data") == [[99]]


def test_merge(tmp_path):
    write(tmp_path / "a", [[1, 2], [3]], 100)
    write(tmp_path / "b", [[70000]], None)
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c") == 3
    assert naive_read(tmp_path / "c") == [[1, 2], [3], [70000]]
    assert merge([tmp_path / "a"], tmp_path / "d") == 2
    assert TokenFile(tmp_path / "d").dtype == np.uint16
    with pytest.raises(ValueError, match="into itself"):
        merge([tmp_path / "a"], tmp_path / "a.bin")
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([], tmp_path / "e")


def patched(tmp_path, offset, layout, value):
    prefix = write(tmp_path / "data", [[1, 2], [3], [4, 5, 6]])
    index = bytearray((tmp_path / "data.idx").read_bytes())
    struct.pack_into(layout, index, offset, value)
    (tmp_path / "data.idx").write_bytes(index)
    return prefix


@pytest.mark.parametrize(
    "offset, layout, value, fault",
    [
        (0, "<B", 0, "bad magic"),
        (9, "<Q", 2, "bad version .expected 1, got 2"),
        (17, "<B", 6, "bad dtype .* got 6: float64"),
        (17, "<B", 7, "bad dtype .* got 7: float32"),
        (17, "<B", 0, "bad dtype"),
        (17, "<B", 9, "bad dtype"),
        (17, "<B", 4, "bad pointer of sequence 1 .expected 8, got 4"),
        (18, "<Q", 2**64 - 1, "bad length"),
        (18, "<Q", 4, "bad length"),
        (26, "<Q", 2**61, "bad length"),
        (26, "<Q", 0, "bad document count"),
        (34, "<i", -2, "bad size of sequence 0"),
        (38, "<i", 2, "bad pointer of sequence 2"),
        (42, "<i", 2**31 - 1, "bad length"),
        (42, "<i", 2, "bad length"),
        (46, "<q", 2, "bad pointer of sequence 0 .expected 0, got 2"),
        (54, "<q", -4, "bad pointer of sequence 1"),
        (54, "<q", 2**62, "bad pointer of sequence 1"),
        (70, "<q", 1, "bad document index 0"),
        (78, "<q", -1, "bad document index 1"),
        (86, "<q", 0, "bad document index 2 .expected at least 1, got 0"),
        (94, "<q", 4, "bad last document index"),
        (94, "<q", 2, "bad last document index"),
        (94, "<q", 2**63 - 1, "bad last document index"),
    ],
)
def test_reader_names_the_bad_field(tmp_path, offset, layout, value, fault):
    with pytest.raises(ValueError, match=rf"data\.(idx|bin): {fault}.*; the file is damaged"):
        TokenFile(patched(tmp_path, offset, layout, value))


def test_reader_refuses_every_truncation(tmp_path):
    prefix = write(tmp_path / "data", [[1, 2], [3]])
    for name in ("data.idx", "data.bin"):
        whole = (tmp_path / name).read_bytes()
        for length in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"{name}: bad length"):
                TokenFile(prefix)
        (tmp_path / name).write_bytes(whole + b"\0")
        with pytest.raises(ValueError, match=f"{name}: bad length"):
            TokenFile(prefix)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no token file .*data\.bin"):
        TokenFile(prefix)


def test_no_documents(tmp_path):
    file = TokenFile(write(tmp_path / "data", []))
    assert len(file) == 0 and file.tokens.size == 0 and file.largest_token() == -1
    with pytest.raises(ValueError, match="no such document"):
        file.document(0)


INTERESTING = [
    0,
    1,
    2,
    3,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**64 - 1,
]


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(len(data) + 1))
        match int(rng.integers(5)):
            case 0 if place < len(data):
                data[place] = rng.integers(256)
            case 1:
                value = INTERESTING[rng.integers(len(INTERESTING))].to_bytes(8, "little")
                width = (1, 4, 8)[rng.integers(3)]
                data[place : place + width] = value[:width]
            case 2:
                data[place:place] = rng.bytes(int(rng.integers(1, 17)))
            case 3:
                del data[place : place + int(rng.integers(1, 17))]
            case 4 if rng.random() < 0.2:
                del data[place:]
    return bytes(data)


def fuzz(tmp_path, seed, count, faults=None):
    """Returns how many mutated files were read; any other exception than the two is a failure."""
    rng = np.random.default_rng(seed)
    prefix = write(tmp_path / "data", [[1, 2, 3], [4], [], [5, 6]], 100)
    index, data = (tmp_path / "data.idx").read_bytes(), (tmp_path / "data.bin").read_bytes()
    read = 0
    for i in range(count):
        which = rng.random()
        for name, whole, change in (("idx", index, which < 0.9), ("bin", data, which > 0.7)):
            # Some file systems flush a file to the disk when it is cut and written again.
            (tmp_path / f"data.{name}").unlink()
            (tmp_path / f"data.{name}").write_bytes(mutated(whole, rng) if change else whole)
        try:
            file = TokenFile(prefix)
        except (ValueError, OSError):
            continue
        except BaseException:
            print(f"seed {seed}, input {i}")
            raise
        read += 1
        total = sum(int(file.document(k).sum()) >= -(2**40) for k in range(len(file)))
        size = sum(file.document(k).size for k in range(len(file)))
        if total != len(file) or size != file.tokens.size:
            if faults is None:
                raise AssertionError(f"seed {seed}, input {i}: documents are not the whole file")
            faults.append(i)
    return read


@pytest.mark.parametrize(
    "count", [pytest.param(10_000, id="short"), pytest.param(100_000, marks=pytest.mark.long)]
)
def test_fuzz(tmp_path, count):
    assert 0 < fuzz(tmp_path, 21, count) < count // 4


def test_fuzz_allocates_little(tmp_path):
    tracemalloc.start()
    try:
        fuzz(tmp_path, 22, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20, "a damaged file of 200 bytes must not make the reader take megabytes"


def test_fuzz_negative_control(tmp_path, monkeypatch):
    """Without the check of document indices the same inputs break the reader."""
    monkeypatch.setattr(TokenFile, "_check_documents", lambda *_: None)
    faults = []
    try:
        fuzz(tmp_path, 21, 10_000, faults)
    except IndexError:
        return
    assert faults


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        indexed = pytest.importorskip(
            "megatron.core.datasets.indexed_dataset", reason="needs the package megatron-core"
        )
    torch = pytest.importorskip("torch")
    documents = [document for document in DOCUMENTS if document]
    for vocab_size in (65499, None):
        prefix = str(write(tmp_path / f"ours{vocab_size}", documents, vocab_size))
        theirs = indexed.IndexedDataset(prefix)
        assert [theirs[i].tolist() for i in range(len(theirs))] == documents
        assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
        copy = tmp_path / f"theirs{vocab_size}"
        builder = indexed.IndexedDatasetBuilder(
            f"{copy}.bin", dtype=indexed.DType.optimal_dtype(vocab_size)
        )
        for document in documents:
            builder.add_document(torch.tensor(document), [len(document)])
        builder.finalize(f"{copy}.idx")
        for end in (".bin", ".idx"):
            assert (tmp_path / f"{copy}{end}").read_bytes() == Path(prefix + end).read_bytes()
        assert TokenFile(copy).document(2).tolist() == documents[2]
