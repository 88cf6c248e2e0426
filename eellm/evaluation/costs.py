"""What a decoding step must read from memory: the weights of the layers and exits it runs.

At batch 1 decoding is as fast as the weights come from memory, so the bytes of a step are its cost.
Each matrix counts once a step, however many rows run through it; keys and values, norms and
embedding rows are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from eellm.config import ModelConfig
    from eellm.exits import ExitConfig

_SIZES = {"float32": 4, "bfloat16": 2}
# Packed matrices are padded to whole panels of output features (csrc/tensor/tensor.h).
_PANEL = 64

Places = npt.NDArray[np.integer]


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the packed matrices."""

    config: ModelConfig
    dtype: str

    def matrix(self, rows: int, cols: int) -> int:
        return -(-rows // _PANEL) * _PANEL * cols * _SIZES[self.dtype]

    @property
    def q_width(self) -> int:
        return self.config.num_attention_heads * self.config.head_dim

    @property
    def kv_width(self) -> int:
        return 2 * self.config.num_key_value_heads * self.config.head_dim

    @property
    def qkv(self) -> int:
        return self.matrix(self.q_width + self.kv_width, self.config.hidden_size)

    @property
    def attention(self) -> int:
        return self.qkv + self.matrix(self.config.hidden_size, self.q_width)

    @property
    def mlp(self) -> int:
        c = self.config
        up = self.matrix(c.intermediate_size * (2 if c.gated else 1), c.hidden_size)
        return up + self.matrix(c.hidden_size, c.intermediate_size)

    @property
    def output(self) -> int:
        return self.matrix(self.config.vocab_size, self.config.hidden_size)

    def fill(self, exit: ExitConfig) -> int:
        """What every row that passes the exit reads there: a block writes keys and values."""
        return self.matrix(self.kv_width, self.config.hidden_size) if exit.branch == "block" else 0

    def check(self, exit: ExitConfig) -> int:
        """What it takes beyond that to ask the exit for a token."""
        if exit.branch == "mlp":
            return self.mlp + self.output
        if exit.branch == "block":
            width = self.config.hidden_size
            query = self.matrix(self.q_width, width) + self.matrix(width, self.q_width)
            return query + self.mlp + self.output
        return self.output


class StepCosts:
    """Bytes that steps of a model read at batch 1.

    active, wherever it is asked for: whether each early exit is looked at.
    """

    def __init__(self, config: ModelConfig, dtype: str = "float32", max_deferred: int = 15) -> None:
        """dtype: of the packed weights. max_deferred: as decoding takes it."""
        sizes = _Sizes(config, dtype)
        layers = config.num_hidden_layers
        halves = [sizes.attention, sizes.mlp] * layers
        run = np.concatenate([[0], np.cumsum(halves)])
        self.early, self.max_deferred = len(config.exits), max_deferred
        self.checks = np.array([*map(sizes.check, config.exits), sizes.output], np.int64)
        fills = np.array([*map(sizes.fill, config.exits), 0], np.int64)
        depths = np.array([*(each.depth for each in config.exits), 2 * layers])
        # To each exit, and past it, without any output matrix.
        self.reach = run[depths] + np.cumsum(fills)
        # Rows that nobody asks for a token end when all keys and values are written.
        side = [each.depth for each in config.exits if each.branch == "block"]
        self.fill_depth = max([2 * layers - 1, *side])
        self.filled = int(self.reach[-1])
        if self.fill_depth < 2 * layers:
            self.filled -= sizes.attention - sizes.qkv + sizes.mlp
        self.defers = depths[:-1] < self.fill_depth

    def asked(self, active: Sequence[bool]) -> npt.NDArray[np.int64]:
        """Checks of a token that leaves at each exit [E]."""
        return np.cumsum(np.where([*active, True], self.checks, 0))

    def leaving(self, active: Sequence[bool]) -> npt.NDArray[np.int64]:
        """A step whose token leaves at each exit [E], nothing being filled in for others."""
        return self.reach + self.asked(active)

    def full(self) -> int:
        """A step at full depth."""
        return int(self.reach[-1] + self.checks[-1])

    def capped(self, active: Sequence[bool]) -> npt.NDArray[np.int64]:
        """A step whose token is that of each early exit, while the rows run on to the end."""
        return self.filled + self.asked(active)[:-1]

    def average(self, active: Sequence[bool], places: Places, starts: Places) -> float:
        """Bytes of a step on average, see `steps`."""
        return float(self.steps(active, places, starts).mean())

    def steps(
        self, active: Sequence[bool], places: Places, starts: Places
    ) -> npt.NDArray[np.int64]:
        """Bytes of each step of texts one after the other, which begin at the indexes `starts`.

        places: the exit of each token. Where a text has max_deferred tokens in a row that left
        early, the next one that would leave runs to the end with them.
        """
        deferred = np.append(self.defers, False)[places]
        index = np.arange(len(places))
        # The last index before each run of deferred tokens.
        before = np.where(deferred, -1, index)
        before[starts] = np.maximum(before[starts], np.asarray(starts) - 1)
        run = index - np.maximum.accumulate(before)
        capped = deferred & (run % (self.max_deferred + 1) == 0)
        # Nothing follows the last token of a text that would need its keys and values.
        capped[np.append(starts[1:], len(places)) - 1] = False
        ends = np.append(self.capped(active), 0)
        return np.where(capped, ends[places], self.leaving(active)[places])
