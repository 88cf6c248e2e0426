"""Exits whose logits come in several chunks of rows, against closed forms."""

import numpy as np
import pytest

from eellm import _core
from tests.parity.cases import base_config, exit_

# A chunk of logits has at most 96 MiB: 24 rows of this vocabulary.
VOCAB, WIDTH, ROWS = 1 << 20, 2, 29
EPS, WEIGHT = 1e-5, 0.3
OUTPUTS = ("exits.0.head.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def case():
    """A model whose only layer adds nothing, so that hidden states are embeddings."""
    config = base_config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=2, rope_dims=2, norm_eps=EPS, exits=[exit_(1, output=-1)],
    )  # fmt: skip
    core = _core.Model(config, 2)
    rng = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", *OUTPUTS):
        np.asarray(core.parameter(name))[...] = rng.standard_normal((VOCAB, WIDTH))
    for name in ("model.norm.weight", "exits.0.norm.weight"):
        np.asarray(core.parameter(name))[...] = 1
    tokens, targets = rng.integers(0, VOCAB, (2, 1, ROWS)).astype(np.int32)
    targets[0, ::7] = -1
    return core, _core.Trainer(core, rows=ROWS, microbatches=1), tokens, targets


def expected(core, tokens, name):
    """Normalised hidden states [N, C], and the probabilities [V] of each row, in float64."""
    x = np.asarray(core.parameter("model.embed_tokens.weight")).astype(np.float64)[tokens[0]]
    h = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    matrix = np.asarray(core.parameter(name)).astype(np.float64).T
    for row in h:
        z = np.exp(row @ matrix)
        yield row, z / z.sum()


def inputs(tokens, targets):
    ends = np.array([0, ROWS], np.int32), np.array([1], np.int32)
    return tokens, targets, np.arange(ROWS, dtype=np.int32)[None], *ends


def test_loss_and_gradients(case):
    core, trainer, tokens, targets = case
    *arrays, segments, counts = inputs(tokens, targets)
    row_ids = np.zeros((1, ROWS), np.uint64)
    result = trainer.step(
        *arrays, row_ids, segments, counts, exit_weights=[WEIGHT], learning_rate=0, update=False
    )
    count = (targets >= 0).sum()
    for e, name in enumerate(OUTPUTS):
        gradient, loss = np.zeros((VOCAB, WIDTH)), 0.0
        for (h, p), target in zip(expected(core, tokens, name), targets[0], strict=True):
            if target >= 0:
                loss -= np.log(p[target]) / count
                p[target] -= 1
                gradient += np.outer(p, h) * (WEIGHT, 1)[e] / count
        np.testing.assert_allclose(result["losses"][e], loss, rtol=1e-6)
        found = np.asarray(trainer.gradient(name))
        # Every row adds an error of a few roundings of its share.
        np.testing.assert_allclose(found, gradient, rtol=0, atol=2.0**-20 * np.abs(gradient).max())


def test_evaluation(case):
    core, trainer, tokens, targets = case
    result = trainer.evaluate(*inputs(tokens, targets))
    best, top = np.empty((2, 2, ROWS))
    for e, name in enumerate(OUTPUTS):
        for i, (_, p) in enumerate(expected(core, tokens, name)):
            best[e, i], top[e, i] = p.argmax(), p.max()
    np.testing.assert_allclose(result["confidence"][:, 0], top, rtol=2e-5)
    assert (result["correct"][:, 0] == (best == best[-1])).all()
