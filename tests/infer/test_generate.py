"""What `generate` gives, and what it says about wrong calls."""

import _thread
import inspect
import re
import threading
from functools import partial

import numpy as np
import pytest

from eellm import _core
from eellm.config import ExitConfig, ModelConfig
from eellm.data import train_bpe
from eellm.decode import Generator, Settings, generate
from eellm.files.llama2c import convert
from eellm.model import Model
from eellm.palette import colour
from tests.infer.models import fill, run

TEXT = "Zwölf Boxkämpfer jagen Viktor über den Deich. naïve 😀 いろは <b> & \x1b[31m\n" * 30


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 270)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=96,
        exits=[ExitConfig(1), ExitConfig(3, head="mlp")],
    )
    made = Model.from_config(config, threads=1)
    fill(made.core, 3, scale=0.5)
    return made


SETTINGS = {"max_new_tokens": 20, "threshold": 0.4}


def test_one_prompt(model, tokenizer):
    result = generate(model, "Zwölf", tokenizer=tokenizer, **SETTINGS)
    prompt = tokenizer.encode("Zwölf")
    events = run(model.core, prompt, 20, thresholds=[0.4])
    assert result.tokens.tolist() == events["token"].tolist()
    assert result.exits.tolist() == events["exit"].tolist()
    assert result.confidences.tobytes() == events["confidence"].tobytes()
    assert result.logprobs.tobytes() == events["logprob"].tobytes()
    assert result.exit_confidences.tobytes() == events["exits"]["confidence"].tobytes()
    assert result.exit_tokens.tobytes() == events["exits"]["token"].tobytes()
    assert result.full_depth_logprobs is None
    whole = tokenizer.decode(np.concatenate([prompt, result.tokens]))
    assert result.prompt_text + result.text == whole
    assert "".join(result.pieces) == result.text == str(result)
    assert result.finish == "length"
    assert result.exit_names == ("after layer 1", "after layer 3", "final")
    assert result.exit_depths == (1.0, 2.5, 4.0)
    assert sum(result.exit_shares.values()) == pytest.approx(1)
    depths = [result.exit_depths[e] for e in result.exits]
    assert result.mean_depth == pytest.approx(sum(depths) / 20)
    assert result.tokens_per_second == pytest.approx(20 / result.seconds)
    assert re.match(r"Generation\('.*', 20 tokens, length, .* mean depth", repr(result), re.S)
    assert len(set(result.exits.tolist())) > 1


def test_many_prompts_are_what_each_is_alone(model, tokenizer):
    prompts = ["Boxkämpfer", "über den", "😀", "V", "jagen Viktor über den Deich."]
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 4, **SETTINGS}
    together = generate(model, prompts, tokenizer=tokenizer, n=2, max_sequences=3, **options)
    assert [(r.prompt, r.sample) for r in together] == [(i, s) for i in range(5) for s in (0, 1)]
    for i, prompt in enumerate(prompts):
        alone = generate(model, prompt, tokenizer=tokenizer, n=2, **options)
        for sample in (0, 1):
            assert together[2 * i + sample].text == alone[sample].text
            assert np.array_equal(together[2 * i + sample].exits, alone[sample].exits)
    assert together[0].text != together[1].text


def test_tokens_need_no_tokenizer(model):
    result = generate(model, [5, 6, 7], **SETTINGS)
    assert result.text is None
    assert result.prompt_text is None
    assert (
        result.tokens.tolist() == run(model.core, [5, 6, 7], 20, thresholds=[0.4])["token"].tolist()
    )
    assert str(result).split() == [str(token) for token in result.tokens]
    assert f"{result.tokens[3]} " in result._repr_html_()
    several = generate(model, [[5, 6, 7], [8]], **SETTINGS)
    assert np.array_equal(several[0].tokens, result.tokens)
    assert np.array_equal(generate(model, np.array([5, 6, 7]), **SETTINGS).tokens, result.tokens)
    assert np.array_equal(
        generate(model, np.array([[5, 6, 7]]), **SETTINGS)[0].tokens, result.tokens
    )


