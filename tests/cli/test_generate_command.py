"""eellm generate: texts, JSON, pages, colours, and what a mistake gets."""

import argparse
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest

from eellm.cli import generate as command
from tests.cli.common import eellm, environment, error_line, start

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
    assert first["exit_names"] == ["after layer 1", "final"]
    assert first["full_depth_logprobs"] is None
    for row, confidence in zip(first["exit_confidences"], first["confidences"], strict=True):
        assert row == [confidence, None]


def test_every_setting_has_an_option(trained):
    """What goes in comes out: texts end before a stop string, banned tokens do not come."""
    arguments = ("generate", trained, "--prompt", "def f", "--json", "--max-new-tokens", 24)
    plain = json.loads(eellm(*arguments).stdout)
    banned, ends = plain["tokens"][0], plain["text"][5:7]
    stopped = json.loads(eellm(*arguments, "--stop", "\x01", "--stop", ends).stdout)
    assert stopped["text"] == plain["text"][: plain["text"].index(ends)]
    assert stopped["finish"] == "stop"
    later = json.loads(eellm(*arguments, "--stop", ends, "--min-new-tokens", 12).stdout)
    assert len(later["tokens"]) >= 12
    other = json.loads(eellm(*arguments, "--logit-bias", f"{banned}=-100").stdout)
    assert banned not in other["tokens"]
    ended = json.loads(eellm(*arguments, "--stop-token-ids", f"{banned},1").stdout)
    assert ended["tokens"] == [banned] and ended["finish"] == "stop"
    result = eellm(
        *arguments, "--engine", "speculative", "--threshold", "0.1", "--active-exits", "0",
        "--max-deferred", 3, "--all-confidences", "--dtype", "bfloat16", "--threads", 1,
    )  # fmt: skip
    assert result.returncode == 0 and len(json.loads(result.stdout)["tokens"]) == 24
    result = eellm(
        *arguments, "--temperature", 0.9, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01,
        "--repetition-penalty", 1.1, "--presence-penalty", 0.1, "--frequency-penalty", 0.1,
        "--seed", 3, "--n", 2, "--full-depth-logprobs", "--threshold", 0.05,
    )  # fmt: skip
    texts = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(texts) == 2 and texts[0]["tokens"] != texts[1]["tokens"]
    for text in texts:
        pairs = zip(text["logprobs"], text["full_depth_logprobs"], text["exits"], strict=True)
        assert all(own == full for own, full, place in pairs if place == 1)


def test_ranks_write_the_same_text(trained):
    """The layers spread over threads of the process."""
    arguments = ("generate", trained, "--prompt", "def f", "--json", "--threshold", 0.05, *SHORT)
    alone = json.loads(eellm(*arguments).stdout)
    spread = json.loads(eellm(*arguments, "--engine", "pipeline", "--ranks", 2).stdout)
    uneven = json.loads(
        eellm(*arguments, "--engine", "pipeline", "--ranks", 2, "--split", "1,1").stdout
    )
    for name in ("tokens", "exits", "confidences", "logprobs", "text"):
        assert spread[name] == uneven[name] == alone[name]
    for options, match in (
        (("--ranks", 2), "runs on one rank"),
        (("--engine", "pipeline", "--ranks", 3), "at most the model's 2 layers"),
        (("--engine", "pipeline", "--ranks", 2, "--split", "2"), "split is invalid"),
        (("--engine", "pipeline", "--ranks", 2, "--split", "a"), "--split"),
    ):
        result = eellm(*arguments, *options)
        assert match in error_line(result, 2)


def test_help_teaches(trained):
    text = eellm("generate", "--help").stdout
    for word in ("speculative", "examples:", "--stop $'\\n\\n'", "0.6,0.8", "--min-p"):
        assert word in text, word


def test_several_texts_come_one_after_the_other(trained):
    prompts = ("--prompt", "def f", "--prompt", "class A", "--prompt", "x = ")
    arguments = ("generate", trained, *prompts, "--n", 2, "--temperature", 1, *SHORT)
    texts = [json.loads(line) for line in eellm(*arguments, "--json").stdout.splitlines()]
    assert len(texts) == 6
    whole = "\n".join(f"{each['prompt']}{each['text']}\n" for each in texts)
    assert eellm(*arguments).stdout == whole


