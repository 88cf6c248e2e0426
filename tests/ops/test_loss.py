"""cross_entropy and confidence against float64 formulas and PyTorch."""

import itertools

import numpy as np
import pytest

from tests.ops.harness import INVALID, LossParams, OpError, Ops, available_isas, pointer
from tests.ops.tolerance import EPS, assert_bits, assert_twice, spaced

torch = pytest.importorskip("torch")

ISAS = available_isas()
SHAPES = [(1, 1), (2, 16), (3, 17), (1, 1000), (9, 511), (5, 50257), (1, 262144)]
SETTINGS = [(0.0, 1.0, False), (0.0, 0.7, True), (30.0, 1.0, True), (5.0, 2.0, False)]


def data(shape, seed=0):
    """Logits with a clear maximum in some rows, targets of which some are ignored, weights."""
    rng = np.random.default_rng(seed)
    n, v = shape
    logits = (3 * rng.normal(size=shape)).astype(np.float32)
    logits[::2, v // 2] += 9
    target = rng.integers(0, v, size=n).astype(np.int32)
    target[::4] = v // 2
    if n > 2:
        target[2] = -1
    return logits, target, rng.uniform(0.5, 2, size=n).astype(np.float32)


def reference(logits, target, weight, softcap, temperature, dynamic, dtype):
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    # parameters are float32 in the core
    softcap, temperature = float(np.float32(softcap)), float(np.float32(temperature))
    z = (softcap * torch.tanh(x / softcap) if softcap else x) / temperature
    index = torch.tensor(target, dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(z, index, ignore_index=-1, reduction="none")
    confidence = torch.softmax(z, 1).amax(1).detach() * (index >= 0)
    weight = torch.tensor(weight, dtype=dtype)
    (loss * weight * (confidence if dynamic else 1)).sum().backward()
    return [a.detach().numpy() for a in (loss, confidence, x.grad)]


def run(ops, logits, target, weight, settings, gradient=True):
    n = len(logits)
    loss, confidence = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
    out = logits.copy()
    ops.cross_entropy(
        loss, confidence, out, pointer(target), weight, LossParams(*settings, gradient)
    )
    return loss, confidence, out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_value_and_gradient(shape, settings):
    case = data(shape)
    exact = reference(*case, *settings, torch.float64)
    single = reference(*case, *settings, torch.float32)
    with Ops(ISAS[-1]) as ops:
        got = run(ops, *case, settings)
    for name, a, b, c in zip(("loss", "confidence", "gradient"), got, exact, single, strict=True):
        if shape[0] < 9:
            # few numbers: PyTorch may be close by luck. A logit of 16 is rounded by eps / 2 * 16,
            # and so is everything that depends on it, once for each division and tanh; 1 - tanh^2
            # errs by eps whatever is left of it.
            scale = np.abs(case[0]).max() / min(settings[1], 1)
            slack = scale * (1 if name == "loss" else np.abs(b).max())
            if settings[0] and name == "gradient":
                slack = max(slack, case[2].max() / settings[1])
            c = c + EPS * slack
        assert_twice(a, b, c, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_have_the_same_bits_everywhere(shape, settings):
    logits, target, weight = data(shape, seed=1)
    with Ops("avx2" if "avx2" in ISAS else "plain") as ops:
        expected = run(ops, logits, target, weight, settings)
    for isa, threads in itertools.product(ISAS, (1, 2)):
        if isa == "plain" and threads == 2 and logits.size > 100_000:
            continue  # slow, and the threads split rows as at the other levels
        with Ops(isa, threads) as ops:
            for a, b in zip(run(ops, logits, target, weight, settings), expected, strict=True):
                assert_bits(a, b, f"{isa} {threads}")
            read = run(ops, logits, target, weight, settings, gradient=False)
            for a, b in zip(read, (*expected[:2], logits), strict=True):
                assert_bits(a, b, f"without gradient, {isa} {threads}")
    with Ops(ISAS[-1], 2) as ops:
        for i in range(min(3, len(logits))):
            row = slice(i, i + 1)
            alone = run(ops, logits[row], target[row].copy(), weight[row], settings)
            for a, b in zip(alone, expected, strict=True):
                assert_bits(a, b[row])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradient_by_finite_differences(settings):
    logits, target, weight = data((3, 9), seed=2)
    h = 1e-6
    slopes = {}  # of the weighted loss, each row's own
    for at in [(0, 0), (0, 4), (0, int(target[0])), (1, int(target[1])), (1, 8), (2, 3)]:
        ends = []
        for sign in (1, -1):
            moved = logits.astype(np.float64)
            moved[at] += sign * h
            ends.append(reference(moved, target, weight, *settings, torch.float64)[0] * weight)
        slopes[at] = (ends[0] - ends[1])[at[0]] / (2 * h)
    for isa in ISAS:
        with Ops(isa) as ops:
            _, confidence, gradient = run(ops, logits, target, weight, settings)
        for at, slope in slopes.items():
            factor = confidence[at[0]] if settings[2] else 1
            assert gradient[at] == pytest.approx(slope * factor, abs=3e-6, rel=1e-5)


def test_ignored_rows():
    logits, target, weight = data((5, 40), seed=3)
    target[:] = -1
    target[3] = -100
    logits[1, 7] = np.nan
    with Ops(ISAS[-1]) as ops:
        loss, confidence, gradient = run(ops, logits, target, weight, SETTINGS[0])
        assert not loss.any() and not confidence.any() and not gradient.any()


@pytest.mark.parametrize("isa", ISAS)
def test_strided_logits(isa):
    logits, target, weight = data((6, 70), seed=4)
    for settings in SETTINGS:
        with Ops(isa, 2) as ops:
            expected = run(ops, logits, target, weight, settings)
            view, buffer = spaced(logits.shape, 11)
            view[...] = logits
            loss, confidence = np.empty(6, np.float32), np.empty(6, np.float32)
            ops.cross_entropy(
                loss, confidence, view, pointer(target), weight, LossParams(*settings, True)
            )
        for a, b in zip((loss, confidence, view), expected, strict=True):
            assert_bits(a, b)
        assert np.isnan(buffer[:, 70:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_logits(isa):
    big = np.float32(1e4)
    logits = np.float32([[big, -big, 0], [-big, -big, -big], [0, -np.inf, 0], [0, np.nan, 1]])
    target = np.int32([1, 0, 0, 0])
    with Ops(isa) as ops:
        loss, confidence, gradient = run(
            ops, logits, target, np.ones(4, np.float32), (0.0, 1.0, False)
        )
    assert loss[0] == 2 * big and confidence[0] == 1
    np.testing.assert_array_equal(gradient[0], [1, -1, 0])
    assert loss[1] == pytest.approx(np.log(3), rel=EPS)
    assert loss[2] == pytest.approx(np.log(2), rel=EPS)
    assert gradient[2, 1] == 0
    assert np.isnan(loss[3]) and np.isnan(confidence[3])


@pytest.mark.parametrize("isa", ISAS)
def test_targets_out_of_range_are_refused(isa):
    logits, target, weight = data((3, 8), seed=5)
    target[1] = 8
    with Ops(isa) as ops, pytest.raises(OpError) as error:
        run(ops, logits, target, weight, SETTINGS[0])
    assert error.value.status == INVALID
    for word in ("target[1]", "8", "7"):
        assert word in str(error.value)


def decide(ops, logits):
    n = len(logits)
    token = np.full(n, -7, np.int32)
    confidence, lse = np.empty(n, np.float32), np.empty(n, np.float32)
    ops.confidence(pointer(token), confidence, lse, logits)
    return token, confidence, lse


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_confidence(shape):
    logits, _, _ = data(shape, seed=6)
    wide = torch.tensor(logits).double()
    exact = torch.softmax(wide, 1).amax(1).numpy(), torch.logsumexp(wide, 1).numpy()
    single = (
        torch.softmax(torch.tensor(logits), 1).amax(1),
        torch.logsumexp(torch.tensor(logits), 1),
    )
    with Ops(ISAS[-1]) as ops:
        expected = decide(ops, logits)
    np.testing.assert_array_equal(expected[0], logits.argmax(1))
    for a, b, c in zip(expected[1:], exact, single, strict=True):
        assert_twice(a, b, c + (EPS * np.abs(b).max() if shape[0] < 9 else 0))
    for isa, threads in itertools.product(ISAS, (1, 2)):
        view, _ = spaced(shape, 5)
        view[...] = logits
        with Ops(isa, threads) as ops:
            for a, b in zip(decide(ops, view), expected, strict=True):
                assert_bits(a, b, f"{isa} {threads}")
    with Ops(ISAS[-1]) as ops:
        for a, b in zip(decide(ops, logits[:1]), expected, strict=True):
            assert_bits(a, b[:1])


@pytest.mark.parametrize("isa", ISAS)
def test_the_smallest_index_wins_a_tie(isa):
    rng = np.random.default_rng(7)
    for v in (2, 15, 16, 33, 513, 1500):
        logits = rng.normal(size=(20, v)).astype(np.float32)
        first = rng.integers(0, v, size=20)
        for row, i in zip(logits, first, strict=True):
            row[i:][rng.random(v - i) < 0.3] = 9
            row[i] = 9
        with Ops(isa) as ops:
            np.testing.assert_array_equal(decide(ops, logits)[0], first)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("v", (3, 16, 40, 1000))
def test_rows_that_are_not_finite(isa, v):
    logits = np.random.default_rng(8).normal(size=(6, v)).astype(np.float32)
    logits[0, 1] = np.nan
    logits[1, v - 1] = np.inf
    logits[2, 2:] = -np.inf
    logits[3] = np.nan
    logits[4] = -np.inf
    with Ops(isa) as ops:
        token, confidence, lse = decide(ops, logits)
    assert np.isnan(confidence[[0, 1, 3, 4]]).all()
    assert token[0] == np.nanargmax(logits[0]) and token[1] == v - 1
    assert token[3] == 0 and token[4] == 0
    assert token[2] == logits[2].argmax()
    rest = logits[2, :2].astype(np.float64)
    assert confidence[2] == pytest.approx(np.exp(rest.max()) / np.exp(rest).sum(), rel=4 * EPS)
    assert np.isfinite(confidence[5]) and np.isfinite(lse[5])


def test_a_missing_chain_factor_is_seen():
    """The gradient of a capped logit without 1 - tanh^2, and without 1 / temperature."""
    case = data((9, 511), seed=9)
    settings = (5.0, 2.0, False)
    _, _, exact = reference(*case, *settings, torch.float64)
    _, _, single = reference(*case, *settings, torch.float32)
    capped = 5 * np.tanh(case[0] / 5)
    _, _, wrong = reference(capped, *case[1:], 0.0, 2.0, False, torch.float64)
    for candidate in (wrong, 2 * exact):
        with pytest.raises(AssertionError):
            assert_twice(candidate, exact, single)
