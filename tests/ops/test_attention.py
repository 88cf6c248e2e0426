"""Attention in training against PyTorch in float64, and in inference also bit for bit."""

import ctypes as ct
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from .harness import INVALID, AttentionParams, Dropout, Kv, OpError, Ops, available_isas, pointer

EPS = float(np.finfo(np.float32).eps)
LEVELS = list(itertools.product(available_isas(), (1, 2)))


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """Small tensors: waiting for a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- Random numbers ---------------------------------------------------------------------------


def philox(key, counter_high, counter):
    """Philox 4x32-10 for arrays of counters; [..., 4] words."""
    counter, counter_high = np.broadcast_arrays(np.uint64(counter), np.uint64(counter_high))
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = counter & low, counter >> high, counter_high & low, counter_high >> high
    k0, k1 = int(key) & 0xFFFFFFFF, int(key) >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> high) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> high) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1)


def test_philox_known_answers():
    """The test's own generator, against the vectors published with Random123."""
    ones = 0xFFFFFFFFFFFFFFFF
    for key, high, low, words in (
        (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ones, ones, ones, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            0x0370734413198A2E,
            0x85A308D3243F6A88,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ):
        assert " ".join(f"{int(w):08x}" for w in philox(key, high, low)) == words


def dropout_mask(p, key, rows, heads, keys):
    """[heads, rows, keys] of 1 / (1 - p) or 0, as ops.h defines it."""
    channel = np.arange(heads)[:, None] * 2**24 + np.arange(keys)
    words = philox(key, rows[None, :, None], (channel // 4)[:, None, :])
    word = np.take_along_axis(words, (channel % 4)[:, None, :, None].repeat(len(rows), 1), -1)
    uniform = (word[..., 0] >> np.uint64(8)).astype(np.float64) / 2**24
    return (uniform >= np.float32(p)) / (1 - np.float64(np.float32(p)))


# -- Training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    segments: tuple = (8,)
    heads: int = 2
    kv_heads: int = 1
    width: int = 16
    scale: float = 0.0  # 0: 1 / sqrt(width)
    softcap: float = 0.0
    window: int = 0
    dropout: float = 0.0

    @property
    def rows(self):
        return sum(self.segments)

    def __str__(self):
        fields = (f"{name}={value}" for name, value in vars(self).items() if value)
        return ",".join(fields).replace("segments=", "").replace(" ", "")


BASE = Case()
CASES = [
    *(replace(BASE, segments=(t,), width=20) for t in (1, 2, 63, 64, 65, 130)),
    *(replace(BASE, segments=(70,), width=d) for d in (1, 8, 64, 80, 128)),
    *(replace(BASE, segments=(70,), heads=h, kv_heads=k) for h, k in ((1, 1), (4, 4), (6, 2))),
    replace(BASE, segments=(1, 5, 0, 64, 1, 65, 17), heads=4, kv_heads=2),
    replace(BASE, segments=(200,), heads=1, width=33),
    replace(BASE, segments=(150,), window=1),
    replace(BASE, segments=(150, 20), window=40),
    replace(BASE, segments=(200,), window=64),
    replace(BASE, segments=(100,), softcap=2.0, scale=1.0),
    replace(BASE, segments=(100, 30), softcap=30.0, window=70, width=8),
    replace(BASE, segments=(100,), scale=0.5),
    replace(BASE, segments=(130, 10), dropout=0.3, heads=4, kv_heads=2),
    replace(BASE, segments=(90,), dropout=0.1, softcap=5.0, window=33, scale=1.0),
]


class Problem:
    """Inputs of a case: q, k and v as views of one joined buffer, and the output's gradient."""

    def __init__(self, case, seed=0):
        self.case = case
        n, h, k, d = case.rows, case.heads, case.kv_heads, case.width
        rng = np.random.default_rng([seed, n, h, k, d])
        self.joined = rng.standard_normal((n, (h + 2 * k) * d)).astype(np.float32)
        self.q, self.k, self.v = self.split(self.joined)
        self.dout = rng.standard_normal((n, h, d)).astype(np.float32)
        self.segment = np.cumsum([0, *case.segments]).astype(np.int32)
        self.drop_rows = rng.integers(0, 2**63, n, dtype=np.uint64)
        self.key = 0x0123456789ABCDEF
        self.scale = case.scale or case.width**-0.5

    def split(self, joined):
        n, h, k, d = len(joined), self.case.heads, self.case.kv_heads, self.case.width
        parts = np.split(joined, [h * d, (h + k) * d], axis=1)
        views = [part.reshape(n, -1, d) for part in parts]
        assert all(np.shares_memory(view, joined) for view in views)
        return views

    def params(self):
        case = self.case
        params = AttentionParams(self.scale, case.softcap, case.window, None)
        if case.dropout:
            drop = Dropout(case.dropout, self.key, self.drop_rows.ctypes.data)
            params.dropout = ct.addressof(drop)
            params.keep = drop
        return params

    def forward(self, ops):
        out = np.full_like(self.dout, np.nan)
        lse = np.full(out.shape[:2], np.nan, np.float32)
        arguments = (pointer(self.segment), len(self.segment) - 1, self.params())
        ops.attention(out, lse, self.q, self.k, self.v, *arguments)
        return out, lse

    def backward(self, ops, out, lse):
        joined = np.full_like(self.joined, np.nan)
        dq, dk, dv = self.split(joined)
        arguments = (pointer(self.segment), len(self.segment) - 1, self.params())
        inputs = (self.dout, out, lse, self.q, self.k, self.v)
        ops.attention_backward(dq, dk, dv, *inputs, *arguments)
        return dq, dk, dv

    def run(self, isa, threads):
        with Ops(isa, threads) as ops:
            out, lse = self.forward(ops)
            return out, lse, *self.backward(ops, out, lse)

    def expected(self, dtype):
        """out, lse, dq, dk, dv by PyTorch, in a precision."""
        q, k, v = (
            torch.tensor(x, dtype=dtype, requires_grad=True) for x in (self.q, self.k, self.v)
        )
        out, lse = reference(self, q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), torch.tensor(self.dout, dtype=dtype))
        return tuple(x.detach().numpy() for x in (out, lse, *gradients))


def reference(problem, q, k, v):
    """Attention as the definition says it, in the precision of q."""
    case, outs, lses = problem.case, [], []
    group = case.heads // case.kv_heads
    for first, end in itertools.pairwise(problem.segment):
        keys = k[first:end].repeat_interleave(group, 1)
        values = v[first:end].repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q[first:end], keys) * problem.scale
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        i, j = np.ogrid[: end - first, : end - first]
        seen = (j <= i) & ((case.window == 0) | (i - j < case.window))
        scores = scores.masked_fill(~torch.tensor(seen), -torch.inf)
        weights = torch.softmax(scores, -1)
        if case.dropout:
            rows = problem.drop_rows[first:end]
            keep = dropout_mask(case.dropout, problem.key, rows, case.heads, end - first)
            weights = weights * torch.tensor(keep, dtype=q.dtype)
        outs.append(torch.einsum("hij,jhd->ihd", weights, values))
        lses.append(torch.logsumexp(scores, -1).T)
    return torch.cat(outs), torch.cat(lses)


def within_twice(ours, exact, theirs, rounding=0.0):
    """Our error against float64 is at most twice that of PyTorch in float32, which may be exact by
    chance: at least two units in the last place of the largest number, and one `rounding`."""
    error, allowed = np.abs(ours - exact).max(), 2 * np.abs(theirs - exact).max()
    return error <= allowed + 2 * EPS * np.abs(exact).max() + rounding


def cancellation(problem):
    """What one rounding of dout . v does to dq and dk: the mean of these products is taken off
    each, which leaves nothing where a row sees one key."""
    product = np.abs(problem.dout).sum(-1).max() * np.abs(problem.v).max()
    factor = max(np.abs(problem.q).max(), np.abs(problem.k).max()) * problem.scale
    return EPS * product * factor


def wrong_results(problem, ours, exact, theirs):
    """The names of those that are not within what rounding allows."""
    names = ("out", "lse", "dq", "dk", "dv")
    rounding = {"dq": cancellation(problem), "dk": cancellation(problem)}
    return [
        name
        for name, *values in zip(names, ours, exact, theirs, strict=True)
        if not within_twice(*values, rounding.get(name, 0.0))
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(case):
    problem = Problem(case)
    exact, single = problem.expected(torch.float64), problem.expected(torch.float32)
    for isa, threads in LEVELS:
        wrong = wrong_results(problem, problem.run(isa, threads), exact, single)
        assert not wrong, f"{isa}, {threads} threads"


def test_reference_gradient():
    """The gradients of the reference itself, against finite differences."""
    problem = Problem(Case(segments=(5, 3), softcap=3.0, window=3, width=3, dropout=0.2))
    inputs = [
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for x in (problem.q, problem.k, problem.v)
    ]
    assert torch.autograd.gradcheck(lambda q, k, v: reference(problem, q, k, v)[0], inputs)


def test_reference_is_sdpa():
    problem = Problem(replace(BASE, segments=(40,), heads=4, kv_heads=2))
    q, k, v = (
        torch.tensor(x, dtype=torch.float64).transpose(0, 1)[None]
        for x in (problem.q, problem.k, problem.v)
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert np.allclose(theirs[0].transpose(0, 1), problem.expected(torch.float64)[0], atol=1e-14)


@pytest.mark.parametrize("isa", available_isas())
def test_many_threads_share_one_head(isa):
    problem = Problem(Case(segments=(450,), heads=2, kv_heads=1, width=24))
    exact, single = problem.expected(torch.float64), problem.expected(torch.float32)
    for threads in (3, 7):
        assert not wrong_results(problem, problem.run(isa, threads), exact, single)


@pytest.mark.parametrize("isa", available_isas())
def test_same_bits_every_time(isa):
    problem = Problem(Case(segments=(150, 70), heads=4, kv_heads=2, dropout=0.2))
    first, again = problem.run(isa, 2), problem.run(isa, 2)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("isa", available_isas())
def test_segments_do_not_touch(isa):
    """A segment gives the same bits alone (with dropout keyed by row, not by place)."""
    both = Problem(Case(segments=(70, 90), heads=2, kv_heads=1, dropout=0.2))
    alone = Problem(Case(segments=(90,), heads=2, kv_heads=1, dropout=0.2))
    alone.joined[:] = both.joined[70:]
    alone.dout[:] = both.dout[70:]
    alone.drop_rows[:] = both.drop_rows[70:]
    for a, b in zip(both.run(isa, 1), alone.run(isa, 1), strict=True):
        assert np.array_equal(a[70:], b)


@pytest.mark.parametrize("isa", available_isas())
def test_large_scores(isa):
    """Scores far beyond the range of exp give the limit, not NaN."""
    problem = Problem(Case(segments=(70,), scale=1e4))
    out, lse, *gradients = problem.run(isa, 1)
    exact = problem.expected(torch.float64)
    assert all(np.isfinite(x).all() for x in (out, lse, *gradients))
    assert np.abs(lse - exact[1]).max() <= 16 * EPS * np.abs(exact[1]).max()


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_not_a_number_shows(isa, bad):
    problem = Problem(Case(segments=(70,), heads=1))
    problem.k[30, 0, 3] = bad
    out, _, dq, dk, dv = problem.run(isa, 1)
    with np.errstate(invalid="ignore"):
        expected = np.isnan(problem.expected(torch.float64)[0])
    assert expected[30:].any() and np.array_equal(np.isnan(out), expected)
    assert all(np.isnan(x).any() for x in (dq, dk, dv))


WRONG = {
    "the scale": lambda problem: setattr(problem, "scale", problem.scale * 1.01),
    "the window": lambda problem: setattr(problem, "case", replace(problem.case, window=41)),
    "the cap": lambda problem: setattr(problem, "case", replace(problem.case, softcap=3.1)),
    "the key of dropout": lambda problem: setattr(problem, "key", problem.key + 1),
    "the rows of dropout": lambda problem: setattr(problem, "drop_rows", problem.drop_rows + 1),
    "a segment": lambda problem: problem.segment.__setitem__(1, 59),
}


@pytest.mark.parametrize("fault", WRONG)
def test_control(fault):
    """Each of these faults is far outside what test_training allows."""
    case = Case(segments=(60, 80), window=40, softcap=3.0, dropout=0.2)
    problem = Problem(case)
    exact, single = problem.expected(torch.float64), problem.expected(torch.float32)
    assert not wrong_results(problem, problem.run("plain", 1), exact, single)
    WRONG[fault](problem)
    wrong = wrong_results(problem, problem.run("plain", 1), exact, single)
    assert {"out", "dq", "dk", "dv"} <= set(wrong)


def test_training_refuses_bad_arguments():
    problem = Problem(Case(segments=(4, 4)))
    with Ops("plain") as ops:
        for segment in ([0, 5, 4, 8], [1, 8], [0, 7]):
            problem.segment = np.array(segment, np.int32)
            with pytest.raises(OpError, match="segment") as error:
                problem.forward(ops)
            assert error.value.status == INVALID
        problem = Problem(Case(heads=3, kv_heads=2))
        with pytest.raises(OpError, match="heads"):
            problem.forward(ops)


# -- Inference --------------------------------------------------------------------------------


class Cache:
    """Keys and values of sequences in shuffled pages; what was never written is NaN."""

    def __init__(self, sequences, positions, kv_heads, width, page, seed=0):
        self.per_sequence = -(-positions // page)
        self.pages = sequences * self.per_sequence + 1
        shape = (self.pages, kv_heads, page, width)
        self.k, self.v = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
        order = np.random.default_rng(seed).permutation(self.pages)
        self.table = order[: sequences * self.per_sequence].astype(np.int32)
        self.page = page

    def view(self):
        _, heads, page, width = self.k.shape
        addresses = (array.ctypes.data for array in (self.k, self.v, self.table))
        sequences = len(self.table) // self.per_sequence
        view = Kv(*addresses, sequences, self.per_sequence, self.pages, page, heads, width)
        view.keep = self
        return view

    def read(self, array, sequence):
        """[positions, heads, width] of a sequence."""
        pages = self.table.reshape(-1, self.per_sequence)[sequence]
        _, heads, _, width = array.shape
        return array[pages].transpose(0, 2, 1, 3).reshape(-1, heads, width)


class Rows:
    """Rows of several sequences, and a cache that holds all positions up to `length`."""

    def __init__(self, case, lengths, page=64, seed=0):
        self.case, self.lengths, self.page = case, lengths, page
        rng = np.random.default_rng([seed, case.width, case.heads])
        shape = (len(lengths), max(lengths))
        self.q = rng.standard_normal((*shape, case.heads, case.width)).astype(np.float32)
        self.k = rng.standard_normal((*shape, case.kv_heads, case.width)).astype(np.float32)
        self.v = rng.standard_normal((*shape, case.kv_heads, case.width)).astype(np.float32)
        self.scale = case.scale or case.width**-0.5

    def rows(self):
        """(sequence, position) of every row, in order."""
        pairs = [(s, p) for s, n in enumerate(self.lengths) for p in range(n)]
        return tuple(np.array(x, np.int32) for x in zip(*pairs, strict=True))

    def cache(self, ops, page=None):
        case = self.case
        cache = Cache(
            len(self.lengths), max(self.lengths), case.kv_heads, case.width, page or self.page
        )
        self.write(ops, cache, *self.rows())
        return cache

    def write(self, ops, cache, sequence, position):
        k, v = self.k[sequence, position], self.v[sequence, position]
        ops.kv_write(cache.view(), k, v, pointer(sequence), pointer(position))

    def run(self, ops, cache, sequence, position):
        q = self.q[sequence, position]
        out = np.full_like(q, np.nan)
        params = AttentionParams(self.scale, self.case.softcap, self.case.window, None)
        ops.attention_rows(out, q, cache.view(), pointer(sequence), pointer(position), params)
        return out

    def expected(self, dtype, sequence, position):
        out = []
        group = self.case.heads // self.case.kv_heads
        for s, p in zip(sequence, position, strict=True):
            first = max(0, p - self.case.window + 1) if self.case.window else 0
            q = torch.tensor(self.q[s, p], dtype=dtype)
            k, v = (
                torch.tensor(x[s, first : p + 1], dtype=dtype).repeat_interleave(group, 1)
                for x in (self.k, self.v)
            )
            scores = torch.einsum("hd,jhd->hj", q, k) * self.scale
            if self.case.softcap:
                scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
            out.append(torch.einsum("hj,jhd->hd", torch.softmax(scores, -1), v))
        return torch.stack(out).numpy()


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


ROWS_CASES = [
    *(replace(BASE, width=d) for d in (1, 8, 20, 64, 80, 128)),
    *(replace(BASE, heads=h, kv_heads=k) for h, k in ((1, 1), (4, 4), (8, 2), (70, 1))),
    replace(BASE, window=1),
    replace(BASE, window=70, heads=4, kv_heads=2),
    replace(BASE, softcap=2.0, scale=1.0),
    replace(BASE, softcap=30.0, window=64, width=24),
]


@pytest.mark.parametrize("case", ROWS_CASES, ids=str)
def test_rows(case):
    """Values, and the same bits at every level and number of threads."""
    rows = Rows(case, (131, 1, 64))
    sequence, position = rows.rows()
    exact = rows.expected(torch.float64, sequence, position)
    single = rows.expected(torch.float32, sequence, position)
    first = None
    for isa, threads in LEVELS:
        with Ops(isa, threads) as ops:
            ours = rows.run(ops, rows.cache(ops), sequence, position)
        first = ours if first is None else first
        assert within_twice(ours, exact, single)
        assert np.array_equal(bits(ours), bits(first)), f"{isa}, {threads} threads"


def test_rows_are_the_training_attention():
    case = Case(segments=(150,), heads=4, kv_heads=2, window=100, width=32)
    problem, rows = Problem(case), Rows(case, (150,))
    problem.q[:], problem.k[:], problem.v[:] = rows.q[0], rows.k[0], rows.v[0]
    exact, single = problem.expected(torch.float64), problem.expected(torch.float32)
    with Ops(available_isas()[-1]) as ops:
        ours = rows.run(ops, rows.cache(ops), *rows.rows())
    assert within_twice(ours, exact[0], single[0])


def row_orders(sequence, position):
    """Ways to run the same rows: lists of index arrays."""
    count = len(sequence)
    rng = np.random.default_rng(3)
    everything = np.arange(count)
    yield "each alone", np.split(everything, count)
    yield "shuffled", [rng.permutation(count)]
    yield "descending", [everything[::-1].copy()]
    yield "by sequence in 16", np.array_split(everything, -(-count // 16))
    yield "64 at a time, mixed", np.array_split(np.lexsort((sequence, position)), -(-count // 64))


@pytest.mark.parametrize("window", (0, 50))
@pytest.mark.parametrize("isa", available_isas())
def test_a_row_depends_on_itself_alone(isa, window):
    case = Case(heads=4, kv_heads=2, width=24, window=window, softcap=4.0)
    rows = Rows(case, (140, 9, 70))
    sequence, position = rows.rows()
    with Ops(isa, 1) as ops, Ops(isa, 2) as two:
        cache = rows.cache(ops)
        together = rows.run(ops, cache, sequence, position)
        for (name, parts), runner in itertools.product(row_orders(sequence, position), (ops, two)):
            for part in parts:
                out = rows.run(runner, cache, sequence[part], position[part])
                assert np.array_equal(bits(out), bits(together[part])), name
        for page in (128, 192):
            out = rows.run(two, rows.cache(two, page), sequence, position)
            assert np.array_equal(bits(out), bits(together)), f"page {page}"


@pytest.mark.parametrize("isa", available_isas())
def test_later_positions_do_not_matter(isa):
    """Chunks of a prompt, each after its own writing only: what follows is still NaN then."""
    rows = Rows(Case(heads=2, kv_heads=1, width=20), (150,))
    sequence, position = rows.rows()
    with Ops(isa, 2) as ops:
        together = rows.run(ops, rows.cache(ops), sequence, position)
        cache = Cache(1, 150, 1, 20, 64)
        for part in np.array_split(np.arange(150), (1, 2, 40, 64, 65, 130)):
            rows.write(ops, cache, sequence[part], position[part])
            out = rows.run(ops, cache, sequence[part], position[part])
            assert np.array_equal(bits(out), bits(together[part]))


@pytest.mark.parametrize("isa", available_isas())
def test_not_a_number_in_a_later_row(isa):
    """Rows before a NaN keep their bits, in one call with rows after it."""
    rows = Rows(Case(heads=2, kv_heads=1, width=20), (80,))
    sequence, position = rows.rows()
    with Ops(isa) as ops:
        good = rows.run(ops, rows.cache(ops), sequence, position)
        rows.k[0, 41, 0, 0] = rows.v[0, 43, 0, 2] = np.nan
        out = rows.run(ops, rows.cache(ops), sequence, position)
    assert np.array_equal(bits(out[:41]), bits(good[:41]))
    assert np.isnan(out[41:]).any(axis=-1).all()


def test_kv_write():
    rows = Rows(Case(heads=2, kv_heads=2, width=5), (100, 130))
    sequence, position = rows.rows()
    order = np.random.default_rng(0).permutation(len(sequence))
    with Ops("plain", 2) as ops:
        cache = Cache(2, 130, 2, 5, 128)
        # Keys and values as views of wider rows.
        wide = np.zeros((len(order), 31), np.float32)
        k, v = wide[:, :10].reshape(-1, 2, 5), wide[:, 13:23].reshape(-1, 2, 5)
        assert np.shares_memory(k, wide) and np.shares_memory(v, wide)
        k[:], v[:] = rows.k[sequence, position][order], rows.v[sequence, position][order]
        ops.kv_write(cache.view(), k, v, pointer(sequence[order]), pointer(position[order]))
    for s, length in enumerate(rows.lengths):
        for array, source in ((cache.k, rows.k), (cache.v, rows.v)):
            assert np.array_equal(cache.read(array, s)[:length], source[s, :length])
            assert np.isnan(cache.read(array, s)[length:]).all()


@pytest.mark.parametrize("fault", ("position", "sequence", "window", "page", "key", "value"))
def test_rows_control(fault):
    """Each of these faults changes the result by far more than test_rows allows."""
    rows = Rows(Case(heads=2, kv_heads=1, window=30), (100, 100))
    sequence, position = (x[70:80].copy() for x in rows.rows())
    exact = rows.expected(torch.float64, sequence, position)
    single = rows.expected(torch.float32, sequence, position)
    with Ops(available_isas()[-1]) as ops:
        cache = rows.cache(ops)
        assert within_twice(rows.run(ops, cache, sequence, position), exact, single)
        if fault == "position":
            rows.q = np.roll(rows.q, 1, axis=1)
            position -= 1
        elif fault == "sequence":
            rows.q = rows.q[::-1]
            sequence = 1 - sequence
        elif fault == "window":
            rows.case = replace(rows.case, window=29)
        elif fault == "page":
            cache.table[:2] = cache.table[1::-1].copy()
        else:
            page = cache.table[1]
            getattr(cache, fault[0])[page, 0, 4] *= -1  # position 68
        assert not within_twice(rows.run(ops, cache, sequence, position), exact, single)


def test_rows_refuse_bad_arguments():
    rows = Rows(Case(heads=2, kv_heads=1), (70,))
    sequence, position = rows.rows()
    with Ops("plain") as ops:
        cache = rows.cache(ops)
        with pytest.raises(OpError, match="position") as error:
            pointers = (pointer(sequence), pointer(position + 128))
            q = np.zeros((70, 2, 16), np.float32)
            ops.attention_rows(q.copy(), q, cache.view(), *pointers, AttentionParams(1.0))
        assert error.value.status == INVALID
        cache.table[1] = cache.pages
        with pytest.raises(OpError, match="page"):
            rows.run(ops, cache, sequence, position)
        cache.page = 96
        cache.k = np.zeros((3, 1, 96, 16), np.float32)
        with pytest.raises(OpError, match="page"):
            rows.run(ops, cache, sequence, position)
