import os
import subprocess
import sys
import time
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.data import PackedDataset, TokenArray, TokenFile, TokenFileWriter
from eellm.data.packing import DOCUMENTS, WINDOWS, permutation

MASK = 2**64 - 1


def philox(counter, key):
    """Philox4x64-10 (Salmon et al., 2011), as the paper writes it."""
    x, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [(p1 >> 64) ^ x[1] ^ k0, p1 & MASK, (p0 >> 64) ^ x[3] ^ k1, p0 & MASK]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return x


def naive_permutation(seed, epoch, purpose, count):
    words = []
    for block in range(1, count // 4 + 2):
        words += philox((block, 0, 0, 0), (seed, epoch * 256 + purpose))
    return sorted(range(count), key=lambda i: words[i])


def naive_epoch(documents, seq_length, seed, epoch, shuffle=True):
    """The windows of an epoch, token by token: (tokens, ends) each."""
    order = range(len(documents))
    if shuffle:
        order = naive_permutation(seed, epoch, DOCUMENTS, len(documents))
    stream, last = [], []
    for i in order:
        for j, token in enumerate(documents[i]):
            stream.append(token)
            last.append(j == len(documents[i]) - 1)
    windows = []
    start = 0
    while start + seq_length + 1 <= len(stream):
        window = stream[start : start + seq_length + 1]
        windows.append((window, last[start : start + seq_length]))
        start += seq_length
    if shuffle:
        windows = [windows[i] for i in naive_permutation(seed, epoch, WINDOWS, len(windows))]
    return windows


class Source:
    """A token source of lists."""

    def __init__(self, documents, dtype=np.uint16):
        self.tokens = np.array(list(chain(*documents)), dtype=dtype)
        self.bounds = np.cumsum([0, *map(len, documents)])


def random_documents(rng, count, longest):
    return [rng.integers(1, 1000, int(rng.integers(0, longest + 1))).tolist() for _ in range(count)]


def test_philox_known_answer():
    """The all-zero vector of the paper's reference code."""
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox((0, 0, 0, 0), (0, 0)) == expected


@pytest.mark.parametrize("seed", [0, 1, 1234, 2**64 - 1])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_permutation_against_the_paper(seed, epoch, count):
    ours = permutation(seed, epoch, WINDOWS, count)
    assert ours.tolist() == naive_permutation(seed, epoch, WINDOWS, count)
    assert sorted(ours.tolist()) == list(range(count))


def test_permutations_differ():
    seen = {tuple(permutation(s, e, p, 50)) for s in (0, 1) for e in (0, 1) for p in (0, 1)}
    assert len(seen) == 8


@given(
    st.integers(0, 2**32),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 2**64 - 1),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_windows_against_naive(data_seed, count, seq_length, seed, shuffle):
    documents = random_documents(np.random.default_rng(data_seed), count, 12)
    if sum(map(len, documents)) < seq_length + 1:
        with pytest.raises(ValueError, match="too little data"):
            PackedDataset(Source(documents), seq_length)
        return
    dataset = PackedDataset(Source(documents), seq_length, seed=seed, shuffle=shuffle)
    expected = []
    for epoch in range(3):
        expected += naive_epoch(documents, seq_length, seed, epoch, shuffle)
    assert dataset.window_count * 3 == len(expected)
    tokens, ends = dataset.windows(np.arange(len(expected)))
    assert tokens.dtype == np.int32 and tokens.tolist() == [window for window, _ in expected]
    assert ends.tolist() == [last for _, last in expected]


def test_a_sample_depends_on_nothing_before_it():
    documents = random_documents(np.random.default_rng(5), 40, 30)
    dataset = PackedDataset(Source(documents), 7, seed=3)
    order = np.random.default_rng(0).permutation(dataset.window_count * 4)
    tokens, ends = dataset.windows(np.arange(order.size))
    for i in order:
        fresh = PackedDataset(Source(documents), 7, seed=3) if i % 50 == 0 else dataset
        window = fresh.sample(int(i))
        assert (window.tokens == tokens[i]).all() and (window.ends == ends[i]).all()
        assert (window.inputs == tokens[i, :-1]).all() and (window.targets == tokens[i, 1:]).all()


def test_every_token_is_a_target_once():
    """Of an epoch, but for the first token and fewer than seq_length at the end."""
    documents = [list(range(100 * i, 100 * i + 13)) for i in range(1, 9)]
    for shuffle in (True, False):
        dataset = PackedDataset(Source(documents), 5, shuffle=shuffle)
        targets = dataset.windows(np.arange(dataset.window_count))[0][:, 1:].reshape(-1)
        assert np.unique(targets).size == targets.size == (8 * 13 - 1) // 5 * 5


def test_windows_negative_control():
    """Windows without the overlap of one token are not what the naive reading gives."""
    documents = random_documents(np.random.default_rng(1), 20, 30)
    expected = naive_epoch(documents, 6, 0, 0, shuffle=False)
    stream = list(chain(*documents))
    wrong = [stream[i * 7 : i * 7 + 7] for i in range(len(expected))]
    assert wrong != [window for window, _ in expected]


def test_separators_and_document_ends():
    documents = [[5, 9, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6]]
    plain = PackedDataset(Source(documents), 10, shuffle=False).sample(0)
    assert np.flatnonzero(plain.ends).tolist() == [3, 5]
    both = PackedDataset(Source(documents), 10, shuffle=False, eod_id=9).sample(0)
    assert np.flatnonzero(both.ends).tolist() == [1, 3, 5]


def test_part_of_the_documents():
    documents = random_documents(np.random.default_rng(2), 30, 20)
    chosen = [3, 4, 11, 29]
    part = PackedDataset(Source(documents), 4, seed=1, documents=chosen)
    alone = PackedDataset(Source([documents[i] for i in chosen]), 4, seed=1)
    ids = np.arange(2 * alone.window_count)
    assert (part.windows(ids)[0] == alone.windows(ids)[0]).all()
    with pytest.raises(ValueError, match="document number out of range"):
        PackedDataset(Source(documents), 4, documents=[30])


def test_token_array():
    source = TokenArray([1, 0, 2, 3, 0, 4], eod_id=0)
    assert source.bounds.tolist() == [0, 2, 5, 6] and len(source) == 3
    assert TokenArray([1, 0], eod_id=0).bounds.tolist() == [0, 2]
    assert TokenArray(np.arange(5)).bounds.tolist() == [0, 5]
    for bad in ([], [[1]], [0.5]):
        with pytest.raises(ValueError, match="bad tokens"):
            TokenArray(bad)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_token_types(dtype):
    source = Source([[1, 2, 3], [4, 5, 6, 7]], dtype)
    dataset = PackedDataset(source, 6, shuffle=False)
    assert dataset.sample(0).tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    if np.dtype(dtype).kind == "i":
        source.tokens[3] = -1
        with pytest.raises(ValueError, match=r"token out of range .* got -1"):
            dataset.sample(0)
    if dtype is np.int64:
        source.tokens[3] = 2**31
        with pytest.raises(ValueError, match=r"token out of range .* got 2147483648"):
            dataset.sample(0)


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"seq_length": 0}, "bad seq_length"),
        ({"seq_length": 2**24}, "bad seq_length"),
        ({"seq_length": 4}, "too little data .* got 4 tokens in 1 documents"),
        ({"seq_length": 2, "seed": -1}, "bad seed"),
        ({"seq_length": 2, "seed": 2**64}, "bad seed"),
    ],
)
def test_bad_options(options, fault):
    with pytest.raises(ValueError, match=fault):
        PackedDataset(TokenArray([1, 2, 3, 4]), **options)


