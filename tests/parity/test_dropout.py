"""Dropout in the model: keyed, the same under recomputation, and with the right gradient."""

import numpy as np
import pytest

from eellm import _core
from tests.parity.cases import B, M, T, base_config, batch, exit_, gpt2_config, randomise

EXITS = [exit_(1), exit_(2, branch="mlp"), exit_(3, branch="block", output=-1)]
RATES = dict(embedding_dropout=0.1, attention_dropout=0.2, residual_dropout=0.15)
MODELS = {
    "llama": base_config(exits=EXITS, **RATES),
    "gpt2": gpt2_config(exits=EXITS, **RATES),
    "parallel": base_config(parallel_residual=True, exits=[exit_(1)], **RATES),
}


def run(config, seed=5, recompute="none", schedule="1f1b", move=None, threads=2):
    """Losses and gradients of one step; `move` displaces the parameters first."""
    core = _core.Model(config, threads)
    randomise(core)
    for name, direction in (move or {}).items():
        np.asarray(core.parameter(name))[...] += direction
    trainer = _core.Trainer(core, rows=B * T, microbatches=M, recompute=recompute,
                            schedule=schedule)  # fmt: skip
    data = batch(config)
    data["row_ids"] = np.arange(M * B * T, dtype=np.uint64).reshape(M, B * T)
    weights = [0.5] * len(config["exits"])
    result = trainer.step(*data.values(), exit_weights=weights, learning_rate=0, update=False,
                          dropout_seed=seed)  # fmt: skip
    gradients = {row["name"]: np.array(trainer.gradient(row["name"])) for row in core.table}
    total = result["losses"][-1] + 0.5 * sum(result["losses"][:-1])
    return total, gradients


@pytest.mark.parametrize("model", MODELS)
def test_recomputation_and_schedule_change_no_bit(model):
    _, expected = run(MODELS[model])
    for options in (dict(recompute="attention"), dict(recompute="full"), dict(schedule="gpipe")):
        _, found = run(MODELS[model], **options)
        assert all(np.array_equal(found[name], expected[name]) for name in expected), options


@pytest.mark.parametrize("model", MODELS)
def test_the_seed_decides(model):
    first, second, again = run(MODELS[model])[0], run(MODELS[model], 6)[0], run(MODELS[model])[0]
    assert first == again != second


@pytest.mark.parametrize("model", MODELS)
def test_gradient_is_that_of_the_loss_with_these_masks(model):
    """Central differences along random directions, the masks held fixed by their keys."""
    config = MODELS[model]
    _, gradients = run(config)
    rng = np.random.default_rng(3)
    for _ in range(3):
        direction = {n: rng.standard_normal(g.shape).astype(np.float32) for n, g in
                     gradients.items()}  # fmt: skip
        slope = sum(float((direction[n] * g).sum(dtype=np.float64)) for n, g in gradients.items())
        step = 1e-4
        up = run(config, move={n: step * d for n, d in direction.items()})[0]
        down = run(config, move={n: -step * d for n, d in direction.items()})[0]
        # Rounding of two losses near 10, and the third derivative's term.
        assert abs((up - down) / (2 * step) - slope) <= 2e-2 * max(abs(slope), 1.0)


def test_without_dropout_the_loss_differs():
    """Negative control: the rates do reach the model."""
    plain = dict(MODELS["gpt2"], embedding_dropout=0, attention_dropout=0, residual_dropout=0)
    assert run(plain)[0] != run(MODELS["gpt2"])[0]
    for rate in RATES:
        one = dict(plain, **{rate: 0.2})
        assert run(one)[0] != run(plain)[0], rate