def test_stop_tokens(model):
    tokens = generate(model, [5, 6, 7], **SETTINGS).tokens.tolist()
    stop = tokens[6]
    result = generate(model, [5, 6, 7], stop_token_ids=[stop], **SETTINGS)
    assert result.tokens.tolist() == tokens[: tokens.index(stop) + 1]
    assert result.finish == "stop"
    longer = generate(model, [5, 6, 7], stop_token_ids=[stop], min_new_tokens=12, **SETTINGS)
    assert len(longer.tokens) > 12 or longer.finish == "length"
    assert stop not in longer.tokens[:12]


def test_what_every_exit_said(model):
    """Exits below the one that a token left at have been run, those above have not."""
    result = generate(model, [5, 6, 7], **SETTINGS)
    final = result.exits == 2
    assert 0 < final.sum() < 20
    for token, place in enumerate(result.exits.tolist()):
        row = result.exit_confidences[token]
        assert np.isfinite(row[: place + 1]).all() and np.isnan(row[place + 1 :]).all()
        assert (row[:place] < np.float32(0.4)).all() and row[place] == result.confidences[token]
        assert result.exit_tokens[token, place] == result.tokens[token]
        assert (result.exit_tokens[token, place + 1 :] == -1).all()
    # An exit that is not active is not run, unless all are asked for.
    options = {**SETTINGS, "active_exits": [1]}
    second = generate(model, [5, 6, 7], **options)
    assert np.isnan(second.exit_confidences[:, 0]).all()
    assert set(second.exits.tolist()) == {1, 2}
    everything = generate(model, [5, 6, 7], all_confidences=True, **options)
    assert np.isfinite(everything.exit_confidences[:, :2]).all()
    assert np.array_equal(everything.tokens, second.tokens)
    pieces = []
    generate(model, [5, 6, 7], stream=pieces.append, **options)
    assert np.array_equal([p.confidences for p in pieces], second.exit_confidences, equal_nan=True)


@pytest.mark.parametrize("engine", ["deferred", "recompute", "full", "speculative"])
def test_full_depth_logprobs_are_those_of_the_score(model, engine):
    """To the bit; where a token left at the final exit they are its own."""
    generator = Generator(model)
    options = {"engine": engine, "max_new_tokens": 30, "full_depth_logprobs": True}
    if engine != "full":
        options["threshold"] = 0.3
    for sampled in ({}, {"temperature": 1.0, "seed": 5}):
        result = generator.generate([5, 6, 7], **options, **sampled)
        scores = generator.score(np.concatenate([[5, 6, 7], result.tokens]))
        assert result.full_depth_logprobs.tobytes() == scores.logprobs[-1, 2:].tobytes()
        if engine in ("deferred", "recompute"):
            final = result.exits == 2
            assert 0 < final.sum() < 30
            assert np.array_equal(result.full_depth_logprobs[final], result.logprobs[final])
            early = scores.logprobs[result.exits, 2 + np.arange(30)]
            assert np.array_equal(early, result.logprobs)


