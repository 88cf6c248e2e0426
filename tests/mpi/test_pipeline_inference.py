"""Decoding by real processes: the texts of one rank, and how a lost rank ends the job."""

import json
import os
import sys

import pytest

from eellm.config import ExitConfig, ModelConfig
from eellm.data import train_bpe
from eellm.distributed import find_program
from eellm.model import Model
from tests.infer.models import fill
from tests.mpi.common import eellm, mpirun, needs_mpi, run

pytestmark = needs_mpi

TEXT = "Zwölf Boxkämpfer jagen Viktor über den Deich. naïve VVVV\n" * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = train_bpe([TEXT], 270)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        exits=[ExitConfig(1), ExitConfig(2, head="block"), ExitConfig(3, head="mlp")],
    )
    model = Model.from_config(config, threads=1)
    fill(model.core, 3, scale=0.3)
    path = tmp_path_factory.mktemp("decode") / "model"
    model.save_pretrained(path)
    tokenizer.save(path)
    return path


def command(ranks, *arguments):
    """The command line as ranks of mpirun."""
    start = [find_program("mpirun"), "-n", str(ranks), "--bind-to", "none"]
    start += ["--map-by", "slot:OVERSUBSCRIBE"]
    start += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return run([*start, sys.executable, "-m", "eellm", "generate", *arguments])


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_texts_of_one_rank(folder, ranks):
    ended = mpirun(ranks, "decode.py", "texts", folder)
    assert ended.status == 0, ended.err
    found = [json.loads(line) for line in ended.out.splitlines()]
    assert len(found) == 4 and all(equal for equal, _ in found), found
    assert found[0][1] > 1  # tokens left at several exits


def test_the_command(folder):
    options = ("--prompt", "Zwölf", "--prompt", "V", "--threshold", "0.3", "--json")
    options += ("--max-new-tokens", "24")
    ended = command(4, folder, "--engine", "pipeline", *options)
    assert ended.status == 0, ended.err
    alone = eellm("generate", folder, *options)
    texts, wanted = (
        [json.loads(line) for line in each.out.splitlines()] for each in (ended, alone)
    )
    assert len(texts) == len(wanted) == 2
    for text, other in zip(texts, wanted, strict=True):
        for name in ("tokens", "exits", "confidences", "logprobs", "text"):
            assert text[name] == other[name]


def test_a_wrong_call_ends_all_ranks_with_one_message(folder):
    for options, match in (
        (["--prompt", "V"], "expected --engine pipeline, got 'deferred'"),
        (["--engine", "pipeline"], "no prompt"),
        (["--engine", "pipeline", "--prompt", "V", "--ranks", "3"], "the 2 ranks of the job"),
        (["--engine", "pipeline", "--prompt", "V", "--split", "1,1"], "add up to 4"),
    ):
        ended = command(2, folder, *options)
        (line,) = ended.errors
        assert ended.status == 2 and match in line, line
        assert "Traceback" not in ended.err and ended.seconds < 20


LOST = {
    "killed": None,  # mpirun says it
    "asleep": "no message from rank",
    "failing": "no message from rank",
}


@pytest.mark.parametrize("case", LOST)
def test_a_lost_rank_ends_the_job(case):
    ended = mpirun(4, "decode.py", case)
    assert ended.status != 0 and ended.out == "" and ended.seconds < 25
    assert "Traceback" not in ended.err
    if LOST[case] is None:
        assert not ended.errors and "signal 9" in ended.err.lower()
    else:
        (line,) = ended.errors
        assert line.startswith("eellm: error: rank 0: " + LOST[case]), line
        assert "answer to pass" in line


def test_latency():
    """Tokens that leave early do not wait for the ranks behind their exit. The bound is loose, as
    the machine may be busy."""
    ended = mpirun(4, "decode.py", "latency")
    assert ended.status == 0, ended.err
    error, (entries, finite) = map(json.loads, ended.out.splitlines())
    assert -0.01 < error < 0.5
    assert entries == 80 and finite
