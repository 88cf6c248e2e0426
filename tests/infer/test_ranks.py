"""Generators of several ranks: what `Generator` and `generate` give, and when their threads end."""

import gc
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

from eellm.config import ExitConfig, ModelConfig
from eellm.data import train_bpe
from eellm.decode import Generator, generate
from eellm.decode.pipeline import part_of, threads_of
from eellm.decode.replay import latencies, replay_ranks
from eellm.model import Model
from tests.infer.models import fill

TEXT = "Zwölf Boxkämpfer jagen Viktor über den Deich. naïve 😀 いろは\n" * 30
SETTINGS = {"max_new_tokens": 24, "threshold": 0.4}


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


def _servers():
    return [each for each in threading.enumerate() if each.name.startswith("rank ")]


def _equal(result, other):
    assert result.tokens.tolist() == other.tokens.tolist()
    assert result.exits.tolist() == other.exits.tolist()
    for name in ("confidences", "logprobs", "exit_confidences", "exit_tokens"):
        assert getattr(result, name).tobytes() == getattr(other, name).tobytes()
    assert (result.text, result.pieces, result.finish) == (other.text, other.pieces, other.finish)
    mine, theirs = result.full_depth_logprobs, other.full_depth_logprobs
    assert (mine is None) == (theirs is None)
    assert mine is None or mine.tobytes() == theirs.tobytes()


CALLS = [
    {},
    {"n": 3, "temperature": 0.8, "top_p": 0.9, "seed": 5},
    {"full_depth_logprobs": True, "all_confidences": True},
    {"stop": ["e", "Ω"], "full_depth_logprobs": True},
    {"stop": "der", "min_new_tokens": 5},
    {"threshold": (0.0, 1.0), "repetition_penalty": 1.3, "stop_token_ids": [3, 4, 5]},
    {"threshold": None},
]


@pytest.mark.parametrize("call", CALLS)
def test_the_texts_of_one_rank(model, tokenizer, call):
    prompts, settings = ["Zwölf", "naïve 😀", "V"], {**SETTINGS, **call}
    wanted = generate(model, prompts, tokenizer=tokenizer, engine="deferred", **settings)
    for ranks in (2, 4):
        found = generate(model, prompts, tokenizer=tokenizer, ranks=ranks, **settings)
        for one, other in zip(found, wanted, strict=True):
            _equal(one, other)
    assert not _servers()


def test_one_generator_for_many_calls(model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    wanted = generate(model, "Zwölf", tokenizer=tokenizer, **SETTINGS)
    full = generate(model, "Zwölf", tokenizer=tokenizer, engine="full", max_new_tokens=24)
    options = {"tokenizer": tokenizer, "ranks": 3, "split": (1, 2, 1), "max_sequences": 2}
    for make in (
        lambda: Generator(model, **options),
        lambda: Generator.from_pretrained(folder, threads=3, **options),
    ):
        with closing(make()) as generator:
            _equal(generator.generate("Zwölf", **SETTINGS), wanted)
            _equal(generator.generate("Zwölf", engine="full", max_new_tokens=24), full)
            pieces = generator.stream("Zwölf", **SETTINGS)
            begun = [next(pieces) for _ in range(3)]
            pieces.close()
            assert begun[0].exit == wanted.exits[0]
            for result in generator.generate(["Zwölf"] * 5, **SETTINGS):
                _equal(result, wanted)
            assert len(_servers()) == 2
            with pytest.raises(NotImplementedError, match="spread over 3 ranks"):
                generator.score("Zwölf")
            with pytest.raises(NotImplementedError, match="spread over 3 ranks"):
                generator.generate("Zwölf", engine="recompute", **SETTINGS)
            _equal(generator.generate("Zwölf", **SETTINGS), wanted)
        assert not _servers()
        with pytest.raises(ValueError, match="has been stopped"):
            generator.generate("Zwölf", **SETTINGS)
        generator.close()


def test_a_dropped_generator_ends_its_threads(model, tokenizer):
    generator = Generator(model, tokenizer=tokenizer, ranks=2)
    pieces = generator.stream("Zwölf", **SETTINGS)
    next(pieces)
    assert len(_servers()) == 1
    del generator, pieces
    gc.collect()
    assert not _servers()


def test_the_interpreter_ends(tmp_path, model):
    """Although nobody closed the generator, and a stream is half read."""
    model.save_pretrained(tmp_path / "model")
    text = (
        "from eellm.decode import Generator\n"
        f"g = Generator.from_pretrained({str(tmp_path / 'model')!r}, ranks=3)\n"
        "s = g.stream([5, 6], max_new_tokens=50, threshold=0.0)\n"
        "print(next(s).token >= 0, flush=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "True\n"), ended.stderr


def test_what_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"at most the model's 4 layers, got 5"):
        Generator(model, ranks=5)
    with pytest.raises(ValueError, match=r"ranks is invalid \(expected an integer from 1"):
        Generator(model, ranks=0)
    with pytest.raises(ValueError, match=r'engine "deferred" runs on one rank'):
        Generator(model, ranks=2, engine="deferred")
    with pytest.raises(ValueError, match=r'engine "speculative" runs on one rank'):
        generate(model, [1], ranks=2, engine="speculative")
    with pytest.raises(ValueError, match="engine"):
        Generator(model, engine="fast")
    for split in ((2, 3), (4,), (0, 4), (1, 1, 2)):
        with pytest.raises(ValueError, match=r"(split|layers of a chunk) is invalid"):
            Generator(model, ranks=2, split=split)
    assert not _servers()
    # One rank takes the engine too.
    one = Generator(model, tokenizer=tokenizer, engine="pipeline")
    wanted = generate(model, "Zwölf", tokenizer=tokenizer, **SETTINGS)
    _equal(one.generate("Zwölf", **SETTINGS), wanted)


def test_splits(model):
    config = model.config
    assert part_of(config, 1, 0) is None
    assert part_of(config, 2, 1)[3].tolist() == [0, 2, 4]
    assert part_of(config, 3, 1, [1, 1, 2])[3].tolist() == [0, 1, 2, 4]
    assert threads_of(8, 3) == 2 and threads_of(1, 4) == 1 and threads_of(0, 1) == 0


def test_traces(model, tokenizer):
    generator = Generator(model, tokenizer=tokenizer, ranks=2, trace=100)
    result = generator.generate("Zwölf", **SETTINGS)
    generator.close()
    traces = generator.traces()
    assert [numbers[0, 3:5].tolist() for _, numbers in traces] == [[0, 2], [2, 4]]
    decided = [numbers[:, 5][numbers[:, 5] >= 0].tolist() for _, numbers in traces]
    assert len(decided[0]) + len(decided[1]) == len(result.tokens)
    for seconds, numbers in traces:
        told = np.isfinite(seconds[:, 2])
        assert np.array_equal(told, numbers[:, 5] >= 0)
        assert (seconds[:, 0] <= seconds[:, 1]).all()
        assert (seconds[told, 0] <= seconds[told, 2]).all()


def test_replayed_latencies():
    """Tokens take the time to their exit, and not that of the whole pipeline; the bound is loose,
    as the machine may be busy: benchmarks measure it."""
    servers = replay_ranks(3, 0.01, hidden_size=64)
    exits = [0, 0, 0, 2, 1, 0, 0, 2, 2, 1, 1, 0]
    seconds = np.array(latencies(servers.engines[0], exits))
    wanted = 0.01 * (np.array(exits) + 1)
    assert (seconds >= 0.95 * wanted).all()
    assert np.median(seconds / wanted) < 1.5
    servers.close()
