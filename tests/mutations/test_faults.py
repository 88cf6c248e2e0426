"""The list of faults fits the tree: each applies in one place, and its test is there."""

import tomllib
from pathlib import Path

import pytest

from tests.mutations.run import problem_of

FAULTS = tomllib.loads((Path(__file__).parent / "faults.toml").read_text())["fault"]
KEYS = {"name", "file", "find", "replace", "test"}
FOLDERS = [
    *(f"csrc/{part}" for part in "base tensor ops comm model train infer python".split()),
    *("kernels/cpu", "eellm", "eellm/data", "eellm/files", "eellm/pipeline", "eellm/train"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"])
def test_fault_applies(fault):
    assert fault.keys() == KEYS
    assert problem_of(fault) is None


def test_names_are_unique():
    names = [fault["name"] for fault in FAULTS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_has_two(folder):
    assert sum(str(Path(fault["file"]).parent) == folder for fault in FAULTS) >= 2


def test_a_fault_that_does_not_apply_is_found():
    """Negative control."""
    good = FAULTS[0]
    assert "just once" in problem_of({**good, "find": "no such text"})
    assert "just once" in problem_of({**good, "find": "k"})
    assert "nothing" in problem_of({**good, "replace": good["find"]})
    assert "one line" in problem_of({**good, "find": "{\n"})
    assert "no file" in problem_of({**good, "file": "csrc/none.c"})
    assert "no test" in problem_of({**good, "test": "tests/ops/test_none.py -k all"})
    assert "no test" in problem_of({**good, "test": "tests/ops/test_norm.py::test_none"})
