"""Real jobs of mpirun that train: every schedule, faults, resumption in other layouts."""

import json

import numpy as np
import pytest

from eellm.data.indexed import TokenFileWriter
from tests.mpi.common import eellm, needs_mpi

pytestmark = needs_mpi

# A message between ranks takes 4 x 64 x 96 floats, 98 KB.
SETTINGS = """
[model]
model_type = "gpt2"
vocab_size = 61
hidden_size = 96
num_hidden_layers = 4
num_attention_heads = 4
max_position_embeddings = 64
tie_word_embeddings = true
threads = 1
[[model.exits]]
layer = 1
head = "norm"
[[model.exits]]
layer = 3
head = "mlp"
[data]
train = "corpus"
valid = "corpus"
[train]
steps = 4
seq_length = 64
micro_batch_size = 4
global_batch_size = 24
learning_rate = 1e-3
schedule = "constant"
valid_interval = 2
valid_batches = 1
checkpoint_interval = 2
[parallel]
exact_ties = true
timeout = 20.0
[output]
progress = "none"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with settings and tokens."""
    path = tmp_path_factory.mktemp("training")
    text = SETTINGS.replace('"corpus"', f'"{path / "corpus"}"')
    (path / "run.toml").write_text(text)
    tokens = np.random.default_rng(5).integers(0, 61, 30_000)
    with TokenFileWriter(path / "corpus", 61) as writer:
        writer.add(tokens)
    return path


def train(folder, output, ranks, *arguments, launch=(), **more):
    command = ["train", folder / "run.toml", "-o", folder / output, *arguments]
    if ranks > 1:
        command = ["launch", "-n", ranks, *launch, "--", *command]
    return eellm(*map(str, command), **more)


def records(folder, output):
    lines = (folder / output / "metrics.jsonl").read_text().splitlines()
    return [(r["kind"], r["step"], r["losses"]) for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def alone(folder):
    ended = train(folder, "alone", 1)
    assert ended.status == 0, ended.err
    return records(folder, "alone")


def settings(**parallel):
    return [f"--set=parallel.{key}={value}" for key, value in parallel.items()]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (4, {"schedule": "1f1b"}),
        (2, {"schedule": "gpipe"}),
        (2, {"schedule": "interleaved", "chunks": 2}),
        (3, {"schedule": "zero_bubble", "split": "[1, 2, 1]"}),
    ],
)
def test_every_schedule(ranks, parallel, folder, alone):
    """The same losses to the bit, in training and validation, as of one process."""
    output = f"{parallel['schedule']}-{ranks}"
    ended = train(folder, output, ranks, *settings(**parallel))
    assert ended.status == 0, ended.err
    assert records(folder, output) == alone
    assert (folder / output / "model/model.safetensors.index.json").is_file()


def test_filled_bubbles(folder):
    ended = train(folder, "filled", 4, *settings(bubble_fill="extra"))
    assert ended.status == 0, ended.err
    assert np.isfinite([losses for _, _, losses in records(folder, "filled")]).all()


def test_a_killed_rank_and_a_restart(folder, alone):
    """Rank 1 dies in step 4; the job starts again from the checkpoint of step 2."""
    ended = train(folder, "killed", 2, launch=["--max-restarts", "1"], EELLM_FAULT="1:kill:4:3")
    assert ended.status == 0, ended.err
    assert "restart 1 of 1" in ended.err and len(ended.errors) == 1
    assert records(folder, "killed") == alone


def test_a_sleeping_rank(folder):
    """One message, of rank, peer, action and microbatch, and a status that is not 0."""
    ended = train(
        folder, "asleep", 2, *settings(timeout=2), EELLM_FAULT="0:delay:1:1:60", timeout=30
    )
    assert ended.status == 1 and ended.seconds < 20
    assert len(ended.errors) == 1
    assert "no message from rank" in ended.errors[0] and "of microbatch" in ended.errors[0]
    assert not (folder / "asleep/model").exists()


def test_resume_in_another_layout(folder, alone):
    first = train(folder, "moved", 4, "--set=train.steps=2", *settings(schedule="zero_bubble"))
    assert first.status == 0, first.err
    then = train(folder, "moved", 2, "--resume", "auto", *settings(schedule="gpipe"))
    assert then.status == 0, then.err
    assert [r for r in records(folder, "moved") if r[0] == "step"] == [
        r for r in alone if r[0] == "step"
    ]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--set=parallel.split=[1, 1]"], "split is invalid"),
        (["--set=parallel.data=3"], "data = 3 times tensor = 1 times pipeline = 1 must be"),
    ],
)
def test_what_does_not_fit_is_said_once(arguments, text, folder):
    ended = train(folder, "refused", 2, *arguments)
    assert ended.status == 2
    assert len(ended.errors) == 1 and text in ended.errors[0]
    assert not (folder / "refused").exists()


def test_a_killed_rank_is_named_in_one_line(folder):
    ended = train(folder, "gone", 2, EELLM_FAULT="1:kill:1:3")
    assert ended.status == 137
    assert ended.errors == ended.err.splitlines()
    assert len(ended.errors) == 1 and "rank 1 was ended by signal 9 (Killed)" in ended.errors[0]