def test_scores(model, tokenizer):
    """Of several texts, against the model's logits; alone and beside others to the bit."""
    generator = Generator(model, tokenizer=tokenizer, max_sequences=3)
    texts = ["Zwölf Boxkämpfer", "V 😀", "jagen Viktor quer über den Deich.", "naïve", "いろ"]
    found = generator.score(texts)
    for text, scores in zip(texts, found, strict=True):
        tokens = tokenizer.encode(text)
        logits = model.forward(tokens)[:, 0, :-1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = np.take_along_axis(logprobs, tokens[None, 1:, None], -1)[..., 0]
        assert scores.tokens.tolist() == tokens.tolist() and scores.text == text
        assert "".join(scores.pieces) == text
        assert scores.logprobs.shape == (3, len(tokens) - 1)
        assert np.abs(scores.logprobs - wanted).max() < 1e-4
        assert np.abs(scores.confidences - np.exp(logprobs.max(-1))).max() < 1e-4
        assert np.array_equal(scores.best, logits.argmax(-1))
        assert np.allclose(scores.losses, model.loss(tokens), atol=1e-4)
        assert scores.perplexity == pytest.approx(np.exp(-wanted[-1].mean()), rel=1e-4)
        assert scores.agreement[-1] == 1
        assert scores.agreement[0] == (logits[0].argmax(-1) == logits[2].argmax(-1)).mean()
        alone = generator.score(text)
        assert alone.logprobs.tobytes() == scores.logprobs.tobytes()
        assert repr(alone).startswith(f"Scores({len(tokens)} tokens, loss: after layer 1 ")
        page = alone._repr_html_()
        assert page.count("<tr>") == 4 and f"{alone.perplexity:.2f}" in page
    with pytest.raises(ValueError, match=r"text 1 has too few tokens .*2 at least, got 1"):
        generator.score([[1, 2], [3]])
    with pytest.raises(ValueError, match="the text is too long"):
        generator.score([1] * 97)
    assert generator._engine.active == 0


def test_streaming(model, tokenizer):
    """Pieces come one by one, are valid text, and join to the text."""
    for seed in range(8):
        options = {"temperature": 1.5, "seed": seed, "max_new_tokens": 40}
        pieces = []
        result = generate(model, "😀", tokenizer=tokenizer, stream=pieces.append, **options)
        assert "".join(piece.text for piece in pieces) == result.text
        assert [piece.token for piece in pieces] == result.tokens.tolist()
        assert pieces[-1].done == "length"
        assert not any(piece.done for piece in pieces[:-1])
        for piece in pieces:
            piece.text.encode()  # no half characters
        iterator = Generator(model, tokenizer=tokenizer).stream("😀", **options)
        assert repr([next(iterator) for _ in range(9)]) == repr(pieces[:9])
        iterator.close()


def test_streaming_holds_back_half_a_character(model, tokenizer):
    """A character of several tokens appears with its last one."""
    ids = tokenizer.encode("é€")
    assert len(ids) >= 5
    decoder = tokenizer.stream()
    texts = [decoder.put(token) for token in ids]
    assert "".join(texts) == "é€"
    assert "\ufffd" not in "".join(texts)
    assert texts.count("") == len(ids) - 2


def test_html(model, tokenizer):
    result = generate(model, "<b> & <i>", tokenizer=tokenizer, **SETTINGS)
    page = result._repr_html_()
    assert "&lt;b&gt; &amp; &lt;i&gt;" in page
    assert "<b>" not in page
    for index, name in enumerate(result.exit_names):
        share = result.exit_shares[name]
        assert f"{name} {share:.0%}" in page
        assert page.count(f"background:{colour(index, 3)}") == 1 + (result.exits == index).sum()
    assert page.count("<div") == page.count("</div>") == 2
    assert page.count("<span") == page.count("</span>") == 1 + 20 + 3


def test_ansi(model, tokenizer):
    result = generate(
        model, "V\x1b[31m", tokenizer=tokenizer, temperature=2.0, seed=1, max_new_tokens=60
    )
    shown = result.to_ansi()
    plain = re.sub(r"\x1b\[(30;48;2;\d+;\d+;\d+|0)m", "", shown)
    assert "\x1b" not in plain
    assert plain.startswith("V\ufffd[31m")
    assert "mean depth" in plain
    assert all(name in plain for name in result.exit_names)
    assert shown.count("m") >= shown.count("\x1b")
    assert not result.to_ansi(prompt=False).startswith("V\ufffd")
    # Each colour is switched off again in its line.
    for line in shown.split("\n"):
        assert line.count("\x1b[30") == line.count("\x1b[0m")


@pytest.mark.parametrize(
    "match, settings",
    [
        (
            r"threshold is invalid \(expected a number from 0 to 1, got 7\); 1 never",
            {"threshold": 7},
        ),
        ("threshold is invalid", {"threshold": float("nan")}),
        ("threshold is invalid", {"threshold": "high"}),
        ("threshold is invalid", {"threshold": True}),
        (r"one for each of the model's 2 early exits, got 3", {"threshold": [0.5] * 3}),
        ("threshold has the wrong length", {"threshold": [0.5], "active_exits": [0]}),
        (
            r"active_exits names exit 2.*0 after layer 1, 1 after layer 3, got 2",
            {"threshold": 0.5, "active_exits": [0, 2]},
        ),
        ("active_exits repeats an exit .*got 1", {"threshold": 0.5, "active_exits": [1, 0, 1]}),
        ("active_exits is invalid", {"threshold": 0.5, "active_exits": 1}),
        ("active_exits is invalid", {"threshold": 0.5, "active_exits": [-1]}),
        ("active_exits has no effect without threshold", {"active_exits": [1]}),
        ('no effect with engine "full".*deferred', {"engine": "full", "active_exits": [0]}),
        ('no effect with engine "full".*got 0.5', {"engine": "full", "threshold": 0.5}),
        ("no exit may draft .*got 1, 1", {"engine": "speculative", "threshold": 1.0}),
        ("no exit may draft", {"engine": "speculative", "active_exits": []}),
        ("engine is invalid .*deferred, full, recompute, spec.*got 'fast'", {"engine": "fast"}),
        ("dtype is invalid", {"dtype": "int3"}),
        ("max_new_tokens is invalid", {"max_new_tokens": 0}),
        ("max_new_tokens is invalid", {"max_new_tokens": 1.5}),
        ("temperature is invalid", {"temperature": -1}),
        ("top_k is invalid", {"top_k": -1}),
        ("top_p is invalid", {"top_p": 0}),
        ("seed is invalid", {"seed": -1}),
        ("n is invalid", {"n": 0}),
        ("max_deferred is invalid", {"max_deferred": 5000}),
        ("max_deferred is invalid", {"max_deferred": 0, "engine": "speculative"}),
        ("top_k has no effect with temperature 0.*set temperature", {"top_k": 5}),
        ("top_p has no effect with temperature 0", {"top_p": 0.9}),
        ("min_p has no effect with temperature 0", {"min_p": 0.1}),
        ("min_p is invalid", {"min_p": 1.5, "temperature": 1}),
        ("repetition_penalty is invalid", {"repetition_penalty": 0}),
        ("presence_penalty is invalid", {"presence_penalty": float("inf")}),
        ("frequency_penalty is invalid", {"frequency_penalty": "much"}),
        (
            "min_new_tokens is too large .*at most max_new_tokens, 4, got 5",
            {"min_new_tokens": 5, "max_new_tokens": 4},
        ),
        ("min_new_tokens is invalid", {"min_new_tokens": -1}),
        ("logit_bias is invalid .*mapping", {"logit_bias": [1, 2]}),
        ("a token of logit_bias is invalid .*tokens from 0 to", {"logit_bias": {9999: 1.0}}),
        ("a token of logit_bias is invalid", {"logit_bias": {"a": 1.0}}),
        ("logit_bias of token 3 is invalid", {"logit_bias": {3: None}}),
        ("stop needs a tokenizer .*stop_token_ids", {"stop": "x"}),
        ("stop has an empty text", {"stop": ["x", ""]}),
        ("all_confidences is invalid", {"all_confidences": 1}),
        ("full_depth_logprobs is invalid", {"full_depth_logprobs": "yes"}),
        ("add_bos is invalid", {"add_bos": 1}),
        ("cache_tokens is invalid", {"cache_tokens": 0}),
        ("max_sequences is invalid", {"max_sequences": 0}),
        ("stop_token_ids is invalid .*got 9999", {"stop_token_ids": [9999]}),
        ("stop_token_ids is invalid", {"stop_token_ids": 5}),
    ],
)
def test_wrong_settings(model, match, settings):
    with pytest.raises(ValueError, match=match):
        generate(model, [1, 2], **settings)


@pytest.mark.parametrize(
    "match, prompts",
    [
        ("prompts is empty", []),
        ("prompt 0 has no tokens", [[]]),
        ("prompt 1 is too long .*96 tokens.* got 97", [[1], [1] * 97]),
        (r"the prompt has tokens outside the vocabulary .* got 1 to 5000\)", [1, 5000]),
        ("outside the vocabulary", [-1, 3]),
        ("list of integers", [[1.5, 2]]),
        ("prompts is invalid", 5),
    ],
)
def test_wrong_prompts(model, match, prompts):
    with pytest.raises(ValueError, match=match):
        generate(model, prompts)


def test_text_needs_a_tokenizer(model):
    with pytest.raises(FileNotFoundError, match="load_tokenizer"):
        generate(model, "text")


def test_thresholds_need_exits():
    config = ModelConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    plain = Model.from_config(config, threads=1)
    with pytest.raises(ValueError, match=r"model without.*from_pretrained\(path, exits"):
        generate(plain, [1], threshold=0.5)
    assert generate(plain, [1], threshold=1.0, max_new_tokens=2).exit_shares == {"final": 1.0}
    full = generate(plain, [1], engine="full", max_new_tokens=2, all_confidences=True)
    assert full.exit_confidences.shape == (2, 1)
    for engine in ("recompute", "speculative"):
        with pytest.raises(ValueError, match=f'engine "{engine}" cannot serve .*exits='):
            generate(plain, [1], engine=engine)
    with pytest.raises(ValueError, match=r"active_exits names exit 0.*no early exits"):
        generate(plain, [1], threshold=1.0, active_exits=[0])


def test_an_unknown_setting_names_the_nearest(model):
    with pytest.raises(TypeError, match=r"unknown setting tempertaure .*did you mean temperature"):
        generate(model, [1], tempertaure=1.0)


def test_the_signature_shows_all_settings():
    fields = set(Settings.__dataclass_fields__)
    for function in (generate, Generator.generate, Generator.stream):
        parameters = inspect.signature(function).parameters
        assert fields < set(parameters) and "settings" not in parameters
        assert parameters["max_new_tokens"].default == 128
    assert all(name in Settings.__doc__ for name in fields)


def test_engines_give_the_same_text(model):
    """deferred and recompute with the same threshold; speculative and full."""
    generator = Generator(model)
    for sampled in ({}, {"temperature": 0.8, "top_k": 20, "seed": 2}):
        options = {"max_new_tokens": 40, **sampled}
        early = [
            generator.generate([3, 4], engine=engine, threshold=[0.5, 0.4], **options)
            for engine in ("deferred", "recompute")
        ]
        assert np.array_equal(early[0].tokens, early[1].tokens)
        assert np.array_equal(early[0].exits, early[1].exits)
        assert early[0].confidences.tobytes() == early[1].confidences.tobytes()
    full = generator.generate([3, 4], engine="full", max_new_tokens=40)
    before = generator.stats
    for settings in ({}, {"threshold": 0.1}, {"active_exits": [1]}, {"max_deferred": 9}):
        found = generator.generate([3, 4], engine="speculative", max_new_tokens=40, **settings)
        assert np.array_equal(found.tokens, full.tokens), settings
        assert found.logprobs.tobytes() == full.logprobs.tobytes()
    assert generator.stats["drafts"] > before["drafts"]
    assert generator.stats["accepted"] > before["accepted"]


@pytest.mark.parametrize(
    ("layers", "wanted"), [([4, 8, 12], 1), ([2], 0), ([1, 3], 1), ([9, 15], 0), ([1, 9], 1)]
)
def test_the_exit_nearest_to_half_depth_drafts(layers, wanted):
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=16, num_attention_heads=2,
        exits=[ExitConfig(layer) for layer in layers],
    )  # fmt: skip
    found = Settings(engine="speculative").thresholds(config)
    assert [value < 1 for value in found] == [i == wanted for i in range(len(layers))]
    chosen = Settings(engine="speculative", active_exits=[0]).thresholds(config)
    assert [value < 1 for value in chosen] == [i == 0 for i in range(len(layers))]


