"""Matrix products: training products against float64, inference products to the bit.

The bound of a value is the classical one for a sum of n rounded terms in any order, n * u *
(sum of magnitudes) with u = 2^-24 (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1).
Where there are enough outputs, the root mean square error may also be at most twice NumPy's.
"""

import ctypes as ct
import ctypes.util
import mmap

import numpy as np
import pytest

from tests.ops.harness import NOMEM, OpError, Ops, available_isas, function, tensor, weight_rows

ISAS = available_isas()
UNIT = 2.0**-24
# N rows, K inputs, M outputs: ones, odd, past each tile and block size, long, several threads.
SHAPES = [
    (1, 1, 1),
    (1, 5, 3),
    (3, 1, 2),
    (2, 7, 33),
    (13, 17, 31),
    (14, 16, 32),
    (15, 64, 48),
    (29, 65, 65),
    (32, 64, 192),
    (31, 100, 130),
    (1, 700, 900),
    (97, 385, 101),
    (130, 129, 257),
    (300, 70, 5),
    (5, 800, 300),
    (64, 1300, 210),
    (1025, 40, 64),
]


@pytest.fixture(scope="module", params=[(i, t) for i in ISAS for t in (1, 2)], ids=str)
def ops(request):
    with Ops(*request.param) as made:
        yield made


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def strided(array, extra=3, fill=np.nan):
    """The same values as some columns of a wider array whose other columns are `fill`."""
    wide = np.full((array.shape[0], array.shape[1] + extra), fill, np.float32)
    view = wide[:, 1 : 1 + array.shape[1]]
    view[:] = array
    return view


def outside(view):
    """The elements beside a strided view."""
    return np.concatenate([view.base[:, :1], view.base[:, 1 + view.shape[1] :]], axis=1)


def check(got, a, b, *addends, single=None):
    """`got` is a @ b plus addends, within the bound of its number of terms."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
    for addend in addends:
        exact = exact + addend
        size = size + np.abs(addend)
    error = np.abs(got - exact)
    terms = a.shape[1] + len(addends)
    assert np.all(error <= terms * UNIT * size * 1.001), float(np.max(error / size / UNIT))
    if got.size >= 1000 and a.shape[1] >= 8:
        single = a @ b
        for addend in addends:
            single = single + np.asarray(addend, np.float32)
        assert np.sqrt(np.mean(error**2)) <= 2 * np.sqrt(np.mean((single - exact) ** 2))


# -- Products of training ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(ops, shape):
    n, k, m = shape
    x, w, bias, residual = normal(1, n, k), normal(2, m, k), normal(3, m), normal(4, n, m)
    y = np.full((n, m), np.nan, np.float32)
    ops.linear(y, x, weight_rows(w), None, None)
    check(y, x, w.T)
    again = np.empty_like(y)
    ops.linear(again, x, weight_rows(w), None, None)
    np.testing.assert_array_equal(y, again)
    view = strided(np.zeros((n, m)))
    ops.linear(view, strided(x), weight_rows(w), bias, strided(residual))
    check(view, x, w.T, bias, residual)
    assert np.isnan(outside(view)).all()
    aliased = strided(residual)
    ops.linear(aliased, x, weight_rows(w), bias, aliased)
    np.testing.assert_array_equal(aliased, view)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_backward_input(ops, shape):
    n, k, m = shape
    dy, w, before = normal(1, n, m), normal(2, m, k), normal(3, n, k)
    dx = np.full((n, k), np.nan, np.float32)
    ops.linear_backward_input(dx, dy, weight_rows(w), False)
    check(dx, dy, w)
    again = np.empty_like(dx)
    ops.linear_backward_input(again, dy, weight_rows(w), False)
    np.testing.assert_array_equal(dx, again)
    view = strided(before)
    ops.linear_backward_input(view, strided(dy), weight_rows(w), True)
    check(view, dy, w, before)
    assert np.isnan(outside(view)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_backward_weight(ops, shape):
    n, k, m = shape
    dy, x, dw, db = normal(1, n, m), normal(2, n, k), normal(3, m, k), normal(4, m)
    acc_dw, acc_db = dw.copy(), db.copy()
    ops.linear_backward_weight(acc_dw, acc_db, strided(dy), strided(x))
    check(acc_dw, dy.T, x, dw)
    check(acc_db[:, None], dy.T, np.ones((n, 1), np.float32), db[:, None])
    again = dw.copy()
    ops.linear_backward_weight(again, None, dy, x)
    np.testing.assert_array_equal(acc_dw, again)


def test_bias_gradient_error_is_that_of_blocked_sums(ops):
    """A plain running sum over 4,096 rows would err several times as much as NumPy's."""
    n, k, m = 4096, 16, 1500
    dy, x = normal(1, n, m) + 1, normal(2, n, k)
    acc_dw, acc_db = np.zeros((m, k), np.float32), np.zeros(m, np.float32)
    ops.linear_backward_weight(acc_dw, acc_db, dy, x)
    exact = dy.astype(np.float64).sum(0)
    ours = np.sqrt(np.mean((acc_db - exact) ** 2))
    numpys = np.sqrt(np.mean((np.ascontiguousarray(dy.T).sum(1) - exact) ** 2))
    assert ours <= 2 * numpys


