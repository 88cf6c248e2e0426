"""A whole evaluation: losses against float64, rows against the decode rule, text, page, picture."""

import io
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import eellm
from eellm import _core
from eellm.data import load_tokenizer
from eellm.evaluation import CURVE, evaluate, thresholds
from eellm.evaluation.costs import StepCosts
from eellm.evaluation.scoring import cut, score
from eellm.model import Model
from tests.infer.models import fill, make_config, random_tokens
from tests.infer.reference import Reference


def make_model(case="llama", **changes):
    model = Model.from_config(make_config(case, **changes), threads=1)
    fill(model.core, 0)
    return model


def reference(model, dtype=np.float64):
    parameters = {
        row["name"]: np.asarray(model.core.parameter(row["name"])) for row in model.core.table
    }
    return Reference(model.config.to_core(), parameters, dtype)


@pytest.fixture(scope="module")
def found():
    model = make_model("llama_heads")
    text = random_tokens(3, 900)
    return model, text, evaluate(model, text, window=60, agreement=0.6, speed_tokens=20)


def test_losses_and_agreement_are_those_of_float64(found):
    model, text, result = found
    wide, narrow = reference(model), reference(model, np.float32)
    losses, same, bound = [], [], 0.0
    for window in cut([text], 60):
        exact = wide.logits(window)[:, :-1]
        bound = max(bound, 2 * np.abs(narrow.logits(window)[:, :-1] - exact).max())
        total = np.log(np.exp(exact).sum(-1))
        losses.append(total - np.take_along_axis(exact, window[None, 1:, None], -1)[..., 0])
        same.append(exact.argmax(-1) == exact.argmax(-1)[-1])
    wanted = np.concatenate(losses, 1).mean(1)
    assert result.tokens == 899 and result.window == 60 and result.dtype == "float32"
    assert np.abs(result.losses - wanted).max() <= 2 * bound + 2.0**-20
    assert np.allclose(result.perplexity, np.exp(result.losses), rtol=1e-12)
    # A tie within rounding may fall either way.
    assert np.abs(result.agreement - np.concatenate(same, 1).mean(1)).max() <= 2 / 899
    assert result.exit_names[-1] == "final" and result.exit_depths == (0.0, 1.5, 2.0, 3.0, 4.0)
    # Negative control: the losses of a text that is shifted are others.
    shifted = evaluate(model, np.roll(text, 7), window=60, speed_tokens=0)
    assert np.abs(shifted.losses - wanted).max() > 2 * bound + 2.0**-20


def test_rows_are_what_forced_decoding_does(found):
    """Exits of the timed rows by the engine itself: shares, depth and agreement of a window."""
    model, text, _ = found
    window = text[:60]
    result = evaluate(model, [window, window], window=60, speed_tokens=0)
    engine = _core.Engine(model.core)
    full = score(engine, [window])
    for row in result.curve[::4]:
        engine.add(
            window[:1],
            max_new_tokens=59,
            thresholds=list(row.thresholds),
            forced=window[1:],
            all_confidences=True,
        )
        exits = []
        while engine.active:
            exits += engine.step()["exit"].tolist()
        shares = np.bincount(exits, minlength=5) / 59
        assert np.allclose(shares, row.shares, atol=1e-12)
        assert row.mean_depth == pytest.approx(shares @ np.array(result.exit_depths))
        assert row.agreement == pytest.approx(full.correct[exits, np.arange(59)].mean())


def test_the_curve_and_its_mark(found):
    _, _, result = found
    assert [row.thresholds for row in result.curve] == [(limit,) * 4 for limit in CURVE]
    never, always = result.curve[0], result.curve[-1]
    assert never.agreement == 1 and never.mean_depth == 4 and never.predicted == 1
    assert always.shares[0] == 1 and always.mean_depth == 0
    assert all(row.speedup > 0 and row.tokens_per_second > 0 for row in result.curve)
    assert never.expected == 1 and always.expected == pytest.approx(always.predicted, rel=0.3)
    good = [row for row in result.curve if row.agreement >= 0.6]
    assert result.marked.predicted == max(row.predicted for row in good)


def test_candidates_are_found_on_one_half_and_judged_on_the_other(found):
    model, text, result = found
    here, there = score(_core.Engine(model.core), cut([text], 60)).halves()
    costs = StepCosts(model.config)
    assert 1 <= len(result.candidates) <= 4 and result.best in result.candidates
    for row in result.candidates:
        for side, agreement in ((here, row.found_agreement), (there, row.agreement)):
            judged = thresholds.outcome(
                row.thresholds, side.confidence, side.correct, result.exit_depths
            )
            assert judged.agreement == agreement
        assert row.found_agreement >= 0.6
        assert row.shares == judged.shares and row.mean_depth == judged.mean_depth
        places = thresholds.places(row.thresholds, there.confidence)
        paid = costs.average(judged.active, places, there.starts)
        assert row.predicted == pytest.approx(costs.full() / paid)


