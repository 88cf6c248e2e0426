"""Windows, scores of windows, and the search for drafts."""

import numpy as np
import pytest

from eellm import _core
from eellm.evaluation.costs import StepCosts
from eellm.evaluation.drafts import plan, plans
from eellm.evaluation.scoring import WindowScores, cut, score
from tests.infer.models import make, make_config, random_tokens


@pytest.mark.parametrize("window", [2, 3, 7, 20, 100])
def test_every_token_is_predicted_once(window):
    documents = [np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate((1, 2, 20, 0, 39))]
    windows = cut(documents, window)
    assert all(2 <= len(each) <= window for each in windows)
    predicted = np.concatenate([each[1:] for each in windows])
    assert predicted.tolist() == np.concatenate([each[1:] for each in documents]).tolist()
    # What stands before a token is what stands before it in its document.
    assert all((np.diff(each) == 1).all() for each in windows)
    for limit in (1, 5, 30):
        some = cut(documents, window, limit)
        assert sum(map(len, some)) - len(some) == min(limit, len(predicted))
        assert np.concatenate([each[1:] for each in some]).tolist() == predicted[:limit].tolist()


def test_scores_are_those_of_float64():
    core, wide, narrow = make("llama_heads")
    windows = [random_tokens(i, n) for i, n in enumerate((2, 33, 9, 50, 50))]
    found = score(_core.Engine(core, max_sequences=3), windows)
    assert found.starts.tolist() == [0, 1, 33, 41, 90] and found.tokens == 139
    for start, window in zip(found.starts, windows, strict=True):
        here = slice(start, start + len(window) - 1)
        exact = wide.logits(window)[:, :-1]
        bound = 2 * np.abs(narrow.logits(window)[:, :-1] - exact).max()
        top = exact.max(-1, keepdims=True)
        logprob = exact - top - np.log(np.exp(exact - top).sum(-1, keepdims=True))
        wanted = np.take_along_axis(logprob, window[None, 1:, None], -1)[..., 0]
        slack = 2 * bound + 2.0**-21 * (1 + np.abs(wanted))
        assert (np.abs(found.logprob[:, here] - wanted) <= slack).all()
        assert np.abs(found.confidence[:, here] - np.exp(logprob.max(-1))).max() <= bound
        second, first = np.moveaxis(np.sort(exact)[..., -2:], -1, 0)
        clear = (first - second > 2 * bound).all(0)
        same = exact.argmax(-1) == exact.argmax(-1)[-1]
        assert clear.any() and (found.correct[:, here] == same)[:, clear].all()


def test_an_interrupted_score_leaves_the_engine_ready():
    core, _, _ = make("llama")
    windows = [random_tokens(i, 30) for i in range(4)]
    engine = _core.Engine(core, max_sequences=4)

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(engine, windows, progress=stop)
    assert engine.active == 0
    again = score(engine, windows)
    # One sequence at a time, and an engine with room for one only.
    alone = score(_core.Engine(core), windows)
    assert again.logprob.tobytes() == alone.logprob.tobytes()
    engine.add(windows[0], max_new_tokens=4)
    with pytest.raises(_core.Error, match="in use"):
        score(engine, windows)


def test_nothing_to_score():
    core, _, _ = make("llama")
    with pytest.raises(ValueError, match="nothing to score"):
        score(_core.Engine(core), [])


def made(lengths, exits, seed):
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    confidence = rng.random((exits, count)).astype(np.float32)
    correct = rng.random((exits, count)) < confidence
    correct[-1] = True
    starts = np.cumsum(lengths) - lengths
    windows = [np.zeros(n + 1, np.int32) for n in lengths]
    return WindowScores(confidence, np.zeros((exits, count), np.float32), correct, windows, starts)


def by_hand(scores, costs, exit, threshold, longest):
    """Speed-up of drafting, token by token."""
    step = costs.leaving([each == exit for each in range(costs.early)])
    ends = [*scores.starts[1:], scores.tokens]
    tokens = paid = 0
    for at, end in zip(scores.starts.tolist(), ends, strict=True):
        while at < end:
            drafts = 0
            while (
                drafts < longest
                and at + drafts < end - 1
                and scores.confidence[exit, at + drafts] >= np.float32(threshold)
            ):
                drafts += 1
            good = 0
            while good < drafts and scores.correct[exit, at + good]:
                good += 1
            tokens += good + 1
            asked = drafts < min(longest, end - 1 - at)
            paid += drafts * step[exit] + (step[-1] if asked else costs.full())
            at += good + 1
    assert tokens == scores.tokens
    return tokens * costs.full() / paid