def test_penalties_and_bias(model):
    """Greedy text against a search with the formulas on logits of the whole text."""
    options = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {9: 2.0, 11: -100.0},
    }
    result = generate(model, [5, 6, 7], max_new_tokens=30, **options)
    tokens = [5, 6, 7]
    for token in result.tokens.tolist():
        logits = model.forward(tokens)[-1, 0, -1].astype(np.float64)
        for biased, value in options["logit_bias"].items():
            logits[biased] += value
        for each in set(tokens):
            logits[each] = logits[each] / 1.3 if logits[each] > 0 else logits[each] * 1.3
        for each in set(tokens[3:]):
            logits[each] -= 0.4 + 0.3 * tokens[3:].count(each)
        order = np.sort(logits)
        assert logits.argmax() == token or order[-1] - order[-2] < 1e-4
        tokens.append(token)
    assert result.tokens.tolist() != generate(model, [5, 6, 7], max_new_tokens=30).tokens.tolist()


def test_a_budget_of_cache_makes_texts_wait(model):
    prompts = [[i, i + 1] for i in range(6)]
    options = {"max_new_tokens": 30, "threshold": 0.4}
    wanted = generate(model, prompts, **options)
    generator = Generator(model, max_sequences=6, cache_tokens=128, max_length=96)
    found = generator.generate(prompts, **options)
    assert [f.tokens.tolist() for f in found] == [w.tokens.tolist() for w in wanted]
    assert [s.losses.tolist() for s in generator.score(prompts)] == [
        s.losses.tolist() for s in Generator(model).score(prompts)
    ]
    small = Generator(model, cache_tokens=69)
    for call, match in (
        (
            partial(small.generate, max_new_tokens=30),
            r"too small for prompt 1 .*96 at least.*got 69",
        ),
        (small.score, r"too small for text 1 .*70 at least.*got 69"),
    ):
        with pytest.raises(ValueError, match=match):
            call([[1] * 2, [1] * 70])
    with pytest.raises(ValueError, match=r"too small for the prompt .*32 at least.*got 31"):
        generate(model, [1, 2], max_new_tokens=30, cache_tokens=31)
    assert generate(model, [1, 2], max_new_tokens=30, cache_tokens=32).finish == "length"


