"""Training: settings, rates, the loop, its guards and reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eellm.train.config import TrainConfig
    from eellm.train.metrics import read_metrics
    from eellm.train.trainer import Evaluation, Trainer

__all__ = ["Evaluation", "TrainConfig", "Trainer", "read_metrics"]

_HOMES = {
    "Evaluation": "trainer",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "read_metrics": "metrics",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"eellm.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
