"""Fixtures of the tests that count live allocations."""

import gc

import pytest


@pytest.fixture
def collected():
    """Nothing of an earlier test is left to be freed while a later one counts."""
    gc.collect()


@pytest.fixture(scope="module")
def collected_once():
    """The same, once for a module whose own tests leave nothing."""
    gc.collect()
