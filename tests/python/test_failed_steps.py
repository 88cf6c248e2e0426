"""A step that fails, or whose numbers are not finite, changes nothing and harms no later step."""

import numpy as np
import pytest

from tests.parity.cases import HEADS, B, M, T, base_config, gpt2_config
from tests.python.common import CONFIG, batch, equal, make, run_step, values_of

CONFIGS = {
    "llama": base_config(exits=HEADS["mixed"]),
    "gpt2": gpt2_config(exits=HEADS["block"]),
}


def set_at(name, index, value):
    def change(data):
        data[name][index] = value

    return change


def swap(first, second):
    def change(data):
        data["segments"][[first, second]] = data["segments"][[second, first]]

    return change


LAST = (M - 1, B * T - 1)
FAULTS = {
    "token -1": set_at("tokens", (0, 0), -1),
    "token V": set_at("tokens", LAST, 67),
    "token max": set_at("tokens", LAST, 2**31 - 1),
    "target V": set_at("targets", (0, 3), 67),
    "target in the last batch": set_at("targets", LAST, 67),
    "position -1": set_at("positions", (0, 0), -1),
    "position P": set_at("positions", LAST, 64),
    "position max": set_at("positions", LAST, 2**31 - 1),
    "segment start": set_at("segments", 0, 1),
    "segment end": set_at("segments", 3, B * T + 1),
    "segment end of the last batch": set_at("segments", -1, B * T - 1),
    "segment negative": set_at("segments", 1, -1),
    "segment beyond": set_at("segments", 1, 2**31 - 1),
    "segment order": swap(1, 2),
    "all masked": set_at("targets", slice(None), -1),
}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("model", CONFIGS)
def test_bad_numbers_change_nothing(model, fault, recompute):
    config = CONFIGS[model]
    core, trainer = make(config, recompute=recompute)
    other_core, other = make(config, recompute=recompute)
    run_step(trainer, config)
    run_step(other, config)
    before = values_of(core)
    data = batch(config)
    FAULTS[fault](data)
    with pytest.raises(ValueError) as error:
        run_step(trainer, config, data)
    assert fault.split()[0] in str(error.value), str(error.value)
    assert equal(values_of(core), before) and trainer.steps == 1
    for view in (trainer.moment1, trainer.moment2):
        assert any(array.any() for array in values_of(core, view).values())
    assert not any(array.any() for array in values_of(core, trainer.gradient).values())
    assert run_step(trainer, config) == run_step(other, config)
    for view, other_view in [
        (core.parameter, other_core.parameter),
        (trainer.moment1, other.moment1),
        (trainer.moment2, other.moment2),
    ]:
        assert equal(values_of(core, view), values_of(core, other_view))


def test_a_good_step_does_change():
    """The negative control."""
    core, trainer = make()
    before = values_of(core)
    run_step(trainer)
    assert not equal(values_of(core), before)


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "all masked"])
def test_evaluate_refuses_bad_numbers(model, fault):
    config = CONFIGS[model]
    _, trainer = make(config)
    data = batch(config)
    del data["row_ids"]
    expected = trainer.evaluate(**data)
    broken = {name: array.copy() for name, array in data.items()}
    FAULTS[fault](broken)
    with pytest.raises(ValueError):
        trainer.evaluate(**broken)
    found = trainer.evaluate(**data)
    assert found["loss_sum"] == expected["loss_sum"]
    np.testing.assert_array_equal(found["confidence"], expected["confidence"])


def test_every_negative_target_is_masked():
    config = CONFIGS["llama"]
    data = batch(config)
    expected = run_step(make(config)[1], config, data)
    masked = data["targets"] < 0
    data["targets"][masked] = np.resize(np.array([-2, -100, -(2**31)], np.int32), masked.sum())
    assert run_step(make(config)[1], config, data) == expected


def test_evaluation_of_nothing():
    _, trainer = make()
    data = {name: array for name, array in batch(CONFIG).items() if name != "row_ids"}
    masked = data | {"targets": np.full_like(data["targets"], -1)}
    result = trainer.evaluate(**masked)
    assert result["tokens"] == 0 and result["loss_sum"] == [0, 0, 0]
    empty = {name: array[:0] for name, array in data.items()}
    result = trainer.evaluate(**empty)
    assert result["tokens"] == 0 and result["confidence"].shape == (3, 0, B * T)


def test_gradients_accumulated_before_a_failure_are_gone():
    core, trainer = make()
    result = run_step(trainer, update=False)
    assert result["finite"] and not result["updated"] and trainer.steps == 0
    assert any(array.any() for array in values_of(core, trainer.gradient).values())
    data = batch(CONFIG)
    data["tokens"][0, 0] = -1
    with pytest.raises(ValueError):
        run_step(trainer, data=data)
    assert not any(array.any() for array in values_of(core, trainer.gradient).values())


WEIGHTS = ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_not_finite(name, value):
    core, trainer = make()
    other_core, other = make()
    run_step(trainer)
    run_step(other)
    weight = np.asarray(core.parameter(name))
    data = batch(CONFIG)
    index = (int(data["tokens"][0, 0]), 0) if "embed" in name else (0,) * weight.ndim
    good = weight[index]
    weight[index] = value
    before = values_of(core), values_of(core, trainer.moment1)
    result = run_step(trainer)
    assert result["finite"] is False and result["updated"] is False and trainer.steps == 1
    assert not all(np.isfinite([*result["losses"], result["grad_norm"]]))
    assert equal(values_of(core), before[0]) and equal(values_of(core, trainer.moment1), before[1])
    assert not any(array.any() for array in values_of(core, trainer.gradient).values())
    weight[index] = good
    assert run_step(trainer) == run_step(other)
    assert equal(values_of(core), values_of(other_core))


@pytest.mark.parametrize("limit", ["max_loss", "max_grad_norm"])
def test_limits_of_a_step(limit):
    core, trainer = make()
    before = values_of(core)
    result = run_step(trainer, **{limit: 1e-3})
    assert result["finite"] and not result["updated"] and trainer.steps == 0
    assert equal(values_of(core), before)
    assert not any(array.any() for array in values_of(core, trainer.gradient).values())
    assert run_step(trainer, **{limit: 1e9})["updated"]