def test_logits_that_are_not_finite_end_the_call_alone(tokenizer):
    config = ModelConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, exits=[ExitConfig(1)],
    )  # fmt: skip
    model = Model.from_config(config, threads=1)
    fill(model.core, 1)
    model.parameter("model.embed_tokens.weight")[7] = np.nan
    generator = Generator(model)
    banned = {"logit_bias": {7: -1000.0}, "max_new_tokens": 8}
    wanted = generator.generate([[1], [2]], **banned)
    for call in (generator.generate, generator.score):
        with pytest.raises(_core.NonFiniteError):
            call([[1, 2], [7, 2], [3, 4], [7, 3]])
        assert generator._engine.active == 0
        again = generator.generate([[1], [2]], **banned)
        assert [a.tokens.tolist() for a in again] == [w.tokens.tolist() for w in wanted]


def test_nothing_is_left_behind(model):
    live = _core.alloc_stats()[1]
    generate(model, [[1, 2], [3]], **SETTINGS)
    generator = Generator(model)
    ready = _core.alloc_stats()[1]
    iterator = generator.stream([[1, 2], [3]], max_new_tokens=9)
    next(iterator)
    assert _core.alloc_stats()[1] > ready
    iterator.close()
    del iterator, generator
    assert _core.alloc_stats()[1] == live


