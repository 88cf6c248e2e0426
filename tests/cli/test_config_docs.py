"""docs/CONFIG.md names every setting and every environment variable, and nothing else."""

import re

import pytest

from eellm.config import ExitConfig
from eellm.settings import field_types
from eellm.train.run import SCHEMA
from tests.cli.common import ROOT

TEXT = (ROOT / "docs/CONFIG.md").read_text()
SOURCES = ("csrc", "kernels", "eellm", "tests", "benchmarks", "setup.py", "Makefile", ".ci")
SUFFIXES = {".c", ".h", ".py", ".sh", ".cu", ""}


def section(title):
    """The text below a heading."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M)
    assert match, title
    return match[1]


def named_keys(title):
    """What stands in the first column of the section's table."""
    rows = re.findall(r"^\| (`[^|]*) \|", section(title), re.M)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("name", SCHEMA)
def test_every_key_of_a_section_is_explained(name):
    known = set(field_types(SCHEMA[name])) - {"exits"}
    assert named_keys(f"[{name}]") == known


def test_every_key_of_an_exit_is_explained():
    assert named_keys("[[model.exits]]") == set(field_types(ExitConfig))


def sources():
    for name in SOURCES:
        path = ROOT / name
        files = path.rglob("*") if path.is_dir() else [path]
        for file in files:
            if file.is_file() and file.suffix in SUFFIXES:
                yield file.read_text(errors="replace")


def test_every_environment_variable_is_explained():
    used = set()
    for text in sources():
        used |= set(re.findall(r"""["'({$ ](EELLM_[A-Z0-9_]+)\b(?!\()""", text))
    explained = set(re.findall(r"`(EELLM_[A-Z0-9_]+)`", section("Environment variables")))
    assert len(used) >= 8
    assert used - explained == set()
