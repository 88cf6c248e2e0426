"""Resuming after steps that were skipped: AdamW counts only the steps that it took."""

import numpy as np

from tests.train.common import parameters_of, same_parameters


def test_skipped_steps_do_not_count_for_adam(make):
    options = {"steps": 8, "on_nonfinite": "skip"}
    straight, cut = make("straight", **options), make("cut", **options)
    for trainer in (straight, cut):
        trainer.step()
        view = trainer.model.parameter("exits.0.norm.weight")
        saved = view.copy()
        view[...] = np.nan
        assert trainer.step()["skipped"] == "nonfinite"
        view[...] = saved
        trainer.step()
    cut.save_checkpoint()
    again = make("cut", resume="auto", **options)
    assert again.done == 3 and again.core.steps == 2
    for trainer in (straight, again):
        for _ in range(3):
            trainer.step()
    assert same_parameters(parameters_of(again.model), parameters_of(straight.model))
