"""Pictures are drawn from what is given, and refuse what they can't draw."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest

from eellm import plot
from eellm.decode.generation import Generation
from eellm.palette import EXIT_COLORS, colour


def history(steps=200):
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, steps + 1):
        losses = [3 * math.exp(-step / 80) + 2 + 0.1 * i + 0.05 * rng.normal() for i in (2, 1, 0)]
        records.append({"kind": "step", "step": step, "losses": losses})
        if step % 50 == 0:
            records.append({"kind": "valid", "step": step, "losses": losses})
    return records


def test_losses_have_a_line_for_each_exit_and_units():
    figure = plot.losses(history(), ["a", "b", "final"], unigram=9.0)
    axes = figure.axes[0]
    assert "bits" in axes.get_ylabel() and "step" in axes.get_xlabel() and axes.get_title("left")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["a", "b", "final", "Validation"]
    smooth = next(line for line in axes.lines if line.get_label() == "a")
    wanted = np.array([r["losses"][0] for r in history() if r["kind"] == "step"]) / math.log(2)
    assert np.abs(smooth.get_ydata() - wanted).max() < 0.5
    assert smooth.get_ydata()[100] == pytest.approx(wanted[96:105].mean())


def test_losses_survive_what_was_not_finite():
    records = history(60)
    records[10]["losses"][0] = None
    records[11]["losses"][1] = float("nan")
    figure = plot.losses(records)
    figure.savefig(io.BytesIO())


def generation(pieces, exits, depths=(2.0, 4.0, 6.0), prompt="# a\n"):
    count, exit_count = len(pieces), len(depths)
    numbers = np.full(count, 0.5, np.float32)
    return Generation(
        prompt=0,
        sample=0,
        prompt_tokens=np.array([1], np.int32),
        prompt_text=prompt,
        text="".join(pieces),
        pieces=tuple(pieces),
        tokens=np.arange(count, dtype=np.int32),
        exits=np.array(exits, np.int32),
        confidences=numbers,
        logprobs=-numbers,
        exit_confidences=np.full((count, exit_count), 0.5, np.float32),
        exit_tokens=np.zeros((count, exit_count), np.int32),
        full_depth_logprobs=None,
        finish="length",
        seconds=1.0,
        exit_names=("a", "b", "final")[-exit_count:],
        exit_depths=tuple(depths),
    )


PIECES = ["def", " f", "(", "x", "):\n", "    return", " x"]


def test_exits_show_every_token_and_its_share():
    figure = plot.exits(generation(PIECES, [0, 1, 2, 2, 0, 1, 2]))
    text, bars = figure.axes
    drawn = "".join(each.get_text() for each in text.texts)
    assert drawn == "#a" + "".join("".join(PIECES).split())
    assert len(bars.patches) == 7 and {patch.get_height() for patch in bars.patches} == {2, 4, 6}
    labels = [each.get_text() for each in bars.get_legend().get_texts()]
    assert labels == ["a: 29 % of tokens", "b: 29 % of tokens", "final: 43 % of tokens"]
    assert "layers" in bars.get_ylabel() and "token" in bars.get_xlabel()
    figure.savefig(io.BytesIO())


def test_exits_under_other_names_without_the_prompt():
    figure = plot.exits(generation(PIECES, [0] * 7), names=["x", "y", "z"], prompt=False)
    text, bars = figure.axes
    assert "#" not in "".join(each.get_text() for each in text.texts)
    assert bars.get_legend().get_texts()[0].get_text() == "x: 100 % of tokens"


def test_exits_of_a_text_without_a_tokenizer():
    result = replace(generation(["", ""], [0, 1]), text=None, prompt_text=None)
    text = plot.exits(result).axes[0]
    assert "".join(each.get_text() for each in text.texts) == "01"


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="train first"):
        plot.losses([])
    with pytest.raises(ValueError, match="no tokens to draw"):
        plot.exits(generation([], []))
    with pytest.raises(ValueError, match=r"names has the wrong length .*3 exits, got 1"):
        plot.exits(generation(PIECES, [0] * 7), names=["x"])


def test_palette_tells_exits_apart():
    shown = [colour(i, 5) for i in range(5)]
    assert len(set(shown)) == 5 and shown[:4] == list(EXIT_COLORS[:4])
    assert colour(0, 1) == shown[-1]
    with pytest.raises(ValueError, match="no such exit"):
        colour(3, 3)
