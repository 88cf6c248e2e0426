"""How far a float32 result may be from the exact one."""

import numpy as np

EPS = float(np.finfo(np.float32).eps)


def assert_twice(ours, exact, other, what=""):
    """Our largest error is at most twice that of `other`, a float32 computation of the same by
    another library, plus half a unit in the last place of the largest result."""
    ours, exact, other = (np.asarray(a, np.float64) for a in (ours, exact, other))
    assert ours.shape == exact.shape == other.shape, (what, ours.shape, exact.shape, other.shape)
    if exact.size == 0:
        return
    assert np.isfinite(ours).all(), what
    bound = 2 * np.abs(other - exact).max() + EPS / 2 * np.abs(exact).max()
    error = np.abs(ours - exact).max()
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


def assert_bits(a, b, what=""):
    """Equal to the bit, but for the payload of NaN."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, (what, a.dtype, b.dtype, a.shape, b.shape)
    same = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")
    if a.dtype.kind == "f":
        same |= np.isnan(a) & np.isnan(b)
    assert same.all(), f"{what}: {np.count_nonzero(~same)} of {same.size} elements differ"


def spaced(shape, extra, seed=0, fill=np.nan):
    """A float32 view of this shape whose rows lie `extra` elements apart, and its whole buffer,
    filled with `fill`."""
    buffer = np.full((*shape[:-1], shape[-1] + extra), fill, np.float32)
    return buffer[..., : shape[-1]], buffer
