"""`eellm schedule`: the chart, the table, pictures, files and errors."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from eellm.cli import main
from eellm.pipeline import Costs, Schedule
from eellm.pipeline.draw import figure
from eellm.pipeline.table import chart
from tests.cli.common import eellm, error_line

ISSUE = ("--name", "1f1b", "--ranks", "4", "--microbatches", "6", "--exits", "1,2")


def shown(capsys, *arguments):
    assert main(["schedule", *arguments]) == 0
    return capsys.readouterr().out


def test_the_chart():
    result = Schedule("1f1b", 2, 3, exits=(1,)).simulate(Costs.uniform(2))
    assert chart(result).splitlines()[:2] == [
        "rank 0 |F0 F1 ......B0--- F2 B1--- ...B2---",
        "rank 1*|...F0 B0--- F1 B1--- F2 B2--- ......",
    ]


def test_chart_of_every_kind_of_action():
    text = chart(Schedule("zero_bubble", 2, 2).simulate(Costs.uniform(2)))
    assert all(name in text for name in ("F0", "I0", "W0", "F1", "I1", "W1"))
    text = chart(Schedule("interleaved", 2, 2, 2).simulate(Costs.uniform(2, 2)))
    assert all(name in text for name in ("F0.0", "F0.1", "B1.1"))
    text = chart(Schedule("1f1b", 4, 4, fill=(1, 1), exits=(0,)).simulate(Costs.uniform(4)))
    assert all(name in text for name in ("f4", "b4", "f5", "b5"))


def test_lines_keep_to_the_width():
    result = Schedule("1f1b", 4, 40).simulate(Costs.uniform(4))
    lines = chart(result, 60).splitlines()[:-1]
    assert max(map(len, lines)) <= 60 and len(lines) > 20


def test_output(capsys):
    text = shown(capsys, *ISSUE)
    for part in ("rank 1*|", "F5", "B5", "4 ranks, 6 microbatches, valid", "bubbles", "slots",
                 "without the early exits"):  # fmt: skip
        assert part in text, text


def test_json(capsys):
    found = json.loads(shown(capsys, *ISSUE, "--json", "--exit-time", "3"))
    # Exits and the final one take 3 each: T of the bound, (P - 1) 3 + 2 x 3 + M (3 + 3).
    assert found["simulation"]["time"] == 9 + 6 + 36
    assert found["exits"] == [1, 2] and not found["custom"]
    assert [each["slots"] for each in found["simulation"]["ranks"]] == [4, 3, 2, 1]


def test_saved_edited_loaded(tmp_path, capsys):
    path = tmp_path / "mine.json"
    shown(capsys, *ISSUE, "--save", str(path))
    assert "valid" in shown(capsys, "--load", str(path))
    text = path.read_text()
    path.write_text(text.replace("F0:sk F1:sk", "F1:sk F0:sk"))
    line = error_line(eellm("schedule", "--load", path), 2)
    assert "mine.json" in line and "rank 0, action 0" in line and "microbatch 0 is due" in line


def test_pictures(tmp_path, capsys):
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    shown(capsys, *ISSUE, "--fill", "auto", "--png", str(png), "--svg", str(svg))
    assert png.read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(svg)


def test_what_a_picture_shows():
    costs = Costs.uniform(4, exits=(0, 1, 2))
    schedule = Schedule("1f1b", 4, 6, fill="auto", exits=(0, 1, 2))
    axes = figure(schedule.simulate(costs)).axes[0]
    names = [each.get_label() for each in axes.containers]
    parts = [f"Part {i}, {way}" for i in (1, 2) for way in ("forward", "backward")]
    assert names == ["forward", "backward", *parts, "early exits"]
    bars = {each.get_label(): each.patches for each in axes.containers}
    assert len(bars["forward"]) == len(bars["backward"]) == 24
    assert len(bars["Part 2, backward"]) == 2 + 1
    # Part 1 and Part 2 backwards have no bars of exits less than their ranks.
    assert {round(bar.get_width(), 9) for bar in bars["early exits"]} == {0.3}
    split = figure(Schedule("zero_bubble", 2, 2).simulate(Costs.uniform(2))).axes[0]
    assert [each.get_label() for each in split.containers] == [
        "forward", "backward, input", "backward, weights"
    ]  # fmt: skip


def test_many_ranks_are_drawn_by_their_busy_share():
    result = Schedule("1f1b", 65, 70).simulate(Costs.uniform(65))
    shares = result.grid(65, 64)
    assert shares.mean() == pytest.approx(result.busy_share)
    assert shares.min() >= 0 and shares.max() <= 1 + 1e-9
    assert len(figure(result).axes[0].images) == 1
    assert "█" in chart(result)
    halves = result.grid(5, 64)
    assert halves == pytest.approx(
        np.array([shares[i * 13 : i * 13 + 13].mean(0) for i in range(5)])
    )


def test_models(tmp_path, capsys):
    (tmp_path / "run.toml").write_text(
        "[model]\nvocab_size = 500\nhidden_size = 64\nnum_hidden_layers = 8\n"
        "num_attention_heads = 4\n[[model.exits]]\nlayer = 2\n[train]\nseq_length = 32\n"
        "micro_batch_size = 2\nglobal_batch_size = 4\n"
    )
    run = ("--config", str(tmp_path / "run.toml"), "--ranks", "4")
    found = json.loads(shown(capsys, *run, "--json"))
    assert found["exits"] == [1] and found["layers"] == [2, 2, 2, 2]
    early = json.loads(shown(capsys, *run, "--json", "--rank-edge", "earlier"))
    assert early["exits"] == [0]
    assert "GiB" in shown(capsys, *run, "--split", "cost")
    assert "3, 2, 2, 1" in shown(capsys, *run, "--split", "3,2,2,1")
    line = error_line(eellm("schedule", *run, "--split", "8"), 2)
    assert "split is invalid" in line
    line = error_line(eellm("schedule", *run, "--forward", "2"), 2)
    assert "--forward" in line and "--config" in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--name", "1f2b"], ["--name", "did you mean 1f1b?"]),
        (["--ranks", "0"], ["ranks", "got 0"]),
        (["--exits", "4"], ["early exit", "0 to 3", "got 4"]),
        (["--exits", "one"], ["--exits", "whole numbers", "one"]),
        (["--fill", "1"], ["fill", "auto"]),
        (["--chunks", "2"], ["chunks", "interleaved"]),
        (["--png", "a.svg"], ["--png", ".png"]),
        (["--load", "nowhere.json"], ["nowhere.json"]),
        (["--load", "a", "--ranks", "4"], ["--ranks", "--load"]),
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
        (["--split", "cost"], ["--split", "--config"]),
        (["--forward", "-1"], ["forward", "-1"]),
        (["--weight", "9"], ["backward_weight", "9"]),
        (["--microbatches", "1", "--message", "nan"], ["message", "nan"]),
    ],
)
def test_wrong_calls(arguments, parts, tmp_path):
    line = error_line(eellm("schedule", *arguments, cwd=tmp_path), 2)
    for part in parts:
        assert part in line, line


def test_parallel_settings_of_a_run_count(tmp_path, capsys):
    """Split, chunks, schedule and edge of [parallel], unless options say otherwise."""
    path = tmp_path / "run.toml"
    path.write_text(
        "[model]\nvocab_size = 500\nhidden_size = 64\nnum_hidden_layers = 8\n"
        "num_attention_heads = 4\n[[model.exits]]\nlayer = 3\n[train]\nseq_length = 32\n"
        '[parallel]\nschedule = "interleaved"\nchunks = 2\nsplit = [3, 1, 2, 2]\n'
        'rank_edge = "earlier"\n'
    )

    def found(*options):
        assert main(["schedule", "--ranks", "2", "--config", str(path), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    given = found()
    assert (given["name"], given["chunks"]) == ("interleaved", 2)
    assert given["layers"] == [3, 1, 2, 2] and given["exits"] == [0]
    assert found("--rank-edge", "later")["exits"] == [1]
    other = found("--name", "gpipe", "--split", "5,3")
    assert (other["name"], other["chunks"], other["layers"]) == ("gpipe", 1, [5, 3])
