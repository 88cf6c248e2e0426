"""Fixtures of the tests that count live allocations."""

import gc

import pytest


@pytest.fixture
def collected():
    """Nothing of an earlier test is left to be freed while a later one counts."""
    gc.collect()
