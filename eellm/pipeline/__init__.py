"""Schedules of pipeline-parallel training as data: made, proved, priced, saved and drawn.

from eellm.pipeline import Costs, Schedule

schedule = Schedule("1f1b", ranks=4, microbatches=6, exits=(1, 2))
result = schedule.simulate(Costs.uniform(4, exits=(1, 2)))
print(result.time, result.bubble_share, result.slots)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eellm.pipeline.costs import Costs
    from eellm.pipeline.layout import Layout
    from eellm.pipeline.schedule import ACTION, NAMES, Schedule
    from eellm.pipeline.simulation import Simulation

__all__ = ["ACTION", "NAMES", "Costs", "Layout", "Schedule", "Simulation"]

_HOMES = {
    "ACTION": "schedule",
    "NAMES": "schedule",
    "Costs": "costs",
    "Layout": "layout",
    "Schedule": "schedule",
    "Simulation": "simulation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"eellm.pipeline.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
