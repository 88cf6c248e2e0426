"""The package imports, and the allocation counters of the core count."""

import pytest

from eellm import __version__, _core


def test_version_is_a_version():
    assert all(part.isdigit() for part in __version__.split("."))


def test_alloc_stats_are_consistent():
    calls, live, live_bytes = _core.alloc_stats()
    assert calls >= live >= 0 and live_bytes >= 0


def test_errors_have_one_root():
    assert issubclass(_core.NonFiniteError, _core.Error)
    assert issubclass(_core.CommError, _core.Error)
    with pytest.raises(TypeError):
        _core._alloc_fail_at("soon")
