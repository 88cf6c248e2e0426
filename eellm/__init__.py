"""Train and run early-exit large language models.

Everything public is imported on first use, so that `import eellm` costs little.
"""

from typing import TYPE_CHECKING, Any

from eellm._version import __version__

if TYPE_CHECKING:
    from eellm._core import BusyError, CommError, Error, NonFiniteError, build_info
    from eellm.config import ExitConfig, ModelConfig
    from eellm.data import load_tokenizer
    from eellm.decode import Generator, generate
    from eellm.evaluation import Evaluation, evaluate
    from eellm.model import Model
    from eellm.parallel import ParallelConfig, run_local
    from eellm.train.config import TrainConfig
    from eellm.train.trainer import Trainer

_HOMES = {
    "BusyError": "eellm._core",
    "CommError": "eellm._core",
    "Error": "eellm._core",
    "Evaluation": "eellm.evaluation",
    "ExitConfig": "eellm.config",
    "Generator": "eellm.decode",
    "Model": "eellm.model",
    "ModelConfig": "eellm.config",
    "NonFiniteError": "eellm._core",
    "ParallelConfig": "eellm.parallel",
    "TrainConfig": "eellm.train.config",
    "Trainer": "eellm.train.trainer",
    "build_info": "eellm._core",
    "evaluate": "eellm.evaluation",
    "generate": "eellm.decode",
    "load_tokenizer": "eellm.data",
    "run_local": "eellm.parallel",
}

__all__ = [
    "BusyError",
    "CommError",
    "Error",
    "Evaluation",
    "ExitConfig",
    "Generator",
    "Model",
    "ModelConfig",
    "NonFiniteError",
    "ParallelConfig",
    "TrainConfig",
    "Trainer",
    "__version__",
    "build_info",
    "evaluate",
    "generate",
    "load_tokenizer",
    "run_local",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