def test_a_generator_serves_many_calls(model):
    generator = Generator(model, max_sequences=2, max_length=40)
    for prompts in ([[1, 2], [3], [4, 5, 6]], [[7]]):
        for threshold in (0.3, 1.0):
            options = {"threshold": threshold, "max_new_tokens": 9}
            found = generator.generate(prompts, **options)
            wanted = generate(model, prompts, **options)
            assert [f.tokens.tolist() for f in found] == [w.tokens.tolist() for w in wanted]
    # An iterator that was left, an exception and a wrong call leave the generator usable.
    next(generator.stream([[1, 2], [3]], max_new_tokens=9))

    def stop(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate([[1, 2], [3], [4]], stream=stop)
    with pytest.raises(ValueError, match=r"prompt 1 is too long .*at most 40 tokens, got 41"):
        generator.generate([[1], [1] * 41])
    assert generator._engine.active == 0
    assert generator.generate([1, 2], max_new_tokens=3).finish == "length"
    first = generator.stream([1, 2], max_new_tokens=9)
    next(first)
    with pytest.raises(_core.BusyError, match="in use; finish or close"):
        generator.generate([3])
    with pytest.raises(_core.BusyError, match="in use"):
        generator.score([3, 4])
    first.close()
    with pytest.raises(ValueError, match="max_length is invalid"):
        Generator(model, max_length=97)


def test_ctrl_c_in_the_middle(model):
    generator = Generator(model, max_sequences=2)
    options = {"max_new_tokens": 90, "threshold": 0.4}
    wanted = generator.generate([[1], [2], [3]], **options)
    for delay in (0.0, 0.001, 0.01, 0.05):
        timer = threading.Timer(delay, _thread.interrupt_main)
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                generator.generate([[1], [2], [3]], **options)
        timer.join()
        again = generator.generate([[1], [2], [3]], **options)
        assert [a.tokens.tolist() for a in again] == [w.tokens.tolist() for w in wanted]


# -- Against Transformers --


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="torch is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def _theirs(model, prompt, count, **options):
    import torch

    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found[0, len(prompt) :].tolist()


EXITS = [ExitConfig(1, head="norm"), ExitConfig(2, head="mlp")]
SPECULATIVE = {"engine": "speculative", "threshold": 0.2}


@pytest.mark.parametrize("family", ["GPT2", "LLAMA"])
def test_greedy_text_is_that_of_transformers(transformers, family, tmp_path):
    """Random models; with end tokens, a minimum length, a penalty and biases."""
    import torch

    from tests.model import oracle

    kind = {"GPT2": transformers.GPT2Config, "LLAMA": transformers.LlamaConfig}[family]
    theirs = oracle.random_model(torch, kind(**getattr(oracle, family)), seed=3, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = Generator(Model.from_pretrained(tmp_path, exits=EXITS, threads=1))
    prompts = [[3, 9, 4], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
    end = _theirs(theirs, prompts[0], 30)[12]
    bias = {5: 2.0, 9: -3.0}
    theirs_bias = {"sequence_bias": {(token,): value for token, value in bias.items()}}
    cases = [
        ({}, {}),
        ({"stop_token_ids": [2, end]}, {"eos_token_id": [2, end]}),
        ({"stop_token_ids": [2, end], "min_new_tokens": 15},
         {"eos_token_id": [2, end], "min_new_tokens": 15}),
        ({"logit_bias": bias}, theirs_bias),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
    ]  # fmt: skip
    ended = []
    for settings, options in cases:
        wanted = [_theirs(theirs, prompt, 30, **options) for prompt in prompts]
        ended.append(sum(len(tokens) < 30 for tokens in wanted))
        for engine in ({"engine": "full"}, {"threshold": 1.0}, SPECULATIVE):
            found = ours.generate(prompts, max_new_tokens=30, **engine, **settings)
            assert [each.tokens.tolist() for each in found] == wanted, (settings, engine)
            reasons = ["stop" if len(tokens) < 30 else "length" for tokens in wanted]
            assert [each.finish for each in found] == reasons
    assert ended[1] > 0


def _compare_with_transformers(folder, prompts, engines):
    from tests.model import oracle

    theirs = oracle.load(folder)
    ours = Generator.from_pretrained(folder)
    tokens = [ours.tokenizer.encode(prompt, add_bos=add).tolist() for prompt, add in prompts]
    wanted = [
        _theirs(theirs, each, 64, eos_token_id=list(ours.config.eos_token_ids)) for each in tokens
    ]
    for engine in engines:
        found = ours.generate(tokens, max_new_tokens=64, **engine)
        assert [each.tokens.tolist() for each in found] == wanted, engine
        for each in found:
            whole = np.concatenate([each.prompt_tokens, each.tokens])
            assert each.prompt_text + each.text == ours.tokenizer.decode(whole)


def test_a_real_model_writes_as_in_transformers(transformers, real_models):
    prompts = ["def read(self, ", "import os\nimport ", "class Parser:\n    def __init__("]
    engines = ({"engine": "full"}, {}, SPECULATIVE, {"engine": "speculative"})
    _compare_with_transformers(
        real_models("code16"), [(prompt, False) for prompt in prompts], engines
    )


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("stories260K/stories260K.bin", "stories260K/tok512.model")],
)
def test_small_llamas_write_as_in_transformers(
    transformers, real_models, name, tokenizer, tmp_path
):
    convert(real_models(name), tmp_path / "model", real_models(tokenizer))
    prompts = [("", True), ("One day, Lily", True), ("The dog was", True)]
    _compare_with_transformers(tmp_path / "model", prompts, ({"engine": "full"}, {}))
