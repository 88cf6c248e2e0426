"""Real models, where they are."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_models():
    """Returns the path of a real model, or skips with the reason."""
    folder = Path(os.environ.get("EELLM_DATA", ROOT.parent / "shared/data")) / "models"

    def find(name):
        if not (folder / name).exists():
            pytest.skip(f"needs models/{name} in ../shared/data or EELLM_DATA")
        return folder / name

    return find
