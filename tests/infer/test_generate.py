"""What `generate` gives, and what it says about wrong calls."""

import re

import numpy as np
import pytest

from eellm import _core
from eellm.config import ExitConfig, ModelConfig
from eellm.data import train_bpe
from eellm.decode import Generator, generate
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
    together = generate(model, prompts, tokenizer=tokenizer, samples=2, max_sequences=3, **options)
    assert [(r.prompt, r.sample) for r in together] == [(i, s) for i in range(5) for s in (0, 1)]
    for i, prompt in enumerate(prompts):
        alone = generate(model, prompt, tokenizer=tokenizer, samples=2, **options)
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


def test_stop_tokens(model, tokenizer):
    tokens = generate(model, [5, 6, 7], **SETTINGS).tokens.tolist()
    stop = tokens[6]
    result = generate(model, [5, 6, 7], stop_tokens=[stop], **SETTINGS)
    assert result.tokens.tolist() == tokens[: tokens.index(stop) + 1]
    assert result.finish == "stop"


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
        assert [next(iterator) for _ in range(9)] == pieces[:9]
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
        ("engine is invalid .*deferred, full, got 'fast'", {"engine": "fast"}),
        ("dtype is invalid", {"dtype": "int3"}),
        ("max_new_tokens is invalid", {"max_new_tokens": 0}),
        ("max_new_tokens is invalid", {"max_new_tokens": 1.5}),
        ("temperature is invalid", {"temperature": -1}),
        ("top_k is invalid", {"top_k": -1}),
        ("top_p is invalid", {"top_p": 0}),
        ("seed is invalid", {"seed": -1}),
        ("samples is invalid", {"samples": 0}),
        ("max_deferred is invalid", {"max_deferred": 5000}),
        ("max_sequences is invalid", {"max_sequences": 0}),
        ("stop token 0 must lie", {"stop_tokens": [9999]}),
    ],
)
def test_wrong_settings(model, match, settings):
    with pytest.raises(ValueError, match=match):
        generate(model, [1, 2], **settings)


@pytest.mark.parametrize(
    "match, prompts",
    [
        ("prompts is empty", []),
        ("a prompt has no tokens", [[]]),
        ("prompt 1 is too long .*96 tokens.* got 97", [[1], [1] * 97]),
        (r"outside the vocabulary .* got 1 to 5000\)", [1, 5000]),
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
    with pytest.raises(ValueError, match="prompt has 41 tokens, the context holds 40"):
        generator.generate([[1], [1] * 41])
    assert generator._engine.active == 0
    assert generator.generate([1, 2], max_new_tokens=3).finish == "length"
    first = generator.stream([1, 2], max_new_tokens=9)
    next(first)
    with pytest.raises(_core.Error, match="in use; finish or close"):
        generator.generate([3])
    first.close()
    with pytest.raises(ValueError, match="max_length is invalid"):
        Generator(model, max_length=97)
