"""What all tests share: what must be there, and where data lie."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _has_program(name):
    return shutil.which(name) is not None


def has_mpi():
    """Whether eellm was built with MPI, and mpirun is there."""
    from eellm.distributed import find_program

    built = importlib.util.find_spec("eellm._mpi") is not None
    return built and find_program("mpirun") is not None


# What EELLM_REQUIRE may name, and how to find out whether it is there.
REQUIREMENTS = {
    "torch": lambda: importlib.util.find_spec("torch") is not None,
    "transformers": lambda: importlib.util.find_spec("transformers") is not None,
    "mpi": lambda: has_mpi(),
    "browser": lambda: _has_program("chromium"),
    "data": lambda: data_folder() is not None,
}


def data_folder():
    """The folder of test data: EELLM_DATA, or ../shared/data beside the project; None without."""
    folder = Path(os.environ.get("EELLM_DATA") or ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def pytest_configure(config):
    """Tests skip what is not there; EELLM_REQUIRE=torch,mpi turns such skips into a failure."""
    for name in filter(None, os.environ.get("EELLM_REQUIRE", "").split(",")):
        check = REQUIREMENTS.get(name.strip())
        if check is None:
            known = ", ".join(REQUIREMENTS)
            raise pytest.UsageError(f"EELLM_REQUIRE: unknown '{name}' (expected one of {known})")
        if not check():
            raise pytest.UsageError(f"EELLM_REQUIRE names '{name}', which is not there; install it")


@pytest.fixture(scope="session")
def data():
    """The folder of real text, tokenizers and models; skips where it is missing."""
    folder = data_folder()
    if folder is None:
        pytest.skip("no test data: neither EELLM_DATA nor ../shared/data is a folder")
    return folder
