"""Damages files and JSON values at random."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np

ODD: list[Any] = [
    0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 1.5, 1e308, float("inf"), float("nan"),
    "", "a", "../a", "\ud800", "F32", "BF16", "F4", None, True, False,
    [], {}, [0], [[]], {"a": 1}, [2**62] * 3,
]  # fmt: skip


def damage_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flips, overwrites, inserts, removes or repeats a few bytes, or cuts the end off."""
    result = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        size = len(result)
        at = int(rng.integers(0, size + 1))
        kind = int(rng.integers(0, 6))
        if kind == 0 and at < size:
            result[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1 and at < size:
            result[at] = int(rng.integers(0, 256))
        elif kind == 2:
            result[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3:
            del result[at : at + int(rng.integers(1, 9))]
        elif kind == 4:
            result[at:at] = result[at : at + int(rng.integers(1, 40))]
        elif kind == 5 and rng.integers(0, 4) == 0:
            del result[at:]
    return bytes(result)


def damage_json(value: Any, rng: np.random.Generator) -> Any:
    """A copy with a few values, keys or entries changed."""
    result = copy.deepcopy(value)
    for _ in range(int(rng.integers(1, 4))):
        result = _damage_once(result, rng)
    return result


def _damage_once(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, dict) and value and rng.integers(0, 8):
        key = list(value)[int(rng.integers(0, len(value)))]
        kind = int(rng.integers(0, 8))
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[str(_odd(rng))] = value.pop(key)
        elif kind == 2:
            value[key] = _odd(rng)
        else:
            value[key] = _damage_once(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.integers(0, 8):
        at = int(rng.integers(0, len(value)))
        kind = int(rng.integers(0, 6))
        if kind == 0:
            del value[at]
        elif kind == 1:
            value.insert(at, copy.deepcopy(value[at]))
        elif kind == 2:
            value[at] = _odd(rng)
        else:
            value[at] = _damage_once(value[at], rng)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and rng.integers(0, 2):
        return value + int(rng.integers(-9, 10))
    return _odd(rng)


def _odd(rng: np.random.Generator) -> Any:
    return copy.deepcopy(ODD[int(rng.integers(0, len(ODD)))])


def encode(value: Any) -> bytes:
    """JSON as bytes, whatever is in it."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def run(
    count: int,
    seed: int,
    make: Callable[[np.random.Generator], Any],
    read: Callable[[Any], Any],
    clean: tuple[type[BaseException], ...],
) -> int:
    """Reads `count` inputs; returns how many were accepted. Errors other than `clean` fail, with
    the seed and the number of the input."""
    accepted = 0
    for i in range(count):
        value = make(np.random.default_rng([seed, i]))
        try:
            read(value)
            accepted += 1
        except clean as error:
            assert str(error), f"no message for seed {seed}, input {i}"
        except BaseException as error:
            error.add_note(f"seed {seed}, input {i}: {repr(value)[:2000]}")
            raise
    print(f"seed {seed}: {accepted} of {count} accepted")
    return accepted