def in_terminal(*arguments, **variables):
    """What the command writes to a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "eellm", *map(str, arguments)], stdout=follower,
        stderr=subprocess.DEVNULL, env=environment(TERM="xterm", **variables),
    )  # fmt: skip
    os.close(follower)
    parts = []
    try:
        while part := os.read(leader, 1 << 16):
            parts.append(part)
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait(60) == 0
    return b"".join(parts).decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_as_tokens_come(trained):
    arguments = ("generate", trained, "--prompt", "def f\x1b[2J", "--threshold", "0", *SHORT)
    shown = in_terminal(*arguments)
    assert "\x1b[30;48;2;230;159;0m" in shown
    assert shown.count("\x1b[30") == shown.count("\x1b[0m") >= 12
    plain = ESCAPE.sub("", shown)
    # The prompt's own control characters are not obeyed.
    assert plain.startswith("def f\ufffd[2J") and "\x1b" not in plain
    assert "after layer 1 100%" in plain
    colourless = in_terminal(*arguments, NO_COLOR="1")
    assert "\x1b" not in colourless and plain.startswith(colourless.rstrip("\n"))


def test_ctrl_c_and_a_reader_that_goes(trained):
    arguments = ("generate", trained, "--prompt", "x", "--temperature", 1, "--n", 3000)
    process = start(*arguments)
    assert process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors == "eellm: interrupted\n"
    process = start(*arguments)
    assert process.stdout.read(200)
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == ""
    process.stderr.close()


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
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text
    both = re.findall(r"confidence: after layer 1 0\.\d+, final 0\.\d+; token", text)
    assert not both  # without a threshold no early exit is run
    eellm("generate", trained, "--prompt", "<b>&", *SHORT, "--all-confidences", "--html", page)
    assert len(re.findall(r"after layer 1 0\.\d+, final 0\.\d+; token", page.read_text())) == 12


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
        (["--prompt", "x", "--engine", "full", "--threshold", "0.5"], ["threshold", "deferred"]),
        (["--prompt", "x", "--top-k", "5"], ["top_k", "set temperature"]),
        (["--prompt", "x", "--active-exits", "one"], ["--active-exits", "one", "0,2"]),
        (["--prompt", "x", "--active-exits", "4", "--threshold", "1"], ["exit 4", "after layer 1"]),
        (["--prompt", "x", "--logit-bias", "a=b"], ["--logit-bias", "a=b", "198=-2.5"]),
        (["--prompt", "x", "--logit-bias", "5"], ["--logit-bias", "TOKEN=NUMBER"]),
        (["--prompt", "x", "--stop", ""], ["stop", "empty"]),
        (["--prompt", "x", "--n", "0"], ["n is invalid", "0"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(trained, tmp_path, arguments, parts):
    line = error_line(eellm("generate", trained, *arguments, cwd=tmp_path), 2)
    for part in parts:
        assert part in line, line


def test_what_is_wrong_is_said_before_weights_are_read(trained, tmp_path):
    for file in trained.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    for arguments, part in (
        (("--prompt", "x", "--temperature", -1), "temperature is invalid"),
        (("--prompt", "x", "--active-exits", 3, "--threshold", 1), "exit 3"),
        (("--prompt", "x " * 200), "too long"),
        (("--prompt", "x"), "safetensors"),
    ):
        assert part in error_line(eellm("generate", tmp_path, *arguments), 2)


def test_the_cache_is_as_large_as_the_texts_need(trained):
    """A context of millions of tokens needs no more memory than its texts."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args([str(trained), "--prompt", "def f", *map(str, SHORT)])
    generator = command._load(options, ["def f", "class A"], command._settings(options), None)
    longest = max(generator.tokenizer.encode(text).size for text in ("def f", "class A"))
    assert generator.max_length == longest + 12 < generator.config.max_position_embeddings
    assert generator.max_sequences == 2


def test_the_start_token_is_put_before_a_prompt(trained):
    arguments = ("generate", trained, "--prompt", "def f", "--json", *SHORT)
    without = json.loads(eellm(*arguments, "--no-add-bos").stdout)
    assert without["tokens"] == json.loads(eellm(*arguments).stdout)["tokens"]
    # The tokenizer of this model has none.
    assert "no bos token" in error_line(eellm(*arguments, "--add-bos"), 2)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    line = error_line(eellm("generate", tmp_path, "--prompt", "x"), 2)
    assert "config.json" in line
