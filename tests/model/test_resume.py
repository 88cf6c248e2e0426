"""A checkpoint of a native model and trainer brings all of their state back."""

import numpy as np

from eellm import _core
from eellm.config import ModelConfig
from eellm.files import checkpoint
from eellm.model import Model

CONFIG = ModelConfig.llama(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=32,
    exits=[{"layer": 1, "head": "mlp", "output": "own"}],
)
ROWS = 16


def trainer_of(model):
    return _core.Trainer(model.core, rows=ROWS, microbatches=1)


def step(trainer, index):
    tokens = np.random.default_rng(index).integers(0, 40, (1, ROWS + 1)).astype(np.int32)
    return trainer.step(
        np.ascontiguousarray(tokens[:, :-1]),
        np.ascontiguousarray(tokens[:, 1:]),
        np.arange(ROWS, dtype=np.int32)[None],
        np.arange(ROWS, dtype=np.uint64)[None],
        np.array([0, ROWS], np.int32),
        np.array([1], np.int32),
        exit_weights=[0.3],
        learning_rate=1e-2,
    )


def everything(model, trainer):
    names = [row["name"] for row in model.core.table]
    return {
        (kind, name): np.array(of(name))
        for kind, of in (
            ("value", model.parameter),
            ("moment1", trainer.moment1),
            ("moment2", trainer.moment2),
        )
        for name in names
    }


def test_a_resumed_run_goes_on_to_the_bit(tmp_path):
    model = Model.from_config(CONFIG, seed=1, threads=2)
    trainer = trainer_of(model)
    for index in range(3):
        step(trainer, index)
    saved = everything(model, trainer)
    path = checkpoint.save_training(tmp_path, 3, CONFIG, model.core, trainer, {"seed": 5})
    later = [step(trainer, index)["losses"] for index in range(3, 6)]

    resumed = Model.from_config(CONFIG, seed=2, threads=2)
    again = trainer_of(resumed)
    state = checkpoint.load_training(checkpoint.latest(tmp_path), CONFIG, resumed.core, again)
    assert state["seed"] == 5 and state["step"] == state["adam_steps"] == again.steps == 3
    for key, value in everything(resumed, again).items():
        np.testing.assert_array_equal(value, saved[key], err_msg=str(key))
    assert any(np.abs(value).max() > 0 for key, value in saved.items() if key[0] == "moment2")
    np.testing.assert_array_equal([step(again, index)["losses"] for index in range(3, 6)], later)
    for key, value in everything(resumed, again).items():
        np.testing.assert_array_equal(value, everything(model, trainer)[key], err_msg=str(key))
    np.testing.assert_array_equal(
        Model.from_pretrained(path).parameter("lm_head.weight"), saved["value", "lm_head.weight"]
    )


def test_a_lost_moment_would_be_seen(tmp_path):
    """Negative control: without the second moments the run goes elsewhere."""
    model = Model.from_config(CONFIG, seed=1, threads=2)
    trainer = trainer_of(model)
    for index in range(3):
        step(trainer, index)
    checkpoint.save_training(tmp_path, 3, CONFIG, model.core, trainer, {})
    step(trainer, 3)
    expected = np.array(step(trainer, 4)["losses"])
    resumed = Model.from_config(CONFIG, threads=2)
    again = trainer_of(resumed)
    checkpoint.load_training(checkpoint.latest(tmp_path), CONFIG, resumed.core, again)
    np.asarray(again.moment2("lm_head.weight"))[...] *= 1.01
    step(again, 3)
    assert (np.array(step(again, 4)["losses"]) != expected).any()