def test_plans_are_the_best_there_are():
    from eellm.evaluation.drafts import LENGTHS, THRESHOLDS

    costs = StepCosts(make_config("gpt2", num_hidden_layers=12))
    scores = made([60, 1, 45, 2, 80], 3, 4)
    found = plans(costs, scores, 1000)
    assert len(found) == 2 * len(LENGTHS) and plan(costs, scores) == found[0]
    assert [each.predicted for each in found] == sorted((e.predicted for e in found), reverse=True)
    assert plans(costs, scores, 3) == found[:3]
    for each in found:
        tried = [by_hand(scores, costs, each.exit, t, each.max_drafts) for t in THRESHOLDS]
        assert each.predicted == pytest.approx(max(tried), rel=1e-12)
        assert tried[THRESHOLDS.index(each.threshold)] == pytest.approx(max(tried), rel=1e-12)


def test_a_model_without_exits_can_not_draft():
    costs = StepCosts(make_config("no_exits"))
    assert plan(costs, made([20], 1, 0)) is None and plans(costs, made([20], 1, 0)) == []


def test_predicted_drafts_are_what_decoding_pays():
    """Greedy text of the model itself: tokens a pass of the plan, as the engine counts them."""
    core, _, _ = make("llama", max_position_embeddings=160)
    config = make_config("llama", max_position_embeddings=160)
    costs = StepCosts(config)
    prompt = random_tokens(1, 4)
    engine = _core.Engine(core)
    engine.add(prompt, max_new_tokens=150, engine="full")
    text = list(prompt)
    while engine.active:
        text += engine.step()["token"].tolist()
    scores = score(engine, [np.array(text, np.int32)])
    # What the prompt predicts is not decoded.
    scores = WindowScores(
        scores.confidence[:, 3:],
        scores.logprob[:, 3:],
        scores.correct[:, 3:],
        [np.array(text[3:], np.int32)],
        scores.starts,
    )
    for each in plans(costs, scores, 6):
        before = engine.stats
        limits = [each.threshold if exit == each.exit else 1.0 for exit in range(costs.early)]
        engine.add(
            prompt,
            max_new_tokens=150,
            engine="speculative",
            thresholds=limits,
            max_deferred=each.max_drafts,
        )
        found = []
        while engine.active:
            found += engine.step()["token"].tolist()
        assert found == text[4:]
        accepted = engine.stats["accepted"] - before["accepted"]
        passes = 150 - accepted
        assert 150 / passes == pytest.approx(each.tokens_per_pass, rel=0.1)


@pytest.mark.parametrize("case", ["llama", "gpt2_mlp", "llama_heads", "window"])
@pytest.mark.parametrize("longest", [1, 3, 6])
def test_passes_read_what_they_are_priced_at(case, longest):
    """A pass asks the exit only where another draft would have had room."""
    core, _, _ = make(case)
    costs = StepCosts(make_config(case))
    for exit in np.flatnonzero(costs.defers).tolist():
        for threshold in (0.0, 0.2, 0.4):
            limits = [threshold if each == exit else 1.0 for each in range(costs.early)]
            leaving = costs.leaving([each < 1 for each in limits])
            engine = _core.Engine(core)
            engine.add(
                random_tokens(exit, 5),
                max_new_tokens=60,
                engine="speculative",
                thresholds=limits,
                max_deferred=longest,
            )
            left, drafts, kinds = 60, 0, set()
            while engine.active:
                first, before = engine.stats["steps"] == 0, engine.stats["bytes_read"]
                made = len(engine.step())
                read = engine.stats["bytes_read"] - before
                asked = drafts < min(longest, left - 1)
                if made:
                    wanted = leaving[-1] if asked else costs.full()
                    kinds.add(asked)
                else:
                    wanted = leaving[exit]
                # The first step reads the prompt as well.
                assert first or read == wanted
                left, drafts = left - made, 0 if made else drafts + 1
            assert False in kinds
