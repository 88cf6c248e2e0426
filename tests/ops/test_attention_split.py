"""Attention of few rows whose keys are shared out among threads: equal to the bit."""

import numpy as np
import pytest

from tests.ops.harness import Ops, available_isas
from tests.ops.test_attention import Case, Rows

CASES = [
    Case(heads=12, kv_heads=1, width=64),
    Case(heads=3, kv_heads=1, width=20),
    Case(heads=4, kv_heads=2, width=48),
    Case(heads=2, kv_heads=1, width=16, window=70),
    Case(heads=2, kv_heads=1, width=16, softcap=5.0),
]


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keys_on_many_threads(case, isa):
    rows = Rows(case, (260,))
    sequence, position = rows.rows()
    rng = np.random.default_rng(0)
    with Ops(isa, 1) as one:
        expected = rows.run(one, rows.cache(one), sequence, position)
    for threads in (2, 3, 5):
        with Ops(isa, threads) as many:
            cache = rows.cache(many)
            for first in (*rng.integers(0, 250, 6), 0, 63, 64, 259):
                part = slice(first, first + int(rng.integers(1, 9)))
                out = rows.run(many, cache, sequence[part], position[part])
                np.testing.assert_array_equal(out.view(np.int32), expected[part].view(np.int32))


def test_zeros_keep_their_signs():
    """Sums of values that are -0, an infinite value, and scores of -infinity."""
    rows = Rows(Case(heads=2, kv_heads=1, width=16), (200,))
    sequence, position = rows.rows()
    rows.v[0, :150] = -0.0
    rows.v[0, 170, 0, 3] = np.inf
    rows.k[0, 64:128, 0, 0] = -np.inf
    with Ops(available_isas()[-1], 1) as one, Ops(available_isas()[-1], 2) as two:
        expected = rows.run(one, rows.cache(one), sequence, position)
        cache = rows.cache(two)
        for n in (10, 100, 150, 199):
            out = rows.run(two, cache, sequence[n : n + 1], position[n : n + 1])
            np.testing.assert_array_equal(
                np.nan_to_num(out, nan=7.0).view(np.int32),
                np.nan_to_num(expected[n : n + 1], nan=7.0).view(np.int32),
            )
