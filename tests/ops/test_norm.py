"""norm and norm_backward against float64 formulas and PyTorch."""

import itertools

import numpy as np
import pytest

from tests.ops.harness import NormParams, Ops, available_isas
from tests.ops.tolerance import EPS, assert_bits, assert_twice, spaced

torch = pytest.importorskip("torch")

LAYER, RMS = 0, 1
ISAS = available_isas()
SHAPES = [(1, 1), (1, 16), (3, 7), (5, 33), (2, 64), (17, 768), (200, 300), (40, 1000), (1, 5120)]
HEAD_SHAPES = [(1, 1, 8), (5, 3, 17), (9, 12, 64), (33, 4, 128)]
KINDS = [(LAYER, 0.0), (RMS, 0.0), (RMS, 1.0)]


def parameters(kind, offset, eps=1e-5):
    return NormParams(kind, eps, offset)


def data(shape, seed=0, center=0.5):
    rng = np.random.default_rng(seed)
    draw = lambda *size: rng.normal(size=size).astype(np.float32)  # noqa: E731
    width = shape[-1]
    return draw(*shape) * 2 + np.float32(center), draw(width) + 1, draw(width), draw(*shape)


def reference(x, weight, bias, dy, kind, offset, dtype, eps=1e-5):
    """Value and gradients by autograd, in this precision."""
    x, weight, bias, dy = (torch.tensor(a, dtype=dtype) for a in (x, weight, bias, dy))
    x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    width = (x.shape[-1],)
    # eps is a float32 in the core
    eps = float(np.float32(eps))
    if kind == LAYER:
        y = torch.nn.functional.layer_norm(x, width, weight + offset, bias, eps)
    else:
        y = torch.nn.functional.rms_norm(x, width, weight + offset, eps) + bias
    y.backward(dy)
    return [a.detach().numpy() for a in (y, x.grad, weight.grad, bias.grad)]


def run_forward(ops, x, weight, bias, kind, offset, y=None):
    rows = int(np.prod(x.shape[:-1]))
    y = np.empty_like(x) if y is None else y
    mean, rstd = np.empty(rows, np.float32), np.empty(rows, np.float32)
    ops.norm(y, mean, rstd, x, weight, bias, parameters(kind, offset))
    return y, mean, rstd


def run_backward(ops, x, weight, bias, dy, kind, offset):
    y, mean, rstd = run_forward(ops, x, weight, bias, kind, offset)
    dx = np.full_like(x, np.nan)
    dweight, dbias = np.zeros_like(weight), np.zeros_like(weight)
    ops.norm_backward(
        dx, dweight, dbias, dy, x, weight, mean, rstd, parameters(kind, offset), False
    )
    return y, dx, dweight, dbias