def test_no_rows(ops):
    w, dw = normal(1, 5, 4), normal(2, 5, 4)
    none = normal(3, 1, 4)[:0], normal(4, 1, 5)[:0]
    acc = dw.copy()
    ops.linear(none[1], none[0], weight_rows(w), None, None)
    ops.linear(none[1], none[0], ops.packed(w), None, None)
    ops.linear_backward_input(none[0], none[1], weight_rows(w), False)
    ops.linear_backward_weight(acc, np.zeros(5, np.float32), none[1], none[0])
    np.testing.assert_array_equal(acc, dw)


def test_both_sides_long():
    """Both operands exceed what is packed at a time; some rows and columns stand for all."""
    n, k, m = 5800, 390, 6100
    x, w = normal(1, n, k), normal(2, m, k)
    y = np.empty((n, m), np.float32)
    with Ops(ISAS[-1], 2) as ops:
        ops.linear(y, x, weight_rows(w), None, None)
    rows, columns = np.r_[0:20, n // 2, n - 30 : n], np.r_[0:40, m // 2, m - 40 : m]
    check(y[rows], x[rows], w.T)
    check(y[:, columns], x, w[columns].T)


def test_offsets_beyond_32_bits(ops):
    """Rows 2^26 elements apart: the last one starts behind 2^31 elements."""
    n, k, stride = 40, 20, 1 << 26
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, (n - 1) * stride * 4 + 4096, flags=flags)
    base = np.frombuffer(memory, np.float32)
    x = np.lib.stride_tricks.as_strided(base, (n, k), (stride * 4, 4))
    y = np.lib.stride_tricks.as_strided(base[64:], (n, k), (stride * 4, 4))
    values, w = normal(1, n, k), normal(2, k, k)
    x[:] = values
    for weight in weight_rows(w), ops.packed(w):
        ops.linear(y, x, weight, None, None)
        check(y.copy(), values, w.T)
    dw = np.zeros((k, k), np.float32)
    ops.linear_backward_input(y, x, weight_rows(w), False)
    check(y.copy(), values, w)
    ops.linear_backward_weight(dw, None, x, x)
    check(dw, values.T, values)


