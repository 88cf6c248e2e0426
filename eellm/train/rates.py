"""Learning rate and exit weights: pure functions of the step, which counts from 0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eellm.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, S = steps, W = warmup_steps, D = decay_steps.

    Warm-up: peak (t + 1) / W for t < W. Then, with p = (t - W) / (S - W),
    constant: peak; linear: peak + p (min - peak);
    cosine: min + (1 + cos(pi p)) / 2 (peak - min);
    wsd: peak until t = S - D, then linear to min at t = S.
    """
    peak, least = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "wsd":
        start, length = config.steps - config.decay_steps, config.decay_steps
    else:
        start, length = config.warmup_steps, config.steps - config.warmup_steps
    part = min(max((step - start) / length, 0.0), 1.0) if length > 0 else 0.0
    if config.schedule == "cosine":
        return least + 0.5 * (1.0 + math.cos(math.pi * part)) * (peak - least)
    return peak + part * (least - peak)


def exit_weights(config: TrainConfig, exits: int, step: int) -> list[float]:
    """Loss weight of each early exit at a step; the final exit's is always 1.

    With T = exit_ramp_steps and D = target - initial, for t <= T: linear: initial + t/T D;
    cosine: initial + (1 - cos(pi t/T)) / 2 D; then the target. A target below the initial weight
    is a cool-down.
    """
    targets = per_exit(config.exit_weights, exits)
    if config.exit_ramp == "constant" or step >= config.exit_ramp_steps:
        return targets
    part = step / config.exit_ramp_steps
    if config.exit_ramp == "cosine":
        part = 0.5 * (1.0 - math.cos(math.pi * part))
    starts = per_exit(config.exit_weights_initial, exits)
    return [start + part * (end - start) for start, end in zip(starts, targets, strict=True)]


def per_exit(values: tuple[float, ...], exits: int) -> list[float]:
    """One value for each exit; a single one serves all."""
    return list(values) * exits if len(values) == 1 else list(values)
