"""Real texts and tokenizers, where they are, and small ones that are made here."""

import os
from pathlib import Path

import pytest

from eellm.data import train_bpe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def real_data():
    """Returns the path of a real data file, or skips with the reason."""
    folder = Path(os.environ.get("EELLM_DATA", ROOT.parent / "shared/data"))

    def find(name):
        path = folder / name
        if not path.exists():
            pytest.skip(f"needs {name} in ../shared/data or EELLM_DATA")
        return path

    return find


TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 4,
    "いろはにほへと ちりぬるを 色は匂へど 散りぬるを " * 4,
    "def f(x):\n    return x ** 2  # 😀 🇩🇪 👩‍👩‍👧 naïve\n" * 4,
]


@pytest.fixture(scope="session")
def small_tokenizer():
    return train_bpe(TEXTS, 400)