def guarded(array):
    """A copy whose last byte is followed by a page that must not be touched."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ct.addressof(ct.c_char.from_buffer(memory))
    libc = ct.CDLL(ctypes.util.find_library("c"))
    assert libc.mprotect(ct.c_void_p(start + size), ct.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes)
    copy = copy.reshape(array.shape)
    copy[:] = array
    return copy


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (15, 17, 33), (50, 67, 130)], ids=str)
def test_reads_nothing_behind_the_end(ops, shape):
    n, k, m = shape
    x, w, bias, y = (guarded(a) for a in (normal(1, n, k), normal(2, m, k), normal(3, m),
                                          normal(4, n, m)))  # fmt: skip
    expected = y.copy()
    ops.linear(y, x, weight_rows(w), bias, y)
    check(y, x, w.T, bias, expected)
    for dtype in "float32", "bfloat16":
        ops.linear(y, x, ops.packed(w, dtype), bias, y)
    dx, dw, db = guarded(np.zeros((n, k), np.float32)), guarded(0 * w), guarded(0 * bias)
    ops.linear_backward_input(dx, y, weight_rows(w), False)
    check(dx, y, w)
    ops.linear_backward_weight(dw, db, y, x)
    check(dw, y.T, x)


def test_failed_allocation_is_reported_and_leaves_nothing(ops):
    fail_at = function("ee_alloc_fail_at", None, ct.c_uint64)
    x, w = normal(1, 500, 400), normal(2, 700, 400)
    y, expected = np.empty((500, 700), np.float32), np.empty((500, 700), np.float32)
    with Ops(ops.isa, ops.threads) as fresh:
        fail_at(1)
        try:
            with pytest.raises(OpError) as error:
                fresh.linear(y, x, weight_rows(w), None, None)
        finally:
            fail_at(0)
        assert error.value.status == NOMEM
        fresh.linear(y, x, weight_rows(w), None, None)
    ops.linear(expected, x, weight_rows(w), None, None)
    np.testing.assert_array_equal(y, expected)


# -- Products of inference ---------------------------------------------------------------------


def fma(a, b, c):
    """a * b + c rounded once to float32, for float32 arrays.

    The product is exact in float64. Its sum with c is rounded to odd there: to the neighbour with
    the odd last bit whenever it is not exact. As 53 >= 24 + 2, rounding that to float32 gives the
    correctly rounded result (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums").
    """
    p, c = a.astype(np.float64) * b, c.astype(np.float64)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    bits = np.ascontiguousarray(s).view(np.int64)
    step = np.where((error > 0) == (s > 0), 1, -1)
    bits = np.where((error != 0) & (bits & 1 == 0), bits + step, bits)
    return bits.view(np.float64).astype(np.float32)


def in_order(x, w, bias=None, residual=None, block=64):
    """x w^T in the order of summation that ops.h documents."""
    total = None
    for first in range(0, x.shape[1], block):
        chain = np.zeros((x.shape[0], w.shape[0]), np.float32)
        for k in range(first, min(first + block, x.shape[1])):
            chain = fma(x[:, k, None], w[None, :, k], chain)
        total = chain if total is None else total + chain
    for addend in bias, residual:
        if addend is not None:
            total = total + addend
    return total


def bf16_round(array):
    """Nearest bfloat16, ties to even, as float32."""
    bits = array.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32)


def test_emulated_fma_is_fmaf():
    libm = ct.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.restype, libm.fmaf.argtypes = ct.c_float, [ct.c_float] * 3
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(3000).astype(np.float32) for _ in range(2))
    c = (-a * b * (1 + rng.integers(-3, 4, 3000) * 2.0**-23)).astype(np.float32)
    c[1000:] *= (2.0 ** rng.integers(-40, 40, 2000)).astype(np.float32)
    expected = [libm.fmaf(*map(float, values)) for values in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(fma(a, b, c), np.array(expected, np.float32))
    # a product and a sum, each rounded, is something else
    assert (a * b + c != np.array(expected, np.float32)).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_panels(ops, shape, dtype):
    n, k, m = shape
    x, w, bias, residual = normal(1, n, k), normal(2, m, k), normal(3, m), normal(4, n, m)
    packed = ops.packed(w, dtype)
    used = bf16_round(w) if dtype == "bfloat16" else w
    y = np.full((n, m), np.nan, np.float32)
    ops.linear(y, x, packed, None, None)
    rows = np.unique(np.r_[0, n // 2, n - 1])
    np.testing.assert_array_equal(y[rows], in_order(x[rows], used))
    check(y, x, used.T)
    view = strided(np.zeros((n, m)))
    ops.linear(view, strided(x), packed, bias, strided(residual))
    np.testing.assert_array_equal(view, (y + bias) + residual)
    assert np.isnan(outside(view)).all()
    aliased = strided(residual)
    ops.linear(aliased, x, packed, None, aliased)
    np.testing.assert_array_equal(aliased, y + residual)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inputs,outputs", [(67, 65), (130, 193), (64, 700)])
def test_panels_of_1_to_64_rows(ops, inputs, outputs, dtype):
    x, w = normal(1, 64, inputs), normal(2, outputs, inputs)
    packed = ops.packed(w, dtype)
    expected = in_order(x, bf16_round(w) if dtype == "bfloat16" else w)
    for n in range(1, 65):
        y = np.full((n, outputs), np.nan, np.float32)
        ops.linear(y, x[64 - n :], packed, None, None)
        np.testing.assert_array_equal(y, expected[64 - n :])


def test_panels_many_rows(ops):
    x, w = normal(1, 333, 200), normal(2, 150, 200)
    for dtype, used in ("float32", w), ("bfloat16", bf16_round(w)):
        y = np.empty((333, 150), np.float32)
        ops.linear(y, x, ops.packed(w, dtype), None, None)
        np.testing.assert_array_equal(y, in_order(x, used))


NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 3e38, 1e-40], np.float32)


def stored(packed):
    """The bits of a weight of panels as a matrix, the filling of the last panel included."""
    panels = -(-packed.rows // 64)
    kind = ct.c_uint16 if packed.dtype == 1 else ct.c_uint32
    array = np.ctypeslib.as_array((kind * (panels * 64 * packed.cols)).from_address(packed.data))
    return array.reshape(panels, packed.cols, 64).transpose(0, 2, 1).reshape(panels * 64, -1)


def bits(values, dtype):
    """The bits of float32 values as a weight of a dtype stores them."""
    if dtype == "bfloat16":
        return (bf16_round(np.ascontiguousarray(values)).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values).view(np.uint32)


def source(seed, m, k, dtype):
    """Random values of a dtype: what is packed, and the same as float32."""
    w = normal(seed, m, k)
    w.flat[: min(w.size, 6)] = SPECIAL[: w.size]
    if dtype == "bfloat16":
        w = bf16_round(w)
        return (w.view(np.uint32) >> 16).astype(np.uint16), w
    with np.errstate(over="ignore"):
        narrow = w.astype(NUMPY[dtype])
    return narrow, narrow.astype(np.float32)


def fit(packed, first, expected):
    """Whether output features from `first` on are `expected`, and what fills the panel is 0."""
    got = stored(packed)[first:]
    return (got[: len(expected)] == expected).all() and not got[packed.rows - first :].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (65, 70), (200, 129), (63, 1000)], ids=str)
def test_weight_pack(ops, shape, given, dtype):
    m, k = shape
    rows, values = source(1, m, k, given)
    expected = bits(values, dtype)
    spread = np.zeros((m, k + 5), rows.dtype)
    spread[:, 3 : 3 + k] = rows
    across = np.zeros((k, m + 2), rows.dtype)
    across[:, 1 : 1 + m] = rows.T
    for view in rows, spread[:, 3 : 3 + k], np.ascontiguousarray(rows.T).T, across[:, 1 : 1 + m].T:
        packed = ops.panels(shape, dtype)
        ops.weight_pack(packed, view, 0)
        assert fit(packed, 0, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_weight_pack_in_parts(ops, given, dtype):
    """Parts that share panels, in any order; what is not packed yet keeps its bits."""
    rows, values = source(1, 330, 67, given)
    expected = bits(values, dtype)
    packed = ops.panels(rows.shape, dtype)
    untouched = stored(packed).copy()
    assert (untouched == untouched.max()).all()
    starts = [0, 5, 64, 65, 200, 256, 329]
    ends = [*starts[1:], 330]
    for i in 3, 6, 0, 5, 1, 4, 2:
        part = rows[starts[i] : ends[i]]
        ops.weight_pack(packed, np.asfortranarray(part) if i % 2 else part, starts[i])
        untouched[starts[i] : ends[i]] = expected[starts[i] : ends[i]]
        if i == 6:
            untouched[330:] = 0
        np.testing.assert_array_equal(stored(packed), untouched)
    assert fit(packed, 0, expected)
    ops.weight_pack(packed, rows[:0], 330)
    assert fit(packed, 0, expected)


@pytest.mark.parametrize("given", ["float16", "bfloat16"])
def test_weight_pack_of_every_16_bits(ops, given):
    """All that has 16 bits; float16 to float32 as NumPy converts, all others by their bits."""
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    if given == "bfloat16":
        assert fit(ops.packed(every, "bfloat16"), 0, every)
        assert fit(ops.packed(every), 0, every.astype(np.uint32) << 16)
        return
    half = every.view(np.float16)
    values, number = half.astype(np.float32), ~np.isnan(half)
    for dtype in "float32", "bfloat16":
        got = stored(ops.packed(half, dtype))
        assert (got[number] == bits(values, dtype)[number]).all()
        wide = got.astype(np.uint32) << 16 if dtype == "bfloat16" else got
        assert (np.isnan(wide.view(np.float32)) == ~number).all()


def test_weight_pack_keeps_nan(ops):
    patterns = np.array([[0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF]], np.uint32)
    got = stored(ops.packed(patterns.view(np.float32), "bfloat16"))[0]
    assert np.isnan((got.astype(np.uint32) << 16).view(np.float32)).all()


# -- Negative controls -------------------------------------------------------------------------


def test_checks_tell_wrong_results():
    x, w = normal(1, 40, 130), normal(2, 50, 130)
    y = in_order(x, w)
    check(y, x, w.T)
    short = x.copy()
    short[:, -1] = 0  # a forgotten last term
    with pytest.raises(AssertionError):
        check(in_order(short, w), x, w.T)
    noisy = y * (1 + 2e-6 * normal(3, 40, 50))  # forty times the rounding error
    with pytest.raises(AssertionError):
        check(noisy.astype(np.float32), x, w.T)
    # another size of block, another order, or a library's product gives other bits
    for other in in_order(x, w, block=32), in_order(x[:, ::-1], w[:, ::-1]), x @ w.T:
        assert (other != y).mean() > 0.1


def test_checks_tell_wrong_packing():
    rows, values = source(1, 70, 9, "float32")
    with Ops("plain") as ops:
        packed = ops.packed(rows)
        assert fit(packed, 0, bits(values, "float32"))
        assert not fit(packed, 1, bits(values[:69], "float32"))
        ops.weight_pack(packed, rows[:1], 69)
        assert not fit(packed, 0, bits(values, "float32"))
        packed = ops.packed(rows)
        ct.c_uint32.from_address(packed.data + 2 * 64 * 9 * 4 - 4).value = 1  # the last filling
        assert not fit(packed, 0, bits(values, "float32"))


def test_tensor_of_the_harness_keeps_strides():
    view = strided(normal(1, 3, 4))
    assert list(tensor(view).stride[:2]) == [7, 1]