def test_shown_as_text_page_and_picture(found):
    _, _, result = found
    lines = str(result).splitlines()
    assert lines[0].startswith("899 tokens in windows of 60")
    marked = [line for line in lines if line.startswith("* ")]
    assert any(line.split()[1] == f"{result.marked.thresholds[0]:.2f}" for line in marked)
    assert len(marked) == 3
    page = result._repr_html_()
    assert page.count("<table") == 4 and "data:image/png;base64," in page
    figure = (
        eellm.evaluate and eellm.plot.curve(result) if hasattr(eellm, "plot") else result.plot()
    )
    left, right = figure.axes
    assert "agreement" in left.get_xlabel() and "layers" in right.get_xlabel()
    line = next(each for each in left.lines if "predicted" in each.get_label())
    assert np.allclose(line.get_xdata(), [100 * row.agreement for row in result.curve])
    dots = next(each for each in right.lines if each.get_label() == "one threshold, measured")
    assert np.allclose(dots.get_ydata(), [row.speedup for row in result.curve])
    figure.savefig(io.BytesIO(), format="png")
    told = json.loads(json.dumps(result.to_dict()))
    assert told["losses"] == list(result.losses) and len(told["curve"]) == 21
    assert told["best"]["thresholds"] == list(result.best.thresholds)
    assert told["marked"]["agreement"] >= 0.6


def test_a_model_without_exits():
    result = evaluate(make_model("no_exits"), random_tokens(1, 200), window=50, speed_tokens=16)
    assert result.curve == result.candidates == result.drafts == ()
    assert result.best is result.marked is result.best_drafting is None
    assert result.full_tokens_per_second > 0 and len(result.losses) == 1
    assert "final" in str(result) and "<table" in result._repr_html_()
    with pytest.raises(ValueError, match="early exits"):
        result.plot()


@pytest.mark.parametrize("count", [2, 3, 5, 17])
def test_short_texts(count):
    result = evaluate(make_model("gpt2"), random_tokens(1, count), speed_tokens=8)
    assert result.tokens == count - 1 and not result.candidates
    assert "too short" in str(result) and result._repr_html_()


def test_an_engine_knows_its_dtype(found):
    model, _, _ = found
    for dtype in ("float32", "bfloat16"):
        assert _core.Engine(model.core, dtype=dtype).dtype == dtype


def test_what_is_refused():
    model = make_model()
    text = random_tokens(1, 20)
    for settings, said in (
        ({"agreement": 0}, "agreement"),
        ({"agreement": 1.5}, "agreement"),
        ({"agreement": "0.9"}, "agreement"),
        ({"window": 1}, "window"),
        ({"tokens": 0}, "tokens"),
        ({"speed_tokens": -1}, "speed_tokens"),
        ({"dtype": "int4"}, "dtype"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(model, text, **settings)
    for bad, said in (
        ([], "nothing to score"),
        ([5], "nothing to score"),
        ([1, 43], "vocabulary"),
        ([1, -1], "vocabulary"),
        ([[0.5, 1.5]], "integers"),
        (7, "text"),
        (b"bytes", "text"),
        ("a text", "tokenizer"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            evaluate(model, bad, speed_tokens=0)
    with pytest.raises(ValueError, match="model is invalid"):
        evaluate(object(), text)


def held_out(folder, count, window):
    """Windows spread evenly over the files that the model never saw."""
    library = Path(sysconfig.get_path("stdlib"))
    names = json.loads((folder / "held_out_files.json").read_text())
    texts = [(library / name).read_text("utf-8") for name in names if (library / name).is_file()]
    if len(texts) < len(names) // 2:
        pytest.skip("needs the files of Python 3.11's standard library")
    encoded = load_tokenizer(folder).encode_batch(texts, special=False)
    windows = [w for w in cut(encoded, window) if len(w) == window]
    return [windows[i] for i in np.linspace(0, len(windows) - 1, count).astype(int)]


def test_code16(real_models, monkeypatch):
    """PyTorch's figures on 20,480 held-out tokens; other windows, hence standard errors."""
    folder = real_models("code16")
    golden = json.loads((folder / "golden.json").read_text())["teacher_forced"]
    windows = held_out(folder, 41, 512)
    kept = []
    monkeypatch.setattr(
        "eellm.evaluation.score", lambda *a, **b: kept.append(score(*a, **b)) or kept[0]
    )
    result = evaluate(folder, windows, speed_tokens=0)
    assert abs(result.tokens - golden["tokens"]) < 512 and result.dtype == "bfloat16"
    (scores,) = kept
    loss = -scores.logprob.reshape(4, 41, 511).mean(2)
    same = scores.correct.reshape(4, 41, 511).mean(2)
    # Both means have the error of a sample; three of their joint standard deviations.
    room = 3 * np.sqrt(2 / 41)
    assert (np.abs(result.losses - np.array(golden["cross_entropy"])) < room * loss.std(1)).all()
    gap = np.abs(result.agreement[:3] - np.array(golden["argmax_agreement"]))
    assert (gap < room * same.std(1)[:3]).all()
    # What deeper layers gain is the same on all text, nearly.
    for i in range(3):
        step = golden["cross_entropy"][i] - golden["cross_entropy"][i + 1]
        assert (
            abs(result.losses[i] - result.losses[i + 1] - step)
            < room * (loss[i] - loss[i + 1]).std()
        )
    row = next(row for row in result.curve if row.thresholds[0] == 0.7)
    wanted = golden["by_threshold"]["0.7"]
    assert row.agreement == pytest.approx(wanted["agreement"], abs=0.003)
    assert row.mean_depth == pytest.approx(wanted["mean_layers"], abs=0.5)
    assert all(0.98 <= each.agreement <= 1 for each in result.candidates)
    assert result.best.predicted > 1.05
