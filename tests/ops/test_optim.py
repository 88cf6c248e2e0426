"""sum_squares and adamw against float64 sums and torch.optim.AdamW."""

import ctypes as ct
import itertools
import math

import numpy as np
import pytest

from tests.ops.harness import INVALID, AdamwParams, OpError, Ops, available_isas
from tests.ops.tolerance import assert_bits, assert_twice

torch = pytest.importorskip("torch")

ISAS = available_isas()
LENGTHS = [1, 15, 16, 17, 1000, 4096, 16384, 16385, 100_003]


def sum_squares(ops, x):
    total = ct.c_double(-1)
    total_pointer = ct.c_void_p(ct.addressof(total))
    ops.sum_squares(total_pointer, x)
    return total.value


@pytest.mark.parametrize("n", LENGTHS)
def test_sum_squares(n):
    x = np.random.default_rng(n).normal(size=n).astype(np.float32) * 3
    exact = math.fsum(v * v for v in x.astype(np.float64).tolist())
    found = set()
    for isa, threads in itertools.product(ISAS, (1, 2, 3)):
        with Ops(isa, threads) as ops:
            found.add(sum_squares(ops, x))
    assert len(found) == 1
    # every square is exact in float64; a lane adds n / 16 of them, or 1024 and then the blocks
    terms = min(n, 16384) / 16 + 5 + n / 16384
    assert abs(found.pop() - exact) <= terms * 2.0**-53 * exact


def test_sum_squares_of_extremes_and_nothing():
    with Ops(ISAS[-1]) as ops:
        x = np.float32([3e38, 1e-30, -3e38])
        assert sum_squares(ops, x) == pytest.approx(2 * float(x[0]) ** 2)
        assert sum_squares(ops, np.float32([1e-40])) == float(np.float32(1e-40)) ** 2
        assert sum_squares(ops, np.empty(0, np.float32)) == 0
        assert math.isnan(sum_squares(ops, np.float32([1, np.nan])))
        assert sum_squares(ops, np.float32([1, -np.inf])) == math.inf


def test_sum_squares_in_float32_would_be_seen():
    x = np.random.default_rng(0).normal(size=100_003).astype(np.float32)
    exact = math.fsum(v * v for v in x.astype(np.float64).tolist())
    assert abs(float((x * x).sum()) - exact) > 2000 * 2.0**-53 * exact


CASES = {
    "usual": dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    "torch": dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2),
    "no decay": dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0),
    "zero betas": dict(lr=1e-2, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.1),
    "large eps": dict(lr=1e-2, betas=(0.8, 0.9), eps=1.0, weight_decay=0.5),
}


def run(ops, case, p, gradients, scale=1.0):
    """The states after these gradients, and the last gradient's buffer."""
    p = p.copy()
    m, v = np.zeros_like(p), np.zeros_like(p)
    states = []
    for step, gradient in enumerate(gradients, 1):
        g = gradient.copy()
        settings = AdamwParams(
            case["lr"], *case["betas"], case["eps"], case["weight_decay"], scale, step
        )
        ops.adamw(p, m, v, g, settings)
        states.append([p.copy(), m.copy(), v.copy()])
        assert not g.any()
    return states


def reference(case, p, gradients, dtype, scale=1.0):
    p = torch.nn.Parameter(torch.tensor(p, dtype=dtype))
    optimizer = torch.optim.AdamW([p], **case, foreach=False)
    states = []
    for gradient in gradients:
        p.grad = torch.tensor(gradient, dtype=dtype) * scale
        optimizer.step()
        state = optimizer.state[p]
        states.append(
            [t.detach().numpy().copy() for t in (p, state["exp_avg"], state["exp_avg_sq"])]
        )
    return states


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("n", [17, 1000, 40_001])
def test_adamw(case, n):
    case = case
    rng = np.random.default_rng(n)
    p = rng.normal(size=n).astype(np.float32)
    gradients = [rng.normal(size=n).astype(np.float32) * 10.0**-k for k in range(4)]
    exact = reference(case, p, gradients, torch.float64)
    single = reference(case, p, gradients, torch.float32)
    with Ops("plain") as ops:
        expected = run(ops, case, p, gradients)
    for step, (a, b, c) in enumerate(zip(expected, exact, single, strict=True), 1):
        for name, ours, want, other in zip("pmv", a, b, c, strict=True):
            assert_twice(ours, want, other, f"{name} after step {step}")
        # what changed, not only what is left of p
        before = [p, *(s[0] for s in expected)][step - 1].astype(np.float64)
        wanted = [p, *(s[0] for s in exact)][step - 1]
        change, want = a[0] - before, b[0] - wanted
        assert np.abs(change - want).max() <= 3 * 2.0**-24 * np.abs(p).max() * step + 1e-6 * step
    for isa, threads in itertools.product(ISAS, (1, 2)):
        with Ops(isa, threads) as ops:
            for a, b in zip(run(ops, case, p, gradients), expected, strict=True):
                for ours, want in zip(a, b, strict=True):
                    assert_bits(ours, want, f"{isa} {threads}")


def test_adamw_scales_the_gradient_first():
    case = CASES["torch"]
    rng = np.random.default_rng(1)
    p, g = (rng.normal(size=500).astype(np.float32) for _ in range(2))
    with Ops(ISAS[-1]) as ops:
        a = run(ops, case, p, [g, 2 * g], scale=0.25)
        b = run(ops, case, p, [g / 4, g / 2])
    for x, y in zip(a, b, strict=True):
        for ours, want in zip(x, y, strict=True):
            assert_bits(ours, want)


def test_adamw_of_zero_gradients_only_decays():
    case = CASES["usual"]
    p = np.float32([1, -2, 0])
    with Ops(ISAS[-1]) as ops:
        state = run(ops, case, p, [np.zeros(3, np.float32)])[0]
    np.testing.assert_allclose(state[0], p * (1 - 3e-4 * 0.1), rtol=2.0**-23)
    assert not state[1].any() and not state[2].any()


def test_adamw_refuses_nonsense():
    p = np.zeros(4, np.float32)
    good = (1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0, 1)
    for field, value in ((0, -1.0), (1, 1.0), (2, float("nan")), (3, -1.0), (6, 0)):
        settings = AdamwParams(*(value if i == field else v for i, v in enumerate(good)))
        with Ops(ISAS[-1]) as ops, pytest.raises(OpError) as error:
            ops.adamw(p, p.copy(), p.copy(), p.copy(), settings)
        assert error.value.status == INVALID


def test_variants_of_adam_are_told_apart():
    """Decay through the gradient, and eps before the bias correction."""
    case = CASES["large eps"]
    rng = np.random.default_rng(2)
    p, g = (rng.normal(size=500).astype(np.float32) for _ in range(2))
    exact = reference(case, p, [g], torch.float64)[0][0]
    single = reference(case, p, [g], torch.float32)[0][0]
    coupled = torch.nn.Parameter(torch.tensor(p, dtype=torch.float64))
    coupled.grad = torch.tensor(g, dtype=torch.float64)
    torch.optim.Adam([coupled], **case).step()
    (_, b2), lr, eps = case["betas"], case["lr"], case["eps"]
    v = (1 - b2) * g.astype(np.float64) ** 2
    inside = p * (1 - lr * case["weight_decay"]) - lr * g / ((np.sqrt(v) + eps) / math.sqrt(1 - b2))
    for wrong in (coupled.detach().numpy(), inside):
        with pytest.raises(AssertionError):
            assert_twice(wrong, exact, single)
