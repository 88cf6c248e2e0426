"""Rotary position frequencies, computed in float32 in the order in which Transformers does."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from eellm.errors import invalid

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("original_max_position_embeddings",),
}
_OPTIONAL = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
ROPE_TYPES = tuple(_REQUIRED)


def check_scaling(scaling: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The valid form of `rope_scaling`: its type under `rope_type`, all required keys there."""
    if not isinstance(scaling, Mapping):
        raise invalid("rope_scaling is not a table", "a table with rope_type", scaling)
    result = {key: value for key, value in scaling.items() if key != "type"}
    kind = result.setdefault("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise NotImplementedError(
            f"rope_scaling.rope_type {kind!r} is not served (expected one of "
            f"{', '.join(ROPE_TYPES)}); choose a model with one of those"
        )
    if kind in ("llama3", "yarn"):
        result.setdefault("original_max_position_embeddings", max_positions)
    for key in _REQUIRED[kind]:
        if key not in result:
            raise invalid(
                f"rope_scaling.{key} is missing", f"a number, as {kind} needs it", sorted(result)
            )
    for key in (*_REQUIRED[kind], *_OPTIONAL.get(kind, ())):
        value = result.get(key)
        if value is None and key not in _REQUIRED[kind]:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 1e-6 <= value <= 1e9:  # type: ignore[operator]
            raise invalid(f"rope_scaling.{key} is invalid", "a number from 1e-6 to 1e9", value)
    if kind == "llama3" and result["low_freq_factor"] >= result["high_freq_factor"]:
        raise invalid(
            "rope_scaling.low_freq_factor is invalid",
            f"less than high_freq_factor ({result['high_freq_factor']})",
            result["low_freq_factor"],
        )
    if not isinstance(result.get("truncate", True), bool):
        raise invalid("rope_scaling.truncate is invalid", "true or false", result["truncate"])
    return result


def frequencies(
    dims: int, theta: float, scaling: Mapping[str, Any] | None, max_positions: int
) -> tuple[npt.NDArray[np.float32], float]:
    """Angles per position [dims / 2], and the factor of cosines and sines. `scaling` is checked."""
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    # A power in float64, rounded once: the correctly rounded float32 power.
    exact = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64))
    powers: npt.NDArray[np.float32] = exact.astype(np.float32)
    inverse = np.float32(1) / powers
    kind = scaling["rope_type"] if scaling else "default"
    if scaling is None or kind == "default":
        return inverse, 1.0
    if kind == "linear":
        return inverse / np.float32(scaling["factor"]), 1.0
    if kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    return _yarn(powers, dims, theta, scaling, max_positions)


def _llama3(
    inverse: npt.NDArray[np.float32], scaling: Mapping[str, Any]
) -> npt.NDArray[np.float32]:
    factor = np.float32(scaling["factor"])
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    # PyTorch divides a number by a tensor through the reciprocal.
    wavelength = np.float32(2 * math.pi) * (np.float32(1) / inverse)
    scaled = np.where(wavelength > np.float32(context / low), inverse / factor, inverse)
    smooth = np.float32(context) * (np.float32(1) / wavelength) - np.float32(low)
    smooth /= np.float32(high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = (wavelength >= np.float32(context / high)) & (wavelength <= np.float32(context / low))
    return np.where(medium, smoothed, scaled).astype(np.float32)


def _yarn(
    powers: npt.NDArray[np.float32],
    dims: int,
    theta: float,
    scaling: Mapping[str, Any],
    max_positions: int,
) -> tuple[npt.NDArray[np.float32], float]:
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or max_positions / original

    def boundary(rotations: float) -> float:
        """The channel that makes that many rotations over the original context."""
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = boundary(scaling.get("beta_fast") or 32)
    high = boundary(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    channels = np.arange(dims // 2, dtype=np.float32)
    ramp = np.clip((channels - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1) - ramp
    interpolated = np.float32(1) / (np.float32(factor) * powers)
    inverse = interpolated * (1 - kept) + (np.float32(1) / powers) * kept
    return inverse.astype(np.float32), _yarn_attention_factor(scaling, factor)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
