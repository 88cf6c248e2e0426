"""Gradients of pipelines against PyTorch's of the plain sum of losses in one process."""

import functools

import numpy as np
import pytest

from eellm import _core

torch = pytest.importorskip("torch")
from tests.parity.cases import CASES, HEADS, B, M, T, batch  # noqa: E402
from tests.parity.cases import MODELS as PARITY  # noqa: E402
from tests.parity.test_parity import reference_loss  # noqa: E402
from tests.train.pipeline.common import Layout, train, values_of  # noqa: E402
from tests.train.pipeline.oracle import errors, forward, gradients_of  # noqa: E402

LAYOUTS = {
    "two": Layout(2, 1, "1f1b"),
    "four": Layout(4, 1, "gpipe", earlier=True),
    "interleaved": Layout(2, 2, "interleaved", recompute="full"),
    "split": Layout(4, 1, "zero_bubble", defer=True),
    "inexact": Layout(4, 1, "1f1b", exact=False),
}


@functools.cache
def gradients_by_torch(model, heads):
    """(config, values, data, weights, {dtype: gradients})"""
    config = dict(PARITY[model], exits=HEADS[heads])
    values, data = values_of(config), batch(config)
    weights = [0.25 + 0.1 * e for e in range(len(config["exits"]))]
    found = {}
    for dtype in (torch.float32, torch.float64):
        leaves = {
            name: torch.tensor(value, dtype=dtype, requires_grad=True)
            for name, value in values.items()
        }
        reference_loss(config, leaves, data, weights)[0].backward()
        found[dtype] = {name: leaf.grad.numpy().astype(float) for name, leaf in leaves.items()}
    return config, values, data, weights, found


def worst(model, heads, layout, change=1.0):
    config, values, data, weights, found = gradients_by_torch(model, heads)
    weights = [weights[0] * change, *weights[1:]]
    outcome = train(config, values, layout, [data], exit_weights=weights, update=False)
    table = _core.Model(config, 1, weights=False).table
    shares = errors(table, outcome.gradients, found[torch.float32], found[torch.float64])
    return max(shares.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model,heads", CASES)
def test_gradients(model, heads, layout):
    assert worst(model, heads, LAYOUTS[layout]) <= 1


@pytest.mark.parametrize("layout", ["two", "split"])
def test_a_wrong_weight_fails(layout):
    """Negative control: one exit's weight is off by 0.1 %."""
    assert worst("gpt2", "mixed", LAYOUTS[layout], 1.001) > 1


@pytest.mark.parametrize("model", ["gpt2", "llama_tied", "llama"])
@pytest.mark.parametrize("ranks,name", [(2, "1f1b"), (4, "1f1b"), (4, "zero_bubble")])
def test_sums_over_ranks_without_exact_ties(model, ranks, name):
    """They differ in the order of the same terms: an error of n roundings of the sum of their
    sizes on either side, for n terms, which are those of each token's loss at each use."""
    config, values, data, weights, _ = gradients_by_torch(model, "mixed")
    found = {}
    for exact in (True, False):
        layout = Layout(ranks, 1, name, exact=exact)
        run = train(config, values, layout, [data], exit_weights=weights, update=False)
        found[exact] = run.gradients
    tied = {row["name"] for row in _core.Model(config, 1, weights=False).table if row["tied"]}
    sizes, uses = sizes_of_terms(config, values, frozenset(tied), data, weights)
    changed = False
    for name in found[True]:
        difference = np.abs(found[True][name].astype(float) - found[False][name])
        if name not in tied:
            assert not difference.any(), name
            continue
        n = uses[name] * M * B * T
        bound = 2 * n * 2.0**-24 / (1 - n * 2.0**-24) * sizes[name] * (1 + 1e-4)
        assert (difference <= bound).all(), name
        changed = changed or difference.any()
        # A use that is left out would be seen.
        assert rms_of(bound) < 0.01 * rms_of(found[True][name]), name
    assert changed


def rms_of(value):
    return np.sqrt(np.mean(np.square(value)))


def sizes_of_terms(config, values, tied, data, weights):
    """By name: the sum of the absolute gradients of each token at each use, and how many uses."""
    tokens = int((data["targets"] >= 0).sum())
    sizes, uses = {name: 0.0 for name in tied}, {}
    for m in range(M):
        leaves, losses = forward(config, values, tied, data, m, torch.float64)
        total = sum(w * loss for w, loss in zip([*weights, 1.0], losses, strict=True)) / tokens
        for t in np.flatnonzero(data["targets"][m] >= 0):
            for (name, use), gradient in gradients_of(leaves, total[t]).items():
                if use is not None:
                    sizes[name] = sizes[name] + np.abs(gradient)
        uses = {name: sum(key[0] == name for key in leaves) for name in tied}
    return sizes, uses
