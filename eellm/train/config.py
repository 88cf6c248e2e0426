"""How a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from eellm.errors import invalid
from eellm.settings import check_values

NONNEGATIVE = "a number of at least 0"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run; docs/CONFIG.md explains each of them.

    A step has global_batch_size samples of seq_length tokens, in microbatches of micro_batch_size.
    Exit weights, their initial values and temperatures are one number for all early exits or one
    for each.
    """

    steps: int = 1000
    seq_length: int = 256
    micro_batch_size: int = 4
    global_batch_size: int = 4

    learning_rate: float = 1e-3
    min_learning_rate: float = 0.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    exit_weights: tuple[float, ...] = (1.0,)
    exit_weights_initial: tuple[float, ...] = (0.0,)
    exit_ramp: Literal["constant", "linear", "cosine"] = "constant"
    exit_ramp_steps: int = 0
    exit_temperature: tuple[float, ...] = (1.0,)
    dynamic_exit_weights: bool = False

    recompute: Literal["none", "attention", "full"] = "none"

    valid_interval: int = 0
    valid_batches: int = 0

    on_nonfinite: Literal["stop", "skip"] = "stop"
    on_spike: Literal["stop", "skip"] = "skip"
    spike_threshold: float = 0.0
    spike_window: int = 128
    max_skipped: int = 10

    checkpoint_interval: int = 0
    keep_checkpoints: int = 2

    log_interval: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("exit_weights", "exit_weights_initial", "exit_temperature"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                object.__setattr__(self, name, (value,))
        check_values(self)
        for name in ("steps", "seq_length", "micro_batch_size", "global_batch_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("spike_window", "max_skipped", "keep_checkpoints", "log_interval"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._check_batch()
        self._check_rates()
        self._check_exits()
        for name in ("valid_interval", "valid_batches", "checkpoint_interval"):
            self._require(name, getattr(self, name) >= 0, "0 or more", "0 turns it off")
        good = 0 <= self.spike_threshold < math.inf
        self._require("spike_threshold", good, NONNEGATIVE, "0 turns it off; 6 is a usual value")
        self._require("seed", 0 <= self.seed < 1 << 63, "0 to 2^63 - 1")

    def _require(self, name: str, good: bool, expected: str, advice: str = "") -> None:
        if not good:
            raise invalid(name, expected, getattr(self, name), advice or f"change {name}")

    def _check_batch(self) -> None:
        self._require(
            "global_batch_size",
            self.global_batch_size % self.micro_batch_size == 0,
            f"a multiple of micro_batch_size = {self.micro_batch_size}",
        )

    def _check_rates(self) -> None:
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0")
        good = 0 <= self.min_learning_rate <= self.learning_rate
        self._require("min_learning_rate", good, f"0 to learning_rate = {self.learning_rate}")
        good = 0 <= self.warmup_steps <= self.steps
        self._require("warmup_steps", good, f"0 to steps = {self.steps}")
        good = 0 <= self.decay_steps <= self.steps - self.warmup_steps
        expected = f"0 to steps - warmup_steps = {self.steps - self.warmup_steps}"
        self._require("decay_steps", good, expected)
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("eps", 0 < self.eps < math.inf, "a number above 0")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, NONNEGATIVE)
        advice = "0 turns clipping off"
        self._require("clip", 0 <= self.clip < math.inf, NONNEGATIVE, advice)

    def _check_exits(self) -> None:
        for name in ("exit_weights", "exit_weights_initial"):
            values = getattr(self, name)
            good = len(values) > 0 and all(0 <= value < math.inf for value in values)
            self._require(name, good, "numbers of at least 0")
        good = all(0 < value < math.inf for value in self.exit_temperature)
        good = good and len(self.exit_temperature) > 0
        self._require("exit_temperature", good, "numbers above 0")
        good = self.exit_ramp == "constant" or self.exit_ramp_steps >= 1
        advice = "say how many steps the ramp takes"
        self._require("exit_ramp_steps", good, f"at least 1 with a {self.exit_ramp} ramp", advice)
        self._require("exit_ramp_steps", self.exit_ramp_steps >= 0, "0 or more")

    def check_model(self, exits: int, max_positions: int | None = None) -> None:
        """Checks what depends on the model: its early exits and its longest sequence."""
        for name in ("exit_weights", "exit_weights_initial", "exit_temperature"):
            good = len(getattr(self, name)) in (1, exits)
            self._require(name, good, f"1 value or one for each of {exits} early exits")
        if max_positions is not None:
            good = self.seq_length <= max_positions
            self._require("seq_length", good, f"at most the model's {max_positions} positions")

    @property
    def microbatches(self) -> int:
        """Microbatches of a step."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return self.global_batch_size * self.seq_length

    def _repr_html_(self) -> str:
        from eellm.settings import as_values

        rows = "".join(
            f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in as_values(self).items()
        )
        return f"<table><caption>TrainConfig</caption>{rows}</table>"


def lasting(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share to go on bit for bit."""
    from eellm.settings import as_values

    passing = {"log_interval", "checkpoint_interval", "keep_checkpoints", "max_skipped"}
    passing |= {"valid_interval", "valid_batches"}
    return {name: value for name, value in as_values(config).items() if name not in passing}
