"""Weights read straight into the packed form that decoding takes.

Files are mapped, and each parameter goes from there into its place on all threads: no float32 copy
of the model comes to be, whatever the dtype of the files.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eellm.config import ModelConfig
from eellm.errors import invalid
from eellm.files import directory
from eellm.files.locate import find_folder

if TYPE_CHECKING:
    from eellm import _core

_DTYPES = ("float32", "bfloat16")


def load_engine(
    path: str | os.PathLike[str],
    dtype: str | None = None,
    threads: int = 0,
    max_sequences: int = 1,
    max_length: int = 0,
    cache_tokens: int = 0,
    progress: bool = True,
    strict: bool = True,
    revision: str | None = None,
    part: tuple[Any, ...] | None = None,
    **options: Any,
) -> tuple[ModelConfig, "_core.Model", "_core.Engine"]:
    """An engine with the weights of a model directory, or of the Hugging Face hub by name.

    dtype: of the packed weights, "float32" or "bfloat16"; None takes bfloat16 where the files have
    it. cache_tokens: positions of the cache over all sequences, 0: as many as they could need. The
    native model that comes along has no parameters in memory. part: the layers of one rank, as
    `_core.Model` takes it; no others are read. options: further ones of `_core.Engine`.
    """
    from eellm import _core

    if dtype is not None and dtype not in _DTYPES:
        raise invalid("dtype is invalid", " or ".join(_DTYPES), dtype)
    folder = find_folder(path, revision)
    config = directory.read_config(folder)
    weights = directory.Weights(folder)
    core = _core.Model(config.to_core(), threads=threads, weights=False, part=part)
    sources = directory.find_parameters(core.table, config, weights, strict=strict)
    engine = _core.Engine(
        core,
        dtype=dtype or _dtype_of(sources),
        max_sequences=max_sequences,
        max_length=max_length,
        positions=cache_tokens,
        empty=True,
        **options,
    )
    sources = [each for each in sources if each.row["held"]]
    with _bar(sum(each.nbytes for each in sources), progress) as bar:
        for each in sources:
            values = np.require(each.values(), requirements="A")  # files may pad as they like
            engine.load(each.row["name"], values)
            bar.update(each.nbytes)
    return config, core, engine


def load_from_model(
    engine: "_core.Engine",
    core: "_core.Model",
    progress: bool = True,
    part: "_core.Model | None" = None,
) -> None:
    """Packs the parameters of a model in memory into an engine that was made empty.

    part: the model of the engine, where that is one rank's part of it.
    """
    names = [row["name"] for row in (part or core).table if row["held"]]
    views = {name: np.asarray(core.parameter(name)) for name in names}
    with _bar(sum(each.nbytes for each in views.values()), progress) as bar:
        for name, values in views.items():
            engine.load(name, values)
            bar.update(values.nbytes)


def _dtype_of(sources: Sequence[directory.Source]) -> str:
    """bfloat16 where all matrices of the files are, so that no value changes; else float32."""
    matrices = [each for each in sources if len(each.row["shape"]) == 2]
    return "bfloat16" if all(each.dtype == "BF16" for each in matrices) else "float32"


def _bar(total: int, progress: bool) -> Any:
    """A progress bar on a terminal, for what takes more than a second."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="weights",
        delay=1.0,
        leave=False,
        file=sys.stderr,
        disable=not progress or not sys.stderr.isatty(),
    )
