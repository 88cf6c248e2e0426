"""embed and embed_backward against indexing in NumPy and float64 sums."""

import itertools

import numpy as np
import pytest

from tests.ops.harness import INVALID, OpError, Ops, available_isas, pointer, weight_rows
from tests.ops.tolerance import EPS, assert_bits, spaced

ISAS = available_isas()
# rows, width, vocabulary, positions
SIZES = [(1, 1, 1, 1), (3, 16, 5, 4), (7, 33, 130, 9), (64, 768, 257, 40), (1, 100, 63, 2)]


def data(size, seed=0):
    n, c, v, p = size
    rng = np.random.default_rng(seed)
    wte = rng.normal(size=(v, c)).astype(np.float32)
    wpe = rng.normal(size=(p, c)).astype(np.float32)
    token = rng.integers(0, v, size=n).astype(np.int32)
    token[-1] = v - 1
    position = rng.integers(0, p, size=n).astype(np.int32)
    position[-1] = p - 1
    return wte, wpe, token, position


def to_bfloat16(x):
    """Rounded to nearest even, as float32."""
    bits = x.view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32)).view(np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", (1.0, 27.712812423706055))
def test_embed(size, scale):
    wte, wpe, token, position = data(size)
    factor = np.float32(scale)
    for isa, threads in itertools.product(ISAS, (1, 2)):
        with Ops(isa, threads) as ops:
            forms = [
                (weight_rows(wte), wte),
                (ops.packed(wte), wte),
                (ops.packed(wte, "bfloat16"), to_bfloat16(wte)),
            ]
            for weight, values in forms:
                for table in (None, wpe):
                    expected = factor * values[token]
                    if table is not None:
                        expected = expected + table[position]
                    x, buffer = spaced((size[0], size[1]), 3)
                    ops.embed(x, weight, table, pointer(token), pointer(position), scale)
                    assert_bits(x, expected, f"{isa} {threads}")
                    assert np.isnan(buffer[:, size[1] :]).all()


def test_embed_without_positions_needs_none():
    wte, _, token, _ = data(SIZES[1])
    x = np.empty((3, 16), np.float32)
    with Ops(ISAS[-1]) as ops:
        ops.embed(x, weight_rows(wte), None, pointer(token), None, 1.0)
    assert_bits(x, wte[token])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", (-1, 5, 2**31 - 1))
def test_bad_indices_are_refused(isa, bad):
    wte, wpe, token, position = data(SIZES[1])
    for name, last in (("token", 4), ("position", 3)):
        indices = {"token": token.copy(), "position": position.copy()}
        indices[name][1] = bad
        x = np.full((3, 16), np.nan, np.float32)
        with Ops(isa) as ops:
            arguments = [pointer(indices["token"]), pointer(indices["position"]), 1.0]
            with pytest.raises(OpError) as error:
                ops.embed(x, weight_rows(wte), wpe, *arguments)
            assert error.value.status == INVALID
            for word in (f"{name}[1]", str(bad), str(last)):
                assert word in str(error.value)
            assert np.isnan(x).all()
            with pytest.raises(OpError) as error:
                ops.embed_backward(wte, wpe, x, *arguments)
            assert error.value.status == INVALID


def in_order(table, index, rows):
    """table[index[n]] += rows[n] for n = 0, 1, ..., each sum in float32."""
    table = table.copy()
    for i, row in zip(index, rows, strict=True):
        table[i] += row
    return table


@pytest.mark.parametrize("size", [*SIZES, (500, 70, 3, 5)], ids=str)
@pytest.mark.parametrize("scale", (1.0, 27.712812423706055))
def test_embed_backward(size, scale):
    wte, wpe, token, position = data(size, seed=1)
    dx, _ = spaced((size[0], size[1]), 5, fill=1e30)
    dx[...] = np.random.default_rng(2).normal(size=dx.shape)
    expected = in_order(wte, token, np.float32(scale) * dx), in_order(wpe, position, dx)
    for isa, threads in itertools.product(ISAS, (1, 2)):
        with Ops(isa, threads) as ops:
            got = wte.copy(), wpe.copy()
            ops.embed_backward(*got, dx, pointer(token), pointer(position), scale)
            assert_bits(got[0], expected[0], f"{isa} {threads}")
            assert_bits(got[1], expected[1], f"{isa} {threads}")
            alone = wte.copy()
            ops.embed_backward(alone, None, dx, pointer(token), None, scale)
            assert_bits(alone, expected[0])
    # and the sum is the right one: a chain of so many roundings
    exact = wte.astype(np.float64)
    size_of_sum = np.abs(exact)
    np.add.at(exact, token, np.float64(np.float32(scale)) * dx)
    np.add.at(size_of_sum, token, np.float64(scale) * np.abs(dx))
    most = np.bincount(token).max()
    assert (np.abs(expected[0] - exact) <= (most + 1) * EPS / 2 * size_of_sum * 1.001).all()


def test_the_order_of_addition_is_seen():
    """Repeated tokens added from the last to the first give other bits."""
    wte, _, token, _ = data((500, 70, 3, 5), seed=3)
    dx = np.random.default_rng(4).normal(size=(500, 70)).astype(np.float32)
    reverse = in_order(wte, token[::-1], dx[::-1])
    with pytest.raises(AssertionError):
        assert_bits(reverse, in_order(wte, token, dx))
