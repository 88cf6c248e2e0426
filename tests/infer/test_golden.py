"""Real models decode what others' programs decoded from them."""

import json

import numpy as np
import pytest

from eellm import _core
from eellm.files import llama2c
from eellm.model import Model
from tests.infer.models import drain, run, same


@pytest.mark.parametrize(
    "name, file", [("stories260K", "stories260K"), ("babyllama361", "model5000")]
)
def test_llama2c(real_models, name, file):
    """The greedy text from the start token, as the original C program writes it."""
    read = llama2c.read(real_models(f"{name}/{file}.bin"))
    golden = json.loads(real_models(f"{name}/{file}.golden.json").read_text())
    core = _core.Model(read.config.to_core())
    for key, values in read.tensors.items():
        np.asarray(core.parameter(key))[...] = values
    ids = golden["greedy_ids_from_bos"]
    events = run(core, ids[:1], len(ids) - 1)
    assert events["token"].tolist() == ids[1:]
    first = golden["logits_pos0_first8"]
    # log-probabilities differ from logits by one number.
    singles = [run(core, ids[:1], 1, temperature=1.0, top_k=1)["logprob"][0]]
    assert singles[0] == events["logprob"][0]
    logits = np.empty((1, 1, 1, read.config.vocab_size), np.float32)
    core.forward(np.array([ids[:1]], np.int32), logits)
    assert np.abs(logits[0, 0, 0, :8] - first).max() < 1e-4 * np.abs(first).max()


@pytest.fixture(scope="module")
def code16(real_models):
    model = Model.from_pretrained(real_models("code16"))
    return model, json.loads(real_models("code16/golden.json").read_text())


def _check(events, wanted, layers):
    assert events["token"].tolist() == wanted["tokens"]
    assert [layers[e] for e in events["exit"]] == wanted["exit_layers"]
    # Confidences stand there with six digits; PyTorch's float32 rounds as ours does.
    last = np.array([row[-1] for row in wanted["confidences"]])
    assert np.abs(events["confidence"] - last).max() < 5e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_code16(code16, dtype):
    """Greedy text, exits and confidences at three thresholds, alone and all at once."""
    model, golden = code16
    layers = [each.layer for each in model.config.exits] + [model.config.num_hidden_layers]
    runs = golden["runs"]
    assert [each["threshold"] for each in runs] == [1.0, 0.9, 0.6]
    prompt = np.array(golden["prompt"], np.int32)
    engine = _core.Engine(model.core, max_sequences=len(runs), dtype=dtype)
    numbers = [
        engine.add(prompt, max_new_tokens=128, thresholds=[each["threshold"]]) for each in runs
    ]
    together = drain(engine, numbers)
    for events, wanted in zip(together, runs, strict=True):
        _check(events, wanted, layers)
        settings = {"thresholds": [wanted["threshold"]], "dtype": dtype}
        assert same(run(model.core, prompt, 128, **settings), events)
    assert not np.array_equal(together[0]["exit"], together[2]["exit"])
