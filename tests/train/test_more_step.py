"""What a step and an evaluation tell beside the losses."""

import numpy as np
import pytest

from eellm import _core
from tests.parity.cases import B, M, T, base_config, batch, exit_, randomise


def probabilities(model, tokens):
    """[E, B, T, V] in float64."""
    logits = model.forward(tokens).astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_confidence_of_a_step(make):
    """Each exit's mean largest probability on the step's own batch, before the update."""
    trainer = make(steps=6)
    for _ in range(3):
        trainer.step()
    batch = trainer._batches.batch(3)
    p = probabilities(trainer.model, batch.tokens.reshape(-1, 16)).max(-1)
    wanted = p.reshape(len(p), -1).mean(-1)
    np.testing.assert_allclose(trainer.step()["confidence"], wanted, rtol=1e-5)
    assert abs(wanted[0] - wanted[-1]) > 1e-3


def test_agreement_of_an_evaluation(make):
    """The share of the unmasked tokens alone."""
    trainer = make(steps=4)
    trainer.train()
    batch = trainer._valid.batch(0)
    best = probabilities(trainer.model, batch.tokens.reshape(-1, 16)).argmax(-1)
    same = (best == best[-1]).reshape(len(best), -1)
    targets = batch.targets.copy()
    targets.reshape(-1)[same[0]] = -1  # what is left never agrees
    result = trainer.core.evaluate(
        batch.tokens, targets, batch.positions, batch.segments, batch.segment_counts
    )
    assert same[0].any() and not same[0].all()
    assert result["agreement"] == [0, 1] and result["tokens"] == (~same[0]).sum()


def test_rates_and_weights_of_each_step(make):
    """Step t (from 0) has the rate and the exit weights of t."""
    trainer = make(
        steps=6, warmup_steps=4, learning_rate=0.02, schedule="constant", exit_ramp="linear",
        exit_ramp_steps=4, exit_weights=(0.8,), exit_weights_initial=(0.0,),
    )  # fmt: skip
    records = [trainer.step() for _ in range(6)]
    rates = [record["learning_rate"] for record in records]
    assert rates == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02, 0.02])
    weights = [record["exit_weights"] for record in records]
    assert weights == [[pytest.approx(each)] for each in (0, 0.2, 0.4, 0.6, 0.8, 0.8)]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_a_high_loss_of_any_exit_stops_the_update():
    """max_loss holds for every exit: here only the early one is above it."""
    config = base_config(exits=[exit_(2)])
    core = _core.Model(config, 1)
    randomise(core)
    np.asarray(core.parameter("exits.0.norm.weight"))[...] *= 200
    trainer = _core.Trainer(core, rows=B * T, microbatches=M)
    options = dict(exit_weights=[0.5], learning_rate=1e-3)
    data = batch(config).values()
    low, high = sorted(trainer.step(*data, **options, update=False)["losses"])
    assert low < 0.5 * high
    trainer.zero_gradients()
    before = np.array(core.parameter("lm_head.weight"))
    result = trainer.step(*data, **options, max_loss=(low + high) / 2)
    assert result["finite"] and not result["updated"]
    assert np.array_equal(before, core.parameter("lm_head.weight"))
    assert trainer.step(*data, **options, max_loss=high + 1)["updated"]
