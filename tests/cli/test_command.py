"""The command line: help, one-line errors, exit statuses, and runs from end to end."""

import json
import struct
import tomllib

import numpy as np
import pytest

from eellm._version import __version__
from eellm.cli import COMMANDS
from tests.cli.common import eellm, error_line


def test_version_and_help():
    assert eellm("--version").stdout == f"eellm {__version__}\n"
    text = eellm("--help").stdout
    assert all(name in text for name in COMMANDS) and "examples:" in text
    assert eellm().stdout == text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches(name):
    result = eellm(name, "--help")
    assert result.returncode == 0 and "examples:" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--sett", "a"], ["--sett"]),
        (["train", "nowhere.toml"], ["nowhere.toml", "expected a TOML file"]),
        (["train"], ["data.train", "eellm data prepare"]),
        (["train", "--set", "train.steps=none"], ["train.steps", "a whole number", "none"]),
        (["train", "--set", "train.stepz=3"], ["train.stepz", "did you mean train.steps?"]),
        (["train", "--resume", "yes"], ["--resume", "auto"]),
        (["data"], ["ACTION"]),
        (["data", "inspect", "nothing"], ["nothing.idx", "eellm data prepare"]),
        (["convert", "a", "b", "--exit", "x"], ["--exit", "LAYER"]),
        (["convert", "a", "b", "--exit", "1:haed=mlp"], ["haed", "did you mean head?"]),
        (["convert", "a", "b", "--exit", "1:head=mpl"], ["mpl", "mlp"]),
        (["demo", "--text", "nothing.txt"], ["nothing.txt"]),
        (["demo", "--seconds", "-1"], ["seconds", "-1"]),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(arguments, parts, tmp_path):
    line = error_line(eellm(*arguments, cwd=tmp_path, HF_HUB_OFFLINE="1"), 2)
    for part in parts:
        assert part in line, line


def test_a_wrong_log_level_is_refused(corpus, tmp_path):
    line = error_line(
        eellm("train", corpus / "run.toml", "-o", tmp_path / "run", EELLM_LOG="loud"), 2
    )
    assert "EELLM_LOG" in line and "debug" in line


def test_debug_shows_the_traceback():
    result = eellm("train", EELLM_DEBUG="1")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_print_config_round_trips(corpus, tmp_path):
    first = eellm("train", corpus / "run.toml", "--set", "train.steps=9", "--print-config")
    assert first.returncode == 0, first.stderr
    assert tomllib.loads(first.stdout)["train"]["steps"] == 9
    (tmp_path / "again.toml").write_text(first.stdout)
    again = eellm("train", tmp_path / "again.toml", "--print-config")
    assert again.stdout == first.stdout


def test_train_from_end_to_end(corpus, tmp_path):
    run = tmp_path / "run"
    result = eellm("train", corpus / "run.toml", "-o", run)
    assert result.returncode == 0, result.stderr
    assert "step 8/8" in result.stderr and "validation loss" in result.stderr
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.toml", "metrics.jsonl", "model",
    }  # fmt: skip
    assert (run / "model/tokenizer.json").is_file()
    config = json.loads((run / "model/config.json").read_text())
    assert config["vocab_size"] == 300 and len(config["early_exits"]["exits"]) == 1
    line = error_line(eellm("train", corpus / "run.toml", "-o", run), 2)
    assert "not empty" in line and "--resume auto" in line.replace("resume auto", "--resume auto")
    again = eellm("train", corpus / "run.toml", "-o", run, "--resume", "auto",
                  "--set", "train.steps=10")  # fmt: skip
    assert again.returncode == 0 and "train.steps: 8 -> 10" in again.stderr
    done = eellm("train", run / "config.toml", "--resume", "auto")
    assert done.returncode == 0, done.stderr


