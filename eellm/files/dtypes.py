"""Weights in float16 and bfloat16 to and from float32, vectorised and in pieces."""

import numpy as np
import numpy.typing as npt

from eellm.errors import invalid

SAVED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PIECE = 1 << 20


def check_dtype(dtype: str, where: str) -> None:
    """Refuses a dtype of a safetensors file that no weight has."""
    if dtype not in SAVED_AS.values():
        raise invalid(f"{where} has a dtype of no weight", "F32, F16 or BF16", dtype)


def to_float32(raw: npt.NDArray, dtype: str, where: str) -> npt.NDArray[np.float32]:
    """Values of a tensor of a safetensors file; bfloat16 comes as uint16. May be `raw` itself."""
    if dtype == "F32":
        return raw
    if dtype == "F16":
        return raw.astype(np.float32)
    check_dtype(dtype, where)
    out = np.empty(raw.size, np.uint32)
    flat = raw.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = out[start : start + _PIECE]
        piece[...] = flat[start : start + _PIECE]
        piece <<= 16
    return out.view(np.float32).reshape(raw.shape)


def from_float32(values: npt.NDArray[np.float32], dtype: str, where: str) -> npt.NDArray:
    """Values as they are saved: rounded to nearest, ties to even; bfloat16 as uint16."""
    if dtype == "float32":
        return np.ascontiguousarray(values)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(values.astype(np.float16))
        if np.isinf(half).any() and not np.isinf(values).any():
            raise invalid(
                f"{where} does not fit into float16",
                "values up to 65504",
                float(np.abs(values).max()),
                "save as bfloat16 or float32",
            )
        return half
    if dtype != "bfloat16":
        raise invalid("dtype is invalid", f"one of {', '.join(SAVED_AS)}", dtype)
    flat = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    out = np.empty(flat.size, np.uint16)
    for start in range(0, flat.size, _PIECE):
        bits = flat[start : start + _PIECE]
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        out[start : start + _PIECE] = np.where(nan, (bits >> 16) | 0x40, rounded)
    return out.reshape(values.shape)
