"""The demo shows what it promises."""

import json
import math

import pytest

import eellm as package
from tests.cli.common import eellm, error_line


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("eellm._core")
    folder = tmp_path_factory.mktemp("demo") / "out"
    result = eellm("demo", "--out", folder, "--seconds", 45, "--json", timeout=900)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1, "nothing but one JSON object on standard output"
    return json.loads(lines[0]), folder


def test_validation_loss_is_a_bit_below_the_unigram_entropy(demo):
    found, _ = demo
    assert 6 < found["unigram_entropy"] < math.log2(found["vocab_size"])
    assert len(found["valid_losses"]) == 3
    for loss in found["valid_losses"]:
        assert loss <= found["unigram_entropy"] - 1, found


def test_every_exit_learns_to_the_end(demo):
    found, _ = demo
    pairs = zip(found["losses_at_the_end"], found["losses_after_a_tenth"], strict=True)
    assert all(end < early for end, early in pairs), found


def test_every_exit_is_used_at_ninety_percent_agreement(demo):
    found, _ = demo
    assert found["chosen_on"]["agreement"] >= 0.9 and found["agreement"] >= 0.9, found
    assert len(found["shares"]) == 3 and sum(found["shares"]) == pytest.approx(1)
    assert min(found["shares"]) >= 0.05 and min(found["chosen_on"]["shares"]) >= 0.05, found
    assert found["judged_tokens"] >= 10_000
    assert all(0 < limit < 1 for limit in found["thresholds"])


def test_it_writes_with_and_without_early_exits(demo):
    made = demo[0]["generated"]
    assert made["tokens"] >= 100 and sum(made["shares"]) == pytest.approx(1)
    assert made["tokens_per_second"]["full"] > 0 and made["tokens_per_second"]["early_exit"] > 0
    assert len(made["texts"]) == 4 and all(made["texts"])


def test_its_files_are_there(demo):
    found, folder = demo
    for name in ("losses", "exits"):
        data = (folder / f"{name}.png").read_bytes()
        assert found["paths"][name] == str(folder / f"{name}.png")
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert json.loads((folder / "demo.json").read_text())["thresholds"] == found["thresholds"]
    assert (folder / "train.bin").stat().st_size == 2 * found["train_tokens"]
    config = json.loads((folder / "model/config.json").read_text())
    assert config["model_type"] == "llama" and len(config["early_exits"]["exits"]) == 2


def test_the_model_loads_again_with_the_losses_of_the_demo(demo):
    found, folder = demo
    from eellm.data import PackedDataset, TokenFile

    model = package.Model.from_pretrained(folder / "model")
    data = PackedDataset(TokenFile(folder / "valid"), 128, shuffle=False)
    tokens, _ = data.windows(range(64))
    bits = model.loss(tokens[:, :-1], tokens[:, 1:]) / math.log(2)
    assert bits == pytest.approx(found["losses_at_the_end"], rel=1e-4)


def test_the_model_generates_from_the_command_line(demo):
    found, folder = demo
    limits = ",".join(map(str, found["thresholds"]))
    page = folder.parent / "page.html"
    result = eellm("generate", folder / "model", "--prompt", "class ", "--threshold", limits,
                   "--max-new-tokens", 40, "--json", "--html", page)  # fmt: skip
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)
    assert len(made["tokens"]) == len(made["exits"]) == 40
    assert set(made["exits"]) <= {0, 1, 2}
    assert sum(made["exit_shares"].values()) == pytest.approx(1)
    assert page.read_text().startswith("<!doctype html>")
    again = eellm("generate", folder / "model", "--prompt", "class ", "--max-new-tokens", 40,
                  "--color", "always")  # fmt: skip
    assert again.stdout.startswith("class ") and "tokens/s" in again.stderr


def test_a_second_demo_takes_the_folder_of_the_first_and_no_other(demo, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    line = error_line(eellm("demo", "--out", tmp_path, "--steps", 200), 2)
    assert "not empty" in line and "--out" in line
    assert (tmp_path / "mine.txt").exists()


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short\n" * 100)
    result = eellm("demo", "--text", tmp_path / "short.txt", "--out", tmp_path / "out")
    assert "too short" in error_line(result, 2)