def test_a_failed_run_is_one_line_and_status_1(corpus, tmp_path):
    result = eellm(
        "train", corpus / "run.toml", "-o", tmp_path / "run", "--set", "train.learning_rate=1e30",
        EELLM_LOG="error",
    )  # fmt: skip
    line = error_line(result, 1)
    assert "step 2: " in line and "finite" in line and "lower learning_rate" in line


def test_a_full_disk_is_one_line_and_status_1(corpus, tmp_path):
    result = eellm(
        "train", corpus / "run.toml", "-o", tmp_path / "run", EELLM_FAIL_AT="5", EELLM_LOG="error"
    )
    assert "cannot write" in error_line(result, 1)


def test_vocabulary_and_tokenizer_must_fit(corpus, tmp_path):
    result = eellm("train", corpus / "run.toml", "-o", tmp_path / "run",
                   "--set", "model.vocab_size=10")  # fmt: skip
    assert "model.vocab_size (expected at least the tokenizer's 300, got 10)" in error_line(
        result, 2
    )


def test_inspect_tells_what_a_token_file_holds(corpus):
    result = eellm("data", "inspect", corpus / "corpus", "--tokenizer", corpus / "tokenizer",
                   "--json")  # fmt: skip
    found = json.loads(result.stdout)
    assert found["documents"] == 1 and found["largest_token"] < 300
    assert (corpus / "text.txt").read_text().startswith(found["begins"][:50])
    text = eellm("data", "inspect", corpus / "corpus").stdout
    assert f"{found['tokens']:,}" in text


def test_damaged_token_files_are_refused(corpus, tmp_path):
    (tmp_path / "bad.idx").write_bytes((corpus / "corpus.idx").read_bytes()[:-3])
    (tmp_path / "bad.bin").write_bytes((corpus / "corpus.bin").read_bytes())
    line = error_line(eellm("data", "inspect", tmp_path / "bad"), 2)
    assert "bad.idx" in line and "damaged" in line


def llama2c_file(path, dim=16, hidden=24, layers=2, heads=2, vocab=30, length=8):
    rng = np.random.default_rng(5)
    sizes = [
        vocab * dim, layers * dim, *[layers * dim * dim] * 4, layers * dim,
        *[layers * hidden * dim] * 3, dim, 2 * length * (dim // heads // 2),
    ]  # fmt: skip
    values = rng.normal(0, 0.1, sum(sizes)).astype("<f4")
    header = struct.pack("<7i", dim, hidden, layers, heads, heads, vocab, length)
    path.write_bytes(header + values.tobytes())


def test_convert_llama2c_with_exits_and_dtype(tmp_path):
    llama2c_file(tmp_path / "small.bin")
    done = eellm("convert", tmp_path / "small.bin", tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    done = eellm("convert", tmp_path / "plain", tmp_path / "exits", "--exit",
                 "1:head=mlp", "--dtype", "bfloat16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    once = eellm("convert", tmp_path / "small.bin", tmp_path / "once", "--exit", "1:head=mlp",
                 "--dtype", "bfloat16")  # fmt: skip
    assert once.returncode == 0, once.stderr
    config = json.loads((tmp_path / "exits/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["early_exits"]["exits"][0]["branch"] == "mlp"
    for name in ("config.json", "model.safetensors", "exits.safetensors"):
        left, right = (tmp_path / folder / name for folder in ("exits", "once"))
        assert left.read_bytes() == right.read_bytes(), name
    line = error_line(eellm("convert", tmp_path / "plain", tmp_path / "exits"), 2)
    assert "not empty" in line and "--force" in line


def test_info(tmp_path):
    found = json.loads(eellm("info", "--json", EELLM_LOG="warn").stdout)
    assert found["version"] == __version__ and found["isa"] in found["isa_levels"]
    assert found["bandwidth_bytes_per_second"] > 1e8 and found["matrix_flops_per_second"] > 1e8
    assert found["environment"] == {"EELLM_LOG": "warn"}
    text = eellm("info", "--no-measure").stdout
    assert __version__ in text and found["isa"] in text and "GFLOP" not in text
