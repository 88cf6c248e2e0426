"""eellm generate: texts, JSON, pages, colours, and what a mistake gets."""

import json
import re

import pytest

from tests.cli.common import eellm, error_line

SHORT = ("--max-new-tokens", 12)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def test_text_on_standard_output_and_numbers_on_standard_error(trained):
    result = eellm("generate", trained, "--prompt", "def f", *SHORT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def f") and "\x1b" not in result.stdout
    assert "12 tokens" in result.stderr and "final 100%" in result.stderr


def test_json_is_one_object_a_text(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("class ")
    result = eellm("generate", trained, "--prompt", "def f", "--prompt-file",
                   tmp_path / "prompt.txt", "--threshold", "0", *SHORT, "--json")  # fmt: skip
    assert result.stderr == ""
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["prompt"] == "def f" and second["prompt"] == "class "
    assert set(first["exits"]) == {0} and first["exit_shares"]["after layer 1"] == 1
    assert len(first["tokens"]) == len(first["confidences"]) == len(first["logprobs"]) == 12
    assert first["finish"] == "length"


def test_the_seed_decides_a_sample(trained):
    def text(seed):
        return eellm("generate", trained, "--prompt", "x", "--temperature", 1, "--seed", seed,
                     *SHORT, "--json").stdout  # fmt: skip

    def tokens(seed):
        return json.loads(text(seed))["tokens"]

    assert tokens(1) == tokens(1) != tokens(2)


def test_colours_only_when_asked_for_or_on_a_terminal(trained):
    arguments = ("generate", trained, "--prompt", "def f", "--threshold", "0", *SHORT)
    plain = eellm(*arguments)
    colourful = eellm(*arguments, "--color", "always")
    assert "\x1b[" in colourful.stdout
    text = plain.stdout.rstrip("\n")
    assert ESCAPE.sub("", colourful.stdout).startswith(text)
    assert "after layer 1 100%" in ESCAPE.sub("", colourful.stdout)


def test_page_shows_what_the_model_wrote_and_escapes_it(trained, tmp_path):
    page = tmp_path / "page.html"
    result = eellm("generate", trained, "--prompt", "<b>&", *SHORT, "--html", page)
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text and "confidence" in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no prompt", "--prompt"]),
        (["--prompt", "x", "--threshold", "7"], ["threshold", "7"]),
        (["--prompt", "x", "--threshold", "high"], ["--threshold", "high", "0.6,0.8"]),
        (["--prompt", "x", "--threshold", "0.1,0.2,0.3"], ["threshold", "1"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature", "-1"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens", "0"]),
        (["--prompt", "x " * 200], ["64"]),
        (["--prompt-file", "nothing.txt"], ["nothing.txt"]),
        (["--prompt", "x", "--engine", "fast"], ["--engine", "full"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(trained, tmp_path, arguments, parts):
    line = error_line(eellm("generate", trained, *arguments, cwd=tmp_path), 2)
    for part in parts:
        assert part in line, line


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    line = error_line(eellm("generate", tmp_path, "--prompt", "x"), 2)
    assert "config.json" in line
