"""How long tokens take in a pipeline whose stages take a given time: real messages, no arithmetic.

So the engine "pipeline" is measured on more ranks than there are cores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eellm.decode.pipeline import Servers, spread

if TYPE_CHECKING:
    from eellm._core import Comm, Engine

__all__ = ["latencies", "latency_error", "replay_engine", "replay_ranks"]


def _config(ranks: int, hidden_size: int) -> dict[str, Any]:
    """A layer for each rank, with an exit behind it: small, but for the rows that travel."""
    from eellm.config import ExitConfig, ModelConfig

    exits = tuple(ExitConfig(layer=layer, head="embedding") for layer in range(1, ranks))
    return ModelConfig(
        vocab_size=32,
        hidden_size=hidden_size,
        num_hidden_layers=ranks,
        num_attention_heads=1,
        head_dim=8,
        intermediate_size=8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        exits=exits,
    ).to_core()


def replay_engine(comm: Comm, stage_seconds: float, hidden_size: int = 4096) -> Engine:
    """The engine of a rank whose stage takes so many seconds a pass, its exit at the end of it."""
    from eellm import _core

    # An exit between two ranks belongs to the earlier one.
    part = (comm.size, 1, comm.rank, None, True, False) if comm.size > 1 else None
    model = _core.Model(_config(comm.size, hidden_size), threads=1, weights=False, part=part)
    return _core.Engine(
        model, empty=True, comm=comm, stage_seconds=stage_seconds, max_length=4096, trace=4096
    )


def replay_ranks(ranks: int, stage_seconds: float, hidden_size: int = 4096) -> Servers:
    """All ranks as threads of this process."""
    return spread(ranks, lambda rank, comm: replay_engine(comm, stage_seconds, hidden_size))


def latencies(engine: Engine, exits: Sequence[int]) -> list[float]:
    """Seconds of each token of a text on rank 0; token i leaves at the end of rank exits[i]."""
    replay = np.asarray(exits, np.int32)
    number = engine.add(
        np.zeros(1, np.int32),
        max_new_tokens=len(replay),
        engine="pipeline",
        forced=np.zeros(len(replay), np.int32),
        replay=replay,
    )
    seconds: list[float] = []
    last = time.perf_counter()
    while len(seconds) < len(replay):
        events = engine.step()
        now = time.perf_counter()
        for event in events[events["sequence"] == number]:
            if event["exit"] != replay[len(seconds)]:
                raise RuntimeError(f"a token left at {event['exit']}, not as replayed")
            seconds.append(now - last)
            last = now
    return seconds


def latency_error(
    engine: Engine, ranks: int, stage_seconds: float, tokens: int = 80, seed: int = 0
) -> float:
    """On rank 0: the latency of a token that leaves on rank r over its time to that exit, less 1.

    Exits are drawn at random. The median of the tokens of each rank, and the worst rank.
    """
    exits = np.random.default_rng(seed).permutation(np.arange(tokens) % ranks)
    seconds = np.array(latencies(engine, exits.tolist()))
    each = [np.median(seconds[exits == rank]) / (rank + 1) for rank in range(ranks)]
    return float(max(each) / stage_seconds - 1)