@pytest.mark.parametrize("sample", [-1, 2**40])
def test_sample_out_of_range(sample):
    with pytest.raises(ValueError, match="sample number out of range"):
        PackedDataset(TokenArray([1, 2, 3, 4]), 2).sample(sample)


def test_equal_in_another_process(tmp_path):
    with TokenFileWriter(tmp_path / "data", 1000) as writer:
        for document in random_documents(np.random.default_rng(3), 50, 40):
            writer.add(document)
    code = (
        "import sys, numpy as np; from eellm.data import *;"
        "d = PackedDataset(TokenFile(sys.argv[1]), 16, seed=9);"
        "sys.stdout.buffer.write(d.windows(np.arange(100))[0].tobytes())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    output = subprocess.run(command, check=True, capture_output=True, env=environment).stdout
    dataset = PackedDataset(TokenFile(tmp_path / "data"), 16, seed=9)
    assert dataset.windows(np.arange(100))[0].tobytes() == output


def test_reading_is_no_python_loop_over_tokens():
    """A hundred tokens may cost no more than a Python loop takes for one of ten of them."""
    source = Source([list(range(1, 200))] * 3000)
    dataset = PackedDataset(source, 2048)
    ids = np.arange(64)
    dataset.windows(ids)
    ours, loop = [], []
    for _ in range(5):
        start = time.perf_counter()
        dataset.windows(ids)
        middle = time.perf_counter()
        for row in source.tokens[: 64 * 2048 // 10].tolist():
            [row].append(row)
        ours.append(middle - start)
        loop.append(time.perf_counter() - middle)
    assert np.median(ours) < 10 * np.median(loop)
