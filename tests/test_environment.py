"""EELLM_THREADS and EELLM_ISA decide where nothing else was said."""

import pytest

from eellm import _core
from tests.parity.cases import base_config


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(monkeypatch, threads):
    monkeypatch.setenv("EELLM_THREADS", str(threads))
    assert _core.Model(base_config()).threads == threads
    assert _core.Model(base_config(), 2).threads == 2


@pytest.mark.parametrize("isa", _core.build_info()["isa_levels"])
def test_isa(monkeypatch, isa):
    monkeypatch.setenv("EELLM_ISA", isa)
    assert _core.Model(base_config(), 1).isa == isa
    assert _core.Model(base_config(), 1, "plain").isa == "plain"


NONSENSE = [
    ("EELLM_THREADS", "many"),
    ("EELLM_THREADS", "-1"),
    ("EELLM_THREADS", "5000"),
    ("EELLM_ISA", "avx1024"),
]


@pytest.mark.parametrize("name,value", NONSENSE)
def test_nonsense_is_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=value):
        _core.Model(base_config())
