"""Runs the command as people do, and makes small data and settings for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = """
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
max_position_embeddings = 64
tie_word_embeddings = true
[[model.exits]]
layer = 1

[data]
train = "{folder}/corpus"
valid = "{folder}/corpus"
tokenizer = "{folder}/tokenizer"

[train]
steps = 8
seq_length = 16
micro_batch_size = 2
global_batch_size = 4
valid_batches = 2
checkpoint_interval = 2
"""


def environment(**changes):
    values = {key: value for key, value in os.environ.items() if not key.startswith("EELLM_")}
    values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), values.get("PYTHONPATH")]))
    return {**values, **changes}


def eellm(*arguments, timeout=120, cwd=None, **variables):
    """Runs the command; returns its result with text."""
    command = [sys.executable, "-m", "eellm", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment(**variables),
    )


def start(*arguments, **variables):
    """Starts the command and does not wait."""
    command = [sys.executable, "-m", "eellm", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(**variables),
    )  # fmt: skip


def error_line(result, status):
    """The one line on standard error of a refused call."""
    assert result.returncode == status, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("eellm: error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with a tokenizer, a token file and run.toml."""
    pytest.importorskip("eellm._core")
    folder = tmp_path_factory.mktemp("corpus")
    text = "".join((ROOT / "eellm" / name).read_text() for name in ("config.py", "settings.py"))
    (folder / "text.txt").write_text(text)
    done = eellm("data", "tokenizer", folder / "text.txt", "-o", folder / "tokenizer",
                 "--vocab-size", 300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = eellm("data", "prepare", folder / "text.txt", "-o", folder / "corpus",
                 "--tokenizer", folder / "tokenizer")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "run.toml").write_text(SETTINGS.format(folder=folder))
    return folder


@pytest.fixture(scope="session")
def trained(corpus):
    """A model directory from a few steps of training."""
    done = eellm("train", corpus / "run.toml", "-o", corpus / "trained")
    assert done.returncode == 0, done.stderr
    return corpus / "trained/model"
