"""Stop strings against a search in the whole text: never half-shown, cut off, and where tokens and
characters are cut makes no difference."""

import codecs

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eellm.config import ExitConfig, ModelConfig
from eellm.data import load_tokenizer, train_bpe
from eellm.decode import Generator
from eellm.decode.stopping import TextStream
from eellm.model import Model
from tests.infer.models import fill

ALPHABET = "ab€é😀 "
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, with few merges: most characters beyond ASCII are several tokens."""
    return train_bpe(["ab ab €é aab 😀 bab € ab" * 20], 270)


def bytes_of(tokenizer):
    """The bytes of each token, from the table of GPT-2: printable ones stand for themselves."""
    table, spare = {}, 0
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        table[chr(byte if printable else 256 + spare)] = byte
        spare += not printable
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.eod_id}
    return {
        token: bytes(table[c] for c in tokenizer.id_to_token(token))
        for token in range(tokenizer.vocab_size)
        if token not in special
    }


def first_stop(text, stops, floor=0):
    """Where a text ends: before the stop string from `floor` on that is complete first, the longest
    of several; by trying every end and beginning."""
    for end in range(floor + 1, len(text) + 1):
        for begin in range(floor, end):
            if text[begin:end] in stops:
                return begin
    return None


def run(decoder, tokens, stops, minimum=0):
    """(the stream at its end, what was certain after each token)."""
    stream = TextStream(decoder, stops, minimum)
    shown = []
    for token in tokens:
        stream.put(token)
        shown.append("".join(stream.pieces[: stream.certain]))
        if stream.stopped:
            return stream, shown
    stream.finish()
    return stream, shown


def check(make, tokens, stops, minimum=0):
    """make: makes a decoder. Compares with a search in the text that comes without stops."""
    plain, _ = run(make(), tokens, ())
    whole, starts = "".join(plain.pieces), np.cumsum([0, *map(len, plain.pieces)])
    floor = int(starts[min(minimum, len(tokens))])
    stream, shown = run(make(), tokens, stops, minimum)
    text = "".join(stream.pieces)
    end = first_stop(whole, stops, floor)
    assert text == (whole if end is None else whole[:end])
    assert stream.stopped == (end is not None)
    assert stream.certain == len(stream.pieces)
    kept = len(tokens)
    if end is not None:
        kept = sum(i < minimum or start < end for i, start in enumerate(starts[:-1]))
    assert len(stream.pieces) == kept
    assert all(text.startswith(each) for each in shown)
    assert [*map(len, shown)] == sorted(map(len, shown))
    return plain, shown


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 269), max_size=30), STOPS, st.integers(0, 4))
def test_tokens_at_random(tokenizer, tokens, stops, minimum):
    """Most of such texts have bytes that are no characters."""
    check(tokenizer.stream, tokens, stops, minimum)


@settings(max_examples=800, deadline=None)
@given(st.text(ALPHABET, max_size=30), STOPS, st.integers(0, 9))
def test_real_text(tokenizer, text, stops, minimum):
    """Every token has the characters that end with it, and nothing waits without need."""
    tokens = tokenizer.encode(text).tolist()
    table, oracle = bytes_of(tokenizer), codecs.getincrementaldecoder("utf-8")()
    pieces = [oracle.decode(table[token]) for token in tokens]
    plain, shown = check(tokenizer.stream, tokens, stops, minimum)
    assert plain.pieces == pieces
    assert "".join(pieces) == text
    ends = np.cumsum([0, *map(len, pieces)])
    opened = {stop[:size] for stop in stops for size in range(1, len(stop))}
    for count, prefix in enumerate(shown, 1):
        so_far, floor = text[: ends[count]], ends[min(minimum, len(tokens))]
        if len(prefix) == len(so_far) or first_stop(so_far, stops, floor) is not None:
            continue
        # The first token that waits has a character that could belong to a stop string.
        waiting = next(i for i in range(count) if ends[i + 1] > len(prefix))
        places = range(ends[waiting + 1])
        assert any(so_far[place:] in opened for place in places), (so_far, prefix)


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1))
def test_one_character_a_token(text, stops):
    class Characters:
        def put(self, token):
            return token

        def finish(self):
            return ""

    check(Characters, list(text), stops)


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("abcd", ["cd", "bcd"], "a"),  # complete at once: the longest
        ("xabz", ["ab", "xabz"], "x"),  # complete first
        ("aab", ["ab"], "a"),
        ("ab" * 9, ["abab"], ""),
        ("abc", ["d"], "abc"),
        ("ab", ["abc"], "ab"),  # never completed
    ],
)
def test_examples(tokenizer, text, stops, wanted):
    stream, _ = run(tokenizer.stream(), tokenizer.encode(text).tolist(), stops)
    assert "".join(stream.pieces) == wanted


def test_a_stream_that_holds_nothing_back_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(TextStream, "_open", lambda self: 0)
    tokens = tokenizer.encode("b€ €").tolist()
    with pytest.raises(AssertionError):
        check(tokenizer.stream, tokens, ["€ €"])


def test_byte_tokens_of_sentencepiece(data):
    """Characters that the vocabulary lacks come byte by byte."""
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    llama = load_tokenizer(data / "tokenizers/llama2/tokenizer.model")
    text = "The 🦙 of 𒀀𒁀 said: 🦙🦖 ok"
    tokens = llama.encode(text).tolist()
    assert len(tokens) > len(text.split()) + 8
    for stops in (["🦖"], ["𒁀 s"], ["🦙🦖"], ["𒀀𒁀𒀀"], ["said", "𒁀"], [" ok"]):
        for minimum in (0, 3):
            check(lambda: llama.stream(), tokens, stops, minimum)


# -- Through the engine --


@pytest.fixture(scope="module")
def generator(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=96,
        exits=[ExitConfig(1, head="norm"), ExitConfig(3, head="mlp")],
    )
    model = Model.from_config(config, threads=1)
    fill(model.core, 5, scale=0.5)
    # Texts of few characters, of which many are stop strings.
    alphabet = set(tokenizer.encode(ALPHABET * 3).tolist())
    bias = {t: -1000.0 for t in range(tokenizer.vocab_size) if t not in alphabet}
    made = Generator(model, tokenizer=tokenizer, max_sequences=3)
    return made, {"logit_bias": bias, "temperature": 1.5, "max_new_tokens": 24}


ENGINES = {
    "full": {},
    "deferred": {"threshold": 0.1},
    "recompute": {"threshold": 0.1},
    "speculative": {"threshold": 0.02, "max_deferred": 6},
}


@pytest.mark.parametrize("full_depth", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines(generator, tokenizer, engine, full_depth):
    """The text is that without stop strings, cut; so are tokens, exits and numbers."""
    made, options = generator
    options = {
        "engine": engine,
        **options,
        **ENGINES[engine],
        "n": 6,
        "full_depth_logprobs": full_depth,
    }
    stopped = 0
    for seed, stops in enumerate([["a"], ["ab", "é"], ["€a", "b ", "😀"], ["aaaa"], ["  a"]]):
        for minimum in (0, 5):
            settings = {**options, "seed": seed, "min_new_tokens": minimum}
            whole = made.generate("ab", **settings)
            pieces = [[] for _ in whole]
            cut = made.generate(
                "ab", stop=stops, stream=lambda p, seen=pieces: seen[p.sample].append(p), **settings
            )
            quiet = made.generate("ab", stop=stops, **settings)
            for left, right, quietly, seen in zip(whole, cut, quiet, pieces, strict=True):
                stopped += _compare(left, right, stops, minimum)
                assert quietly.text == right.text
                assert np.array_equal(quietly.tokens, right.tokens)
                assert "".join(piece.text for piece in seen) == right.text
                assert [p.token for p in seen if p.token >= 0] == right.tokens.tolist()
                assert [bool(piece.done) for piece in seen] == [False] * (len(seen) - 1) + [True]
                assert seen[-1].done == right.finish
    assert stopped > 20
    assert made._engine.active == 0


def _compare(whole, cut, stops, minimum):
    floor = sum(map(len, whole.pieces[:minimum]))
    end = first_stop(whole.text, stops, floor)
    assert cut.text == (whole.text if end is None else whole.text[:end])
    assert cut.finish == ("length" if end is None else "stop")
    count = len(cut.tokens)
    assert count >= minimum
    for name in ("tokens", "exits", "confidences", "logprobs", "exit_tokens"):
        assert getattr(cut, name).tobytes() == getattr(whole, name)[:count].tobytes(), name
    if whole.full_depth_logprobs is None:
        assert cut.full_depth_logprobs is None
    else:
        assert np.isfinite(cut.full_depth_logprobs).all()
        wanted = whole.full_depth_logprobs[:count]
        assert cut.full_depth_logprobs.tobytes() == wanted.tobytes()
    return end is not None


def test_stop_strings_of_one_text_leave_the_others_alone(generator):
    made, options = generator
    prompts = ["ab", "€", "b b", "é", "😀a"]
    alone = [made.generate(prompt, stop=["a", "€€"], seed=3, **options) for prompt in prompts]
    together = made.generate(prompts, stop=["a", "€€"], seed=3, **options)
    assert [each.text for each in together] == [each.text for each in alone]
    assert {each.finish for each in together} >= {"stop"}


@pytest.mark.parametrize(
    ("stop", "match"),
    [
        ("", "stop has an empty text"),
        (["a", ""], "stop has an empty text"),
        (5, "stop is invalid .*a text or a list of texts, got 5"),
        ([b"a"], "stop is invalid"),
        ({"a": 1}, "stop is invalid"),
    ],
)
def test_wrong_stop_strings(generator, stop, match):
    with pytest.raises(ValueError, match=match):
        generator[0].generate("ab", stop=stop)
