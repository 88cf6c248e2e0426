"""Small models, trainers and steps that the tests of the boundary share."""

import numpy as np

from eellm import _core
from tests.parity.cases import HEADS, B, M, T, base_config, batch, gpt2_config, randomise

CONFIG = base_config(exits=HEADS["norm"])
CONFIGS = {
    **{f"llama_{head}": base_config(exits=exits) for head, exits in HEADS.items()},
    "gpt2_mixed": gpt2_config(exits=HEADS["mixed"]),
    "dropout": base_config(
        exits=HEADS["mlp"],
        embedding_dropout=0.1,
        attention_dropout=0.1,
        residual_dropout=0.1,
    ),
}


def make_model(config=CONFIG, threads=1):
    model = _core.Model(config, threads)
    randomise(model)
    return model


def make_trainer(model, **changes):
    return _core.Trainer(model, **{"rows": B * T, "microbatches": M, **changes})


def make(config=CONFIG, threads=1, **changes):
    """A model with drawn parameters, and a trainer of it."""
    model = make_model(config, threads)
    return model, make_trainer(model, **changes)


def settings(config=CONFIG, **changes):
    """Keywords of Trainer.step."""
    weights = [0.5] * len(config["exits"])
    return {"exit_weights": weights, "learning_rate": 1e-3, "clip": 1.0, **changes}


def run_step(trainer, config=CONFIG, data=None, **changes):
    return trainer.step(*(data or batch(config)).values(), **settings(config, **changes))


def values_of(model, view=None):
    """A copy of every parameter, or of what `view` (e.g. trainer.gradient) shows of it."""
    view = view or model.parameter
    return {row["name"]: np.array(view(row["name"])) for row in model.table}


def equal(left, right):
    """Whether two results of values_of are equal to the bit."""
    return left.keys() == right.keys() and all(
        left[name].tobytes() == right[name].tobytes() for name in left
    )
