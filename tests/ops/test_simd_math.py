"""The elementary functions of kernels/cpu/simd_math.h, through the operations that use them:
relative error on float32 values of every size, and equal bits at every instruction-set level.

Errors are in units in the last place of the exact result, from NumPy's and the C library's
functions in float64, whose own error is far below that."""

import math

import numpy as np
import pytest

from tests.ops.harness import LossParams, Ops, available_isas, pointer
from tests.ops.tolerance import assert_bits

ISAS = available_isas()
RELU, GELU, GELU_TANH, SILU = range(4)
STEP = 9973  # one float in so many: about 200,000 of each sign


def floats(low, high, step=STEP):
    """Every `step`-th float32 between low and high, of both signs, by their bits."""
    magnitudes = np.arange(0, 0x7F800000, step, dtype=np.uint32).view(np.float32)
    x = np.concatenate([-magnitudes[::-1], magnitudes])
    return x[(x >= low) & (x <= high)].reshape(1, -1)


def units(got, exact):
    """The largest error in units in the last place."""
    _, exponent = np.frexp(exact)
    unit = np.ldexp(1.0, np.maximum(exponent, -125) - 24)
    return float((np.abs(got - exact) / unit).max())


def normal_cdf(x):
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape)


def activate(x, kind, isa=ISAS[-1]):
    y = np.empty_like(x)
    with Ops(isa, 2) as ops:
        ops.activation(y, x, kind, False)
    return y


def slope(x, kind, isa=ISAS[-1]):
    dx = np.empty_like(x)
    with Ops(isa, 2) as ops:
        ops.activation_backward(dx, None, np.ones_like(x), x, kind, False)
    return dx


def test_exp():
    """softmax([0, t]) for t <= -17.4 has a sum that rounds to 1: its second term is e^t."""
    t = floats(-87.33, -17.4)
    logits = np.stack([np.zeros_like(t[0]), t[0]], axis=1)
    n = len(logits)
    out = [np.empty(n, np.float32) for _ in range(2)]
    with Ops(ISAS[-1]) as ops:
        ops.cross_entropy(
            *out,
            logits,
            pointer(np.zeros(n, np.int32)),
            np.ones(n, np.float32),
            LossParams(0.0, 1.0, False, True),
        )
    assert units(logits[:, 1], np.exp(t[0].astype(np.float64))) <= 0.9


def test_sigmoid():
    x = floats(-87, 100)
    exact = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    tiny = np.abs(exact) < 2.0**-126
    assert units(activate(x, SILU)[~tiny], exact[~tiny]) <= 2.5 + 1


def test_tanh():
    x = floats(-40, 40)
    with Ops(ISAS[-1]) as ops:
        y = x.copy()
        ops.softcap(y, 1.0)
    assert units(y, np.tanh(x.astype(np.float64))) <= 2.5
    assert (np.abs(y) <= 1).all()
    assert (y[np.abs(x) > 10] == np.sign(x[np.abs(x) > 10])).all()


def test_normal_cdf_keeps_its_relative_accuracy_in_the_tail():
    x = floats(-12.9, 40)
    exact = x.astype(np.float64) * normal_cdf(x.astype(np.float64))
    # one rounding more, which counts up to two units where the product is just above a power of 2
    assert units(activate(x, GELU), exact) <= 6.1 + 2


def test_gelu_tanh_keeps_its_relative_accuracy_in_the_tail():
    """An exponent of size 2u rounded a few times errs by that many units."""
    x = floats(-9.5, 40)
    wide = x.astype(np.float64)
    u = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    exact = wide / (1 + np.exp(-2 * u))
    _, exponent = np.frexp(exact)
    unit = np.ldexp(1.0, np.maximum(exponent, -125) - 24)
    error = np.abs(activate(x, GELU_TANH) - exact) / unit
    assert (error <= 4 + 4 * np.abs(2 * u) * (wide < 0)).all()
    # the usual form has lost everything there
    usual = 0.5 * x * (1 + np.tanh(u.astype(np.float32)))
    assert np.abs(usual - exact)[(wide < -6)].max() > 0
    assert (usual[wide < -6] == 0).all()


@pytest.mark.parametrize("kind", (GELU, GELU_TANH, SILU))
def test_slopes(kind):
    """Absolute error in units of 1: slopes lie between -0.2 and 1.2."""
    x = floats(-20, 20)
    wide = x.astype(np.float64)
    if kind == GELU:
        exact = normal_cdf(wide) + wide * np.exp(-wide * wide / 2) / np.sqrt(2 * np.pi)
    else:
        c = 2 * np.sqrt(2 / np.pi)
        a = wide if kind == SILU else c * (wide + 0.044715 * wide**3)
        da = np.ones_like(wide) if kind == SILU else c * (1 + 3 * 0.044715 * wide**2)
        s = 1 / (1 + np.exp(-a))
        exact = s + wide * s * (1 - s) * da
    assert np.abs(slope(x, kind) - exact).max() <= 4 * 2.0**-23


def test_equal_bits_at_every_level():
    x = floats(-1e30, 1e30, step=20011)
    x = np.concatenate([x, np.float32([[np.inf, -np.inf, np.nan, 88.3, 88.4, -87.3, -87.4]])], 1)
    for kind in (GELU, GELU_TANH, SILU):
        values = [(activate(x, kind, isa), slope(x, kind, isa)) for isa in ISAS]
        for got in values[1:]:
            assert_bits(got[0], values[0][0])
            assert_bits(got[1], values[0][1])


def test_the_measure_sees_one_wrong_coefficient():
    """A coefficient of tanh's series that is off by 1e-5."""
    x = floats(-0.3, 0.3)
    wide = x.astype(np.float64)
    wrong = wide - wide**3 * (1 / 3 + 1e-5) + 2 * wide**5 / 15 - 17 * wide**7 / 315
    assert units(wrong.astype(np.float32), np.tanh(wide)) > 2.5
