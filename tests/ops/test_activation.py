"""activation, activation_backward and softcap against float64 formulas and PyTorch."""

import itertools

import numpy as np
import pytest

from tests.ops.harness import Ops, available_isas
from tests.ops.tolerance import EPS, assert_bits, assert_twice, spaced

torch = pytest.importorskip("torch")

ISAS = available_isas()
RELU, GELU, GELU_TANH, SILU = range(4)
FUNCTIONS = {
    RELU: torch.nn.functional.relu,
    GELU: torch.nn.functional.gelu,
    GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    SILU: torch.nn.functional.silu,
}
SHAPES = [(1, 1), (1, 16), (3, 17), (2, 255), (7, 64), (5, 2048), (3, 5000), (1, 40000)]
ALL_KINDS = pytest.mark.parametrize("kind", FUNCTIONS, ids=("relu", "gelu", "gelu_tanh", "silu"))
GATED = pytest.mark.parametrize("gated", (False, True), ids=("plain", "gated"))


def data(shape, gated, seed=0):
    rng = np.random.default_rng(seed)
    x = 2 * rng.normal(size=(shape[0], shape[1] * (1 + gated))).astype(np.float32)
    return x, rng.normal(size=shape).astype(np.float32)


def reference(x, dy, kind, gated, dtype):
    x, dy = torch.tensor(x, dtype=dtype, requires_grad=True), torch.tensor(dy, dtype=dtype)
    width = dy.shape[1]
    y = FUNCTIONS[kind](x[:, :width])
    y = y * x[:, width:] if gated else y
    y.backward(dy)
    return y.detach().numpy(), x.grad.numpy()


def run(ops, x, dy, kind, gated):
    y, again, dx = np.full_like(dy, np.nan), np.full_like(dy, np.nan), np.full_like(x, np.nan)
    ops.activation(y, x, kind, gated)
    ops.activation_backward(dx, again, dy, x, kind, gated)
    return y, dx, again


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL_KINDS
@GATED
def test_value_and_gradient(shape, kind, gated):
    x, dy = data(shape, gated)
    y64, dx64 = reference(x, dy, kind, gated, torch.float64)
    y32, dx32 = reference(x, dy, kind, gated, torch.float32)
    if dy.size < 64:  # PyTorch may be exact by luck: its usual error is half a unit or so
        y32, dx32 = y32 + EPS / 4 * np.abs(x).max(), dx32 + EPS / 2 * np.abs(dy).max()
    with Ops("plain") as ops:
        expected = run(ops, x, dy, kind, gated)
    assert_twice(expected[0], y64, y32)
    assert_twice(expected[1], dx64, dx32)
    assert_bits(expected[2], expected[0])
    for isa, threads in itertools.product(ISAS, (1, 2)):
        with Ops(isa, threads) as ops:
            for a, b in zip(run(ops, x, dy, kind, gated), expected, strict=True):
                assert_bits(a, b, f"{isa} {threads}")


@ALL_KINDS
@GATED
def test_gradient_by_finite_differences(kind, gated):
    x, dy = data((2, 20), gated, seed=1)
    x[np.abs(x) < 1e-3] = 0.5  # away from the corner of ReLU
    with Ops(ISAS[-1]) as ops:
        _, dx, _ = run(ops, x, dy, kind, gated)
    h = 1e-6
    for at in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[at] = h
        ends = [
            (reference(x.astype(np.float64) + s * step, dy, kind, gated, torch.float64)[0] * dy)
            for s in (1, -1)
        ]
        assert dx[at] == pytest.approx((ends[0] - ends[1]).sum() / (2 * h), abs=2e-6, rel=2e-6)


@ALL_KINDS
@pytest.mark.parametrize("isa", ISAS)
def test_in_place_and_strided(isa, kind):
    with Ops(isa, 2) as ops:
        x, dy = data((9, 100), False, seed=2)
        y, dx, _ = run(ops, x, dy, kind, False)
        view, buffer = spaced(x.shape, 3)
        view[...] = x
        ops.activation(view, view, kind, False)
        assert_bits(view, y)
        assert np.isnan(buffer[:, 100:]).all()
        for gated in (False, True):
            x, dy = data((9, 100), gated, seed=3)
            y, dx, _ = run(ops, x, dy, kind, gated)
            a, a_buffer = spaced(x.shape, 7)
            b, b_buffer = spaced(dy.shape, 5)
            a[...], b[...] = x, dy
            ops.activation_backward(a, b, b, a, kind, gated)
            assert_bits(a, dx)
            assert_bits(b, y)
            assert np.isnan(a_buffer[:, x.shape[1] :]).all()
            assert np.isnan(b_buffer[:, 100:]).all()
            alone = np.empty_like(x)
            ops.activation_backward(alone, None, dy, x, kind, gated)
            assert_bits(alone, dx)


@ALL_KINDS
def test_special_values(kind):
    """Signs of infinity, NaN, and numbers whose cube or square overflows."""
    large = np.float32([1e6, 1e15, 1e20, 3e38])
    x = np.concatenate([-large, large, np.float32([0, -0.0, np.nan, np.inf, 1e-40])])[None]
    for isa in ISAS:
        with Ops(isa) as ops:
            y, dx, _ = run(ops, x, np.ones_like(x), kind, False)
        assert (y[0, :4] == 0).all() and (dx[0, :4] == 0).all()
        assert (y[0, 4:8] == large).all() and (dx[0, 4:8] == 1).all()
        assert (y[0, 8:10] == 0).all()
        assert np.isnan(y[0, 10]) and y[0, 11] == np.inf
        assert y[0, 12] == (x[0, 12] if kind == RELU else np.float32(x[0, 12] / 2))
        if kind != RELU:
            assert np.isnan(dx[0, 10])


@pytest.mark.parametrize("cap", (1.0, 30.0, 50.0))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softcap(shape, cap):
    x, _ = data(shape, False, seed=4)
    x *= np.float32(cap)
    exact = cap * np.tanh(x.astype(np.float64) / cap)
    single = np.float32(cap) * torch.tanh(torch.tensor(x) / cap).numpy()
    with Ops("plain") as ops:
        expected = x.copy()
        ops.softcap(expected, cap)
    if x.size < 64:
        single = single + np.float32(EPS / 2 * cap)
    assert_twice(expected, exact, single)
    assert np.abs(expected).max() <= cap
    for isa, threads in itertools.product(ISAS, (1, 2)):
        with Ops(isa, threads) as ops:
            view, buffer = spaced(shape, 9)
            view[...] = x
            ops.softcap(view, cap)
        assert_bits(view, expected, f"{isa} {threads}")
        assert np.isnan(buffer[:, shape[1] :]).all()


def test_the_two_gelus_are_told_apart():
    x, dy = data((4, 1000), False, seed=5)
    exact, single = (reference(x, dy, GELU, False, t)[0] for t in (torch.float64, torch.float32))
    with Ops(ISAS[-1]) as ops:
        y, _, _ = run(ops, x, dy, GELU_TANH, False)
    with pytest.raises(AssertionError):
        assert_twice(y, exact, single)