@pytest.mark.parametrize("shape", SHAPES + HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("kind, offset", KINDS)
def test_value_and_gradients(shape, kind, offset):
    x, weight, bias, dy = data(shape)
    exact = reference(x, weight, bias, dy, kind, offset, torch.float64)
    single = reference(x, weight, bias, dy, kind, offset, torch.float32)
    for isa, threads in itertools.product(ISAS, (1, 2)):
        with Ops(isa, threads) as ops:
            got = run_backward(ops, x, weight, bias, dy, kind, offset)
        for name, a, b, c in zip(("y", "dx", "dweight", "dbias"), got, exact, single, strict=True):
            if shape[-1] == 1 and kind == LAYER and name in ("dx", "dweight"):
                # exactly 0, but for what cancels
                assert np.abs(a - b).max() <= 8 * EPS * 316 * np.abs(dy * weight).max()
                continue
            if name in ("y", "dx"):
                assert_twice(a, b, c, f"{name} {isa} {threads}")
            else:
                assert_sums(a, b, c, x, dy)


def assert_sums(ours, exact, other, x, dy):
    """Sums over rows: each within the bound of a sum of that many rounded terms; the root mean
    square error at most twice PyTorch's where there are enough of them to compare."""
    rows = dy.reshape(-1, dy.shape[-1]).astype(np.float64)
    size = np.abs(rows).sum(0) * np.sqrt(x.shape[-1])  # a normalised row has this length
    assert (np.abs(ours - exact) <= (len(rows) + 6) * EPS / 2 * size).all()
    if ours.size >= 256:
        rms = lambda a: np.sqrt(np.mean((a - exact) ** 2))  # noqa: E731
        assert rms(ours) <= 2 * rms(other) + EPS / 2 * np.abs(exact).max()


@pytest.mark.parametrize("shape", SHAPES + HEAD_SHAPES, ids=str)
def test_rows_have_the_same_bits_everywhere(shape):
    x, weight, bias, _ = data(shape, seed=1)
    for kind, offset in KINDS:
        with Ops("plain") as ops:
            expected = run_forward(ops, x, weight, bias, kind, offset)
            alone = [
                run_forward(ops, x[i : i + 1].copy(), weight, bias, kind, offset)[0]
                for i in range(min(3, shape[0]))
            ]
        for i, row in enumerate(alone):
            assert_bits(row, expected[0][i : i + 1])
        for isa, threads in itertools.product(ISAS, (1, 2)):
            with Ops(isa, threads) as ops:
                for a, b in zip(
                    run_forward(ops, x, weight, bias, kind, offset), expected, strict=True
                ):
                    assert_bits(a, b, f"{isa} {threads}")


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_by_finite_differences(isa):
    x, weight, bias, dy = data((3, 10), seed=2)
    for kind, offset in KINDS:
        with Ops(isa) as ops:
            _, dx, dweight, _ = run_backward(ops, x, weight, bias, dy, kind, offset)

        def loss(x, weight, kind=kind, offset=offset):
            x = x.astype(np.float64)
            d = x - x.mean(-1, keepdims=True) if kind == LAYER else x
            y = d / np.sqrt((d * d).mean(-1, keepdims=True) + 1e-5) * (weight + offset)
            return (y * dy).sum()

        h = 1e-6
        for at in [(0, 0), (1, 4), (2, 9)]:
            step = np.zeros(x.shape)
            step[at] = h
            slope = (loss(x + step, weight) - loss(x - step, weight)) / (2 * h)
            assert dx[at] == pytest.approx(slope, abs=1e-5, rel=1e-5)
            step = np.zeros(weight.shape)
            step[at[1]] = h
            slope = (loss(x, weight + step) - loss(x, weight - step)) / (2 * h)
            assert dweight[at[1]] == pytest.approx(slope, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_strided_in_place_and_without_statistics(isa):
    x, weight, bias, _ = data((7, 45), seed=3)
    with Ops(isa, 2) as ops:
        expected, _, _ = run_forward(ops, x, weight, bias, LAYER, 0.0)
        view, buffer = spaced(x.shape, 5)
        view[...] = x
        out, out_buffer = spaced(x.shape, 3)
        ops.norm(out, None, None, view, weight, bias, parameters(LAYER, 0.0))
        assert_bits(out, expected)
        assert np.isnan(out_buffer[:, 45:]).all()
        ops.norm(view, None, None, view, weight, bias, parameters(LAYER, 0.0))
        assert_bits(view, expected)
        assert np.isnan(buffer[:, 45:]).all()
        plain = np.empty_like(x)
        ops.norm(plain, None, None, x, weight, None, parameters(LAYER, 0.0))
        exact = reference(x, weight, 0 * bias, x, LAYER, 0.0, torch.float64)[0]
        single = reference(x, weight, 0 * bias, x, LAYER, 0.0, torch.float32)[0]
        assert_twice(plain, exact, single)


@pytest.mark.parametrize("isa", ISAS)
def test_heads_inside_a_joined_buffer(isa):
    """Queries of a query-key-value buffer, each head on its own, in place."""
    rng = np.random.default_rng(4)
    joined = rng.normal(size=(6, 3 * 4 * 24)).astype(np.float32)
    before = joined.copy()
    weight = rng.normal(size=24).astype(np.float32)
    queries = np.lib.stride_tricks.as_strided(joined, (6, 4, 24), (joined.strides[0], 24 * 4, 4))
    with Ops(isa, 2) as ops:
        ops.norm(queries, None, None, queries, weight, None, parameters(RMS, 1.0))
    q = before[:, :96].reshape(6, 4, 24).astype(np.float64)
    exact = q / np.sqrt((q * q).mean(-1, keepdims=True) + 1e-5) * (weight + 1.0)
    assert np.abs(queries - exact).max() <= 6 * EPS * np.abs(exact).max()
    assert_bits(joined[:, 96:], before[:, 96:])


@pytest.mark.parametrize("isa", ISAS)
def test_backward_accumulates_and_overwrites(isa):
    x, weight, bias, dy = data((9, 50), seed=5)
    with Ops(isa, 2) as ops:
        _, mean, rstd = run_forward(ops, x, weight, bias, LAYER, 0.0)
        p = parameters(LAYER, 0.0)
        _, dx, dweight, dbias = run_backward(ops, x, weight, bias, dy, LAYER, 0.0)
        start = np.full_like(x, 3)
        twice_w, twice_b = dweight.copy(), dbias.copy()
        ops.norm_backward(start, twice_w, twice_b, dy, x, weight, mean, rstd, p, True)
        assert_bits(start, np.float32(3) + dx)
        assert_bits(twice_w, 2 * dweight)
        assert_bits(twice_b, 2 * dbias)
        same = dy.copy()
        ops.norm_backward(same, np.zeros_like(weight), None, same, x, weight, mean, rstd, p, False)
        assert_bits(same, dx)


def test_a_large_mean_does_not_cancel():
    """Two passes over the row: the mean first. (E[x^2] - mean^2 would lose every digit here.)"""
    x, weight, bias, _ = data((4, 768), seed=6, center=0.0)
    x += np.float32(4096)
    exact = reference(x, weight, bias, x, LAYER, 0.0, torch.float64)[0]
    with Ops(available_isas()[-1]) as ops:
        y, _, _ = run_forward(ops, x, weight, bias, LAYER, 0.0)
    # the mean errs by about eps * 4096, in units of a deviation of 2
    assert np.abs(y - exact).max() <= 4 * EPS * 4096 * np.abs(weight).max()
    square = np.float32((x * x).mean(-1) - x.mean(-1) ** 2)
    assert np.abs(square / x.var(-1) - 1).max() > 1e-2


def test_nothing_outlives_a_wrong_sign():
    """The comparison sees a gradient without its projection on the row."""
    x, weight, bias, dy = data((8, 64), seed=7)
    exact = reference(x, weight, bias, dy, LAYER, 0.0, torch.float64)
    single = reference(x, weight, bias, dy, LAYER, 0.0, torch.float32)
    with Ops("plain") as ops:
        _, mean, rstd = run_forward(ops, x, weight, bias, LAYER, 0.0)
    normal = (x - mean[:, None]) * rstd[:, None]
    g = dy * weight
    for shift, slope in ((1, -1), (-1, 0), (0, 1)):
        wrong = rstd[:, None] * (
            g
            - shift * g.mean(-1, keepdims=True)
            - slope * normal * (g * normal).mean(-1, keepdims=True)
        )
        with pytest.raises(AssertionError):
            assert_twice(wrong, exact[1], single[1])
