"""Rotary positions against float64 NumPy."""

import ctypes as ct
import itertools

import numpy as np
import pytest

from .harness import INVALID, OpError, Ops, Rope, available_isas, pointer

EPS = np.finfo(np.float32).eps


def tables(positions, dims, base=10000.0):
    angle = np.arange(positions)[:, None] * base ** (-np.arange(0, dims, 2) / dims)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rope(cosine, sine, interleaved):
    view = Rope(cosine.ctypes.data, sine.ctypes.data, *cosine.shape, interleaved)
    view.dims = 2 * cosine.shape[1]
    view.keep = cosine, sine
    return view


def expected(x, position, cosine, sine, interleaved, inverse):
    """The definition, in the precision of x."""
    half = cosine.shape[1]
    c = cosine.astype(x.dtype)[position][:, None]
    s = sine.astype(x.dtype)[position][:, None] * (-1 if inverse else 1)
    index = np.arange(half)
    first, second = (2 * index, 2 * index + 1) if interleaved else (index, index + half)
    y = x.copy()
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., second] * c + x[..., first] * s
    return y


def strided(rng, rows, heads, width):
    """A view [rows, heads, width] into wider rows."""
    buffer = rng.standard_normal((rows, heads * width + 7)).astype(np.float32)
    view = buffer[:, 3 : 3 + heads * width].reshape(rows, heads, width)
    assert np.shares_memory(buffer, view)
    return buffer, view


CASES = [
    # rows, heads, width, dims
    (1, 1, 2, 2),
    (3, 2, 8, 8),
    (5, 3, 20, 12),
    (17, 4, 64, 64),
    (7, 2, 80, 32),
    (2, 12, 128, 128),
    (64, 4, 128, 66),
]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("interleaved,inverse", itertools.product((False, True), repeat=2))
def test_values(isa, case, interleaved, inverse):
    rows, heads, width, dims = case
    rng = np.random.default_rng(rows * width)
    cosine, sine = tables(100, dims)
    position = rng.integers(0, 100, rows).astype(np.int32)
    buffer, x = strided(rng, rows, heads, width)
    before, original = buffer.copy(), x.copy()
    with Ops(isa) as ops:
        ops.rotate(x, pointer(position), rope(cosine, sine, interleaved), inverse)
    arguments = (position, cosine, sine, interleaved, inverse)
    exact = expected(original.astype(np.float64), *arguments)
    # One rounded product, no larger than |x|, and one rounded result: half an ulp each, doubled.
    bound = EPS * (np.abs(exact) + np.abs(original).max())
    assert np.all(np.abs(x - exact) <= bound)
    assert np.array_equal(x[..., dims:], original[..., dims:])
    buffer[:, 3 : 3 + heads * width] = before[:, 3 : 3 + heads * width]
    assert np.array_equal(buffer, before), "wrote outside the view"


@pytest.mark.parametrize("interleaved,inverse", itertools.product((False, True), repeat=2))
def test_bits_do_not_depend_on_level_threads_or_rows(interleaved, inverse):
    rows, heads, width, dims = 300, 4, 72, 52
    rng = np.random.default_rng(5)
    table = rope(*tables(64, dims), interleaved)
    position = rng.integers(0, 64, rows).astype(np.int32)
    x = rng.standard_normal((rows, heads, width)).astype(np.float32)
    x[0, 0, :] = 0.0
    results = []
    for isa, threads in itertools.product(available_isas(), (1, 2)):
        y = x.copy()
        with Ops(isa, threads) as ops:
            ops.rotate(y, pointer(position), table, inverse)
        results.append(y)
        alone = x[7:8].copy()
        with Ops(isa, threads) as ops:
            ops.rotate(alone, pointer(position[7:8].copy()), table, inverse)
        assert np.array_equal(alone.view(np.uint32), y[7:8].view(np.uint32))
    for y in results[1:]:
        assert np.array_equal(y.view(np.uint32), results[0].view(np.uint32))


@pytest.mark.parametrize("interleaved", (False, True))
def test_inverse_is_the_gradient(interleaved):
    """<rotate(x), y> = <x, inverse(y)>, as for every orthogonal map and its gradient."""
    rng = np.random.default_rng(1)
    table = rope(*tables(32, 16), interleaved)
    position = np.arange(8, dtype=np.int32)
    x, y = rng.standard_normal((2, 8, 2, 16)).astype(np.float32)
    turned, back = x.copy(), y.copy()
    with Ops("plain") as ops:
        ops.rotate(turned, pointer(position), table, False)
        ops.rotate(back, pointer(position), table, True)
    left = np.sum(turned.astype(np.float64) * y)
    right = np.sum(x.astype(np.float64) * back)
    assert abs(left - right) <= 4 * EPS * np.sum(np.abs(x) * np.abs(y) + np.abs(x) * np.abs(back))
    # The control: the forward rotation is not the gradient.
    wrong = y.copy()
    with Ops("plain") as ops:
        ops.rotate(wrong, pointer(position), table, False)
    assert abs(left - np.sum(x.astype(np.float64) * wrong)) > 0.01


def test_pairing_matters():
    rng = np.random.default_rng(2)
    cosine, sine = tables(16, 8)
    x = rng.standard_normal((4, 1, 8)).astype(np.float32)
    position = np.arange(4, dtype=np.int32)
    halves, pairs = x.copy(), x.copy()
    with Ops("plain") as ops:
        ops.rotate(halves, pointer(position), rope(cosine, sine, False), False)
        ops.rotate(pairs, pointer(position), rope(cosine, sine, True), False)
    assert np.array_equal(halves[0], x[0])
    assert np.abs(halves[1:] - pairs[1:]).max() > 0.1


def test_refuses_bad_arguments():
    cosine, sine = tables(16, 8)
    x = np.zeros((2, 1, 8), np.float32)
    good = np.zeros(2, np.int32)
    with Ops("plain") as ops:
        for position in ([0, 16], [-1, 0]):
            with pytest.raises(OpError, match="position") as error:
                ops.rotate(
                    x, pointer(np.array(position, np.int32)), rope(cosine, sine, False), False
                )
            assert error.value.status == INVALID
        for dims in (0, 3, 10):
            table = rope(cosine, sine, False)
            table.dims = ct.c_int32(dims).value
            with pytest.raises(OpError, match="dims"):
                ops.rotate(x, pointer(good), table, False)
