"""Fixtures of the file tests."""

import os
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def memory_path():
    """A folder for tests that write thousands of files; in memory where the machine allows it."""
    shared = "/dev/shm"
    usable = os.path.isdir(shared) and os.access(shared, os.W_OK)
    with tempfile.TemporaryDirectory(dir=shared if usable else None) as folder:
        yield Path(folder)
