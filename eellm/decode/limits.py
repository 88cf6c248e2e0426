"""What a generator can be made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eellm.decode.settings import DTYPES, ENGINES, check_count
from eellm.errors import Shown, check_one_of, invalid

if TYPE_CHECKING:
    from eellm.config import ModelConfig

MAX_SEQUENCES = 8


def check_engine(config: ModelConfig, engine: str | None, ranks: int) -> str:
    """The engine of calls that name none."""
    check_count("ranks", ranks, 1, 4096)
    if engine is None:
        engine = "pipeline" if ranks > 1 else "deferred"
    check_one_of("engine", engine, ENGINES)
    check_ranks(ranks, engine, config.num_hidden_layers)
    return engine


def check_ranks(ranks: int, engine: str, layers: int) -> None:
    """Refuses a number of ranks that a model or an engine has no use for."""
    if ranks > layers:
        advice = "every rank needs a layer"
        raise invalid("ranks is too large", f"at most the model's {layers} layers", ranks, advice)
    if ranks > 1 and engine not in ("pipeline", "full"):
        advice = 'leave engine out, or use engine "pipeline"'
        raise invalid(
            f'engine "{engine}" runs on one rank', "1 rank", Shown(f"{ranks} ranks"), advice
        )


def check_limits(
    config: ModelConfig,
    dtype: str | None,
    max_sequences: int,
    max_length: int | None,
    cache_tokens: int | None,
) -> None:
    """Refuses what no generator of the model can have."""
    if dtype is not None:
        check_one_of("dtype", dtype, DTYPES)
    check_count("max_sequences", max_sequences, 1, 2**16)
    context = config.max_position_embeddings
    if max_length is not None:
        check_count("max_length", max_length, 1, context)
    if cache_tokens is not None:
        check_count("cache_tokens", cache_tokens, 1, 2**40)
