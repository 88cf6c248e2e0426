"""add, dropout, normal and convert."""

import itertools
import math

import numpy as np
import pytest

from tests.ops.harness import INVALID, Dropout, OpError, Ops, available_isas, tensor
from tests.ops.tolerance import assert_bits, spaced

ISAS = available_isas()
LEVELS = list(itertools.product(ISAS, (1, 2)))
SHAPES = [(1, 1), (1, 16), (3, 17), (5, 2048), (2, 2049), (1, 40000), (70, 333)]


# -- add --


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add(shape):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    for isa, threads in LEVELS:
        with Ops(isa, threads) as ops:
            a, a_buffer = spaced(shape, 3)
            b, _ = spaced(shape, 9)
            a[...], b[...] = y, x
            ops.add(a, b)
            assert_bits(a, y + x)
            assert np.isnan(a_buffer[:, shape[1] :]).all()
            flat = y.ravel().copy()
            ops.add(flat, x.ravel())
            assert_bits(flat, (y + x).ravel())


# -- Philox --


def philox(key, high, counter):
    """Philox 4x32-10 in Python integers, from the paper's definition."""
    c = [counter & 0xFFFFFFFF, counter >> 32, high & 0xFFFFFFFF, high >> 32]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32) ^ c[1] ^ k[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ k[1],
            p0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


ONES = 0xFFFFFFFFFFFFFFFF
# The known answers that Random123 publishes (kat_vectors: philox 4x32, 10 rounds).
KNOWN = [
    ((0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES, ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize("arguments, words", KNOWN)
def test_the_model_of_philox_gives_the_known_answers(arguments, words):
    assert philox(*arguments) == [int(w, 16) for w in words.split()]


# -- Dropout --


def uniform(key, row, channels):
    """The numbers in [0, 1) that decide, from the model above."""
    words = [philox(key, row, c) for c in range((channels + 3) // 4)]
    return (np.array(words).reshape(-1)[:channels] >> 8) / 2.0**24


def drop(ops, x, residual, p, key, rows, y=None):
    y = np.full_like(x, np.nan) if y is None else y
    settings = Dropout(p, key, rows.ctypes.data)
    ops.dropout(y, x, residual, settings)
    return y


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 64), (4, 65), (3, 200)], ids=str)
@pytest.mark.parametrize("p", (0.0, 0.1, 0.5, 0.97))
def test_dropout(shape, p):
    rng = np.random.default_rng(1)
    x, residual = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    rows = rng.integers(0, 2**64, size=shape[0], dtype=np.uint64)
    key = 0xC0FFEE1234567890 % 2**63
    p32 = np.float32(p)
    kept = np.array([uniform(key, int(row), shape[1]) >= p32 for row in rows])
    scaled = np.where(kept, x * (np.float32(1) / (np.float32(1) - p32)), np.float32(0))
    for isa, threads in LEVELS:
        with Ops(isa, threads) as ops:
            y = drop(ops, x, None, p, key, rows)
            assert_bits(y + np.float32(0), scaled + np.float32(0))
            y = drop(ops, x, residual, p, key, rows)
            assert_bits(y, residual + scaled)
            a, a_buffer = spaced(shape, 5)
            a[...] = x
            drop(ops, a, residual, p, key, rows, a)
            assert_bits(a, residual + scaled)
            assert np.isnan(a_buffer[:, shape[1] :]).all()
            b, _ = spaced(shape, 5)
            b[...] = residual
            drop(ops, x, b, p, key, rows, b)
            assert_bits(b, residual + scaled)


def test_dropout_hides_what_is_not_finite():
    x = np.full((1, 400), np.nan, np.float32)
    rows = np.zeros(1, np.uint64)
    with Ops(ISAS[-1]) as ops:
        y = drop(ops, x, None, 0.5, 7, rows)
    kept = uniform(7, 0, 400) >= 0.5
    assert (np.isnan(y[0]) == kept).all() and not y[0, ~kept].any()


@pytest.mark.parametrize("p", (0.1, 0.5))
def test_the_share_that_is_kept(p):
    """Within five standard deviations of a binomial distribution, over all rows, in each channel
    modulo 4 and between neighbours."""
    n, c = 1000, 1000
    x = np.ones((n, c), np.float32)
    with Ops(ISAS[-1], 2) as ops:
        kept = drop(ops, x, None, p, 99, np.arange(n, dtype=np.uint64)) != 0
        other = drop(ops, x, None, p, 100, np.arange(n, dtype=np.uint64)) != 0
    q = 1 - p

    def close(sample, probability):
        deviation = math.sqrt(probability * (1 - probability) / sample.size)
        assert abs(sample.mean() - probability) < 5 * deviation

    close(kept, q)
    for word in range(4):
        close(kept[:, word::4], q)
    close(kept[:, 1:] & kept[:, :-1], q * q)
    close(kept[1:] & kept[:-1], q * q)
    close(kept & other, q * q)
    with pytest.raises(AssertionError):
        close(kept, q + 0.01)


def test_dropout_refuses_certain_death():
    x = np.ones((1, 4), np.float32)
    for p in (1.0, -0.1, float("nan")):
        with Ops(ISAS[-1]) as ops, pytest.raises(OpError) as error:
            drop(ops, x, None, p, 1, np.zeros(1, np.uint64))
        assert error.value.status == INVALID


# -- Normal numbers --


def normal(n, mean=0.0, std=1.0, key=5, isa=ISAS[-1], threads=2):
    x = np.full(n, np.nan, np.float32)
    with Ops(isa, threads) as ops:
        ops.normal(x, mean, std, key)
    return x


def box_muller(n, key):
    words = np.array([philox(key, 0, i) for i in range((n + 3) // 4)], np.float64)
    radius = np.sqrt(-2 * np.log((words[:, 0::2] + 1) / 2.0**32))
    angle = 2 * np.pi * words[:, 1::2] / 2.0**32
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 2).reshape(-1)[:n]


@pytest.mark.parametrize("n", (1, 3, 64, 65, 5000))
def test_normal_is_box_muller_on_philox(n):
    for mean, std, key in ((0.0, 1.0, 5), (0.25, 0.02, 2**62 + 12345)):
        exact = np.float64(np.float32(mean)) + np.float64(np.float32(std)) * box_muller(n, key)
        x = normal(n, mean, std, key)
        assert np.abs(x - exact).max() <= 2.0**-24 * np.abs(exact).max() + 1e-8 * std
        assert np.abs(x - exact)[np.abs(exact) < 1e-3].max(initial=0) <= 1e-8


def test_normal_depends_on_the_element_alone():
    whole = normal(100_003)
    for isa, threads in LEVELS:
        assert_bits(normal(100_003, isa=isa, threads=threads), whole, f"{isa} {threads}")
    for n in (1, 2, 5, 63, 1000):
        assert_bits(normal(n), whole[:n])
    assert not (normal(1000, key=6) == whole[:1000]).any()


def test_normal_with_std_0_fills():
    assert (normal(1000, mean=1.5, std=0.0) == 1.5).all()


def standard_normal_cdf(x):
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def kolmogorov_smirnov(x):
    """The statistic times sqrt(n); above 2.2 once in 8,000 samples of the right distribution."""
    x = np.sort(x.astype(np.float64))
    n = len(x)
    cdf = standard_normal_cdf(x)
    up, down = np.arange(1, n + 1) / n - cdf, cdf - np.arange(n) / n
    return max(up.max(), down.max()) * math.sqrt(n)


def test_normal_is_normal():
    n = 1_000_000
    x = normal(n).astype(np.float64)
    # five standard errors of the first four moments
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs((x**2).mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in range(1, 6):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 / math.sqrt(n)
        assert abs((x[lag:] ** 2 * x[:-lag] ** 2).mean() - 1) < 5 * math.sqrt(8 / n)
    assert 4.2 < np.abs(x).max() < 6.7
    assert kolmogorov_smirnov(x[:100_000]) < 2.2
    assert kolmogorov_smirnov(1.01 * x[:100_000] + 0.01) > 2.2


# -- Conversion --


def convert(array, to, isa, dtype=None, threads=1):
    out = np.zeros(array.shape, {"float32": np.float32}.get(to, np.uint16))
    with Ops(isa, threads) as ops:
        ops.convert(tensor(out, to), tensor(array, dtype))
    return out


def same_numbers(got, expected):
    """Equal bits of uint16 or float32 arrays given as floats: NaN where NaN is."""
    nan = np.isnan(expected)
    assert (np.isnan(got) == nan).all()
    assert_bits(got[~nan], expected[~nan])


ALL_HALVES = np.arange(65536, dtype=np.uint16)


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_and_bfloat16_widens_exactly(isa):
    with np.errstate(invalid="ignore"):
        halves = ALL_HALVES.view(np.float16).astype(np.float32)
    same_numbers(convert(ALL_HALVES, "float32", isa, "float16"), halves)
    brains = (ALL_HALVES.astype(np.uint32) << 16).view(np.float32)
    same_numbers(convert(ALL_HALVES, "float32", isa, "bfloat16"), brains)


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_and_bfloat16_comes_back(isa):
    for name in ("float16", "bfloat16"):
        wide = convert(ALL_HALVES, "float32", isa, name)
        back = convert(wide, name, isa)
        nan = np.isnan(wide)
        assert (back == ALL_HALVES)[~nan].all()
        assert np.isnan(convert(back, "float32", isa, name)[nan]).all()
        # the sign stays
        assert ((back ^ ALL_HALVES) < 0x8000).all()


def boundaries(name):
    """Every float16 or bfloat16, the midpoint to its neighbour and the floats beside both."""
    if name == "float16":
        values = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float64)
        values[-1] = 65536
    else:
        bits = np.arange(0x7F80, dtype=np.uint32) << 16
        values = np.append(bits.view(np.float32).astype(np.float64), 2.0**128)
    with np.errstate(over="ignore"):
        points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    points = points[np.isfinite(points)]
    near = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))]
    x = np.concatenate([*near, np.float32([np.inf, np.nan, 3e38, 1e-45, 65519, 65520])])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("isa", ISAS)
def test_narrowing_to_float16_rounds_as_numpy(isa):
    rng = np.random.default_rng(2)
    x = np.concatenate(
        [boundaries("float16"), rng.integers(0, 2**32, 100_000, np.uint32).view("f")]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    same_numbers(convert(x, "float16", isa).view(np.float16), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_narrowing_to_bfloat16_rounds_as_torch(isa):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    x = np.concatenate(
        [boundaries("bfloat16"), rng.integers(0, 2**32, 100_000, np.uint32).view("f")]
    )
    expected = torch.tensor(x).to(torch.bfloat16).float().numpy()
    got = (convert(x, "bfloat16", isa).astype(np.uint32) << 16).view(np.float32)
    same_numbers(got, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_between_the_narrow_types(isa):
    wide = convert(ALL_HALVES, "float32", isa, "float16")
    assert_bits(convert(ALL_HALVES, "bfloat16", isa, "float16"), convert(wide, "bfloat16", isa))
    wide = convert(ALL_HALVES, "float32", isa, "bfloat16")
    assert_bits(convert(ALL_HALVES, "float16", isa, "bfloat16"), convert(wide, "float16", isa))


def test_convert_gives_equal_bits_at_every_level():
    x = np.random.default_rng(4).integers(0, 2**32, 50_001, np.uint32).view(np.float32)
    x[:4] = np.array([0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0x7F801FFF], np.uint32).view(np.float32)
    for name in ("float16", "bfloat16"):
        expected = convert(x, name, "plain")
        for isa, threads in LEVELS:
            assert (convert(x, name, isa, threads=threads) == expected).all()
    for name in ("float16", "bfloat16"):
        expected = convert(ALL_HALVES, "float32", "plain", name).view(np.uint32)
        for isa in ISAS:
            assert (convert(ALL_HALVES, "float32", isa, name).view(np.uint32) == expected).all()


def test_convert_to_the_same_type_copies():
    x = np.random.default_rng(5).normal(size=1000).astype(np.float32)
    assert_bits(convert(x, "float32", ISAS[-1]), x)
    assert (convert(ALL_HALVES, "float16", ISAS[-1], "float16") == ALL_HALVES).all()


def test_truncation_would_be_seen():
    x = boundaries("bfloat16")
    truncated = (x.view(np.uint32) >> 16 << 16).view(np.float32)
    got = (convert(x, "bfloat16", ISAS[-1]).astype(np.uint32) << 16).view(np.float32)
    with pytest.raises(AssertionError):
        same_numbers(truncated, got)
