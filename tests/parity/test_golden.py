"""The same comparison from a committed file, so that parity is checked without PyTorch too."""

import numpy as np
import pytest

from eellm import _core
from tests.parity.cases import FILE, GOLDEN, GOLDEN_STEPS, B, M, T, batch, golden_weights, randomise


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as arrays:
        return dict(arrays)


def model_and_trainer(case):
    config = GOLDEN[case]
    core = _core.Model(config, 2)
    randomise(core)
    return config, core, _core.Trainer(core, rows=B * T, microbatches=M)


# Rounding of float32 through these models, relative to the largest value of a tensor: test_parity
# derives the bound against PyTorch; here 64 roundings cover it, and any wrong term exceeds it.
LIMIT = 64 * 2.0**-24


def check(ours, exact):
    assert np.abs(np.asarray(ours) - exact).max() <= LIMIT * np.abs(exact).max()


@pytest.mark.parametrize("case", GOLDEN)
def test_logits(golden, case):
    config, core, _ = model_and_trainer(case)
    tokens = batch(config)["tokens"][0].reshape(2, -1)
    out = np.empty((len(config["exits"]) + 1, *tokens.shape, config["vocab_size"]), np.float32)
    core.forward(tokens, out)
    check(out[:, :, -1], golden[f"{case}/logits"])


@pytest.mark.parametrize("case", GOLDEN)
def test_gradients(golden, case):
    config, core, trainer = model_and_trainer(case)
    weights = golden_weights(config)
    trainer.step(*batch(config).values(), exit_weights=weights, learning_rate=0, update=False)
    scale = max(np.abs(golden[f"{case}/gradient/{row['name']}"]).max() for row in core.table)
    for row in core.table:
        exact = golden[f"{case}/gradient/{row['name']}"]
        limit = LIMIT * max(np.abs(exact).max(), 1e-2 * scale)
        assert np.abs(np.asarray(trainer.gradient(row["name"])) - exact).max() <= limit, row["name"]


@pytest.mark.parametrize("case", GOLDEN)
def test_ten_steps(golden, case):
    config, _, trainer = model_and_trainer(case)
    weights = golden_weights(config)
    for i, exact in enumerate(golden[f"{case}/steps"]):
        data = batch(config, 10 + i).values()
        result = trainer.step(*data, exit_weights=weights, **GOLDEN_STEPS)
        np.testing.assert_allclose(result["losses"], exact, rtol=2e-5)


def test_a_changed_parameter_fails(golden):
    """Negative control."""
    config, core, _ = model_and_trainer("llama")
    np.asarray(core.parameter("model.layers.2.mlp.up_proj.weight"))[0, 0] += 1e-2
    tokens = batch(config)["tokens"][0].reshape(2, -1)
    out = np.empty((len(config["exits"]) + 1, *tokens.shape, config["vocab_size"]), np.float32)
    core.forward(tokens, out)
    with pytest.raises(AssertionError):
        check(out[:, :, -1], golden["llama/logits"])
