"""`import eellm` costs little, and the command starts without what it does not need."""

import statistics
import subprocess
import sys

from tests.cli.common import environment

PROGRAM = """
import time, numpy
began = time.perf_counter()
import eellm
print(time.perf_counter() - began)
"""


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=environment(),
    ).stdout  # fmt: skip


def test_import_costs_at_most_150_ms_beyond_numpy():
    times = [float(run(PROGRAM)) for _ in range(5)]
    assert statistics.median(times) <= 0.15, times


def test_import_loads_nothing_heavy():
    loaded = run("import eellm, sys; print(*sys.modules)").split()
    for name in ("numpy", "tokenizers", "matplotlib", "tqdm", "eellm._core", "huggingface_hub"):
        assert name not in loaded, name


def test_public_names_are_there():
    import eellm

    for name in eellm.__all__:
        assert getattr(eellm, name) is not None
    assert set(eellm.__all__) <= set(dir(eellm))


def test_an_unknown_name_is_an_attribute_error():
    import pytest

    import eellm

    with pytest.raises(AttributeError, match="no attribute 'modle'"):
        _ = eellm.modle


def test_generate_is_a_function_whatever_was_imported_before():
    for first in ("import eellm.decode", "from eellm.decode import exit_names", "pass"):
        code = f"import eellm, types; {first}; print(type(eellm.generate) is types.FunctionType)"
        assert run(code) == "True\n", first
