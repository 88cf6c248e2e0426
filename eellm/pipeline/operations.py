"""Operations and bytes of a model's layers and exits, as its chunks need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eellm.pipeline.costs import Costs, Rates
from eellm.pipeline.layout import Layout

if TYPE_CHECKING:
    from eellm.config import ModelConfig

_FLOAT = 4
_LOGIT_CHUNK_BYTES = 96 << 20  # EE_LOGIT_BYTES (csrc/model/exit.h)
# The backward of attention computes scores again, then four products where the forward has two.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Operations:
    """Operations and bytes of a model for microbatches of `rows` tokens."""

    config: ModelConfig
    rows: int
    seq_length: int
    recompute: str
    deferred: bool
    in_forward: bool
    rates: Rates

    @property
    def q_width(self) -> int:
        """Channels of the queries of all heads."""
        return self.config.num_attention_heads * self.config.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of keys and values."""
        return 2 * self.config.num_key_value_heads * self.config.head_dim

    @property
    def mlp_size(self) -> int:
        """Elements of the matrices of an MLP."""
        c = self.config
        return c.hidden_size * c.intermediate_size * (3 if c.gated else 2)

    @property
    def attention_size(self) -> int:
        """Elements of the matrices of attention."""
        return self.config.hidden_size * (2 * self.q_width + self.kv_width)

    @property
    def norm_size(self) -> int:
        """Parameters of a norm."""
        return self.config.hidden_size * (2 if self.config.norm_bias else 1)

    def scores(self, layer: int) -> float:
        """Operations of the attention proper of a layer, forward."""
        length = self.seq_length
        window = min(self.config.windows[layer] or length, length)
        # Positions see 1, 2, ... window keys, then window each.
        keys = window * (window + 1) / 2 + (length - window) * window
        return 4.0 * self.q_width * keys / length * self.rows

    def block(self, layer: int) -> npt.NDArray[np.float64]:
        """Operations of a layer: forward, backward of the input, of the weights."""
        products = 2.0 * self.rows * (self.attention_size + self.mlp_size)
        scores = self.scores(layer)
        return np.array([products + scores, products + _ATTENTION_BACKWARD * scores, products])

    def again(self, layer: int) -> float:
        """Operations that the backward of a layer repeats."""
        if self.recompute == "none":
            return 0.0
        width = self.config.hidden_size
        attention = 2.0 * self.rows * width * (self.q_width + self.kv_width) + self.scores(layer)
        if self.recompute == "attention":
            return attention
        up = self.mlp_size - width * self.config.intermediate_size
        return attention + 2.0 * self.rows * (width * self.q_width + up)

    def head(self, branch: str | None, layer: int) -> npt.NDArray[np.float64]:
        """Operations of an exit: forward, backward of the input, of the weights."""
        matrix = 2.0 * self.rows * self.config.hidden_size * self.config.vocab_size
        work = np.full(3, matrix)
        if branch == "mlp":
            work += 2.0 * self.rows * self.mlp_size
        elif branch == "block":
            work += self.block(layer)
        return work

    def work(
        self, first: int, last: int, exits: Sequence[int]
    ) -> tuple[float, float, float, float]:
        """Operations of a chunk: forward, backward of input, of weights; early exits' share."""
        total = np.zeros(3)
        for layer in range(first, last):
            total += self.block(layer)
            total[1] += self.again(layer)
        of_exits = 0.0
        for i in exits:
            each = self.config.exits[i]
            added = self._placed(self.head(each.branch, each.layer - 1), self.in_forward)
            total += added
            of_exits += float(added[1])
        if last == self.config.num_hidden_layers:
            total += self._placed(self.head(None, last - 1), False)
        return float(total[0]), float(total[1]), float(total[2]), of_exits

    def _placed(self, work: npt.NDArray[np.float64], in_forward: bool) -> npt.NDArray[np.float64]:
        """In which actions an exit's forward, backward and weight gradient run."""
        forward, of_input, of_weights = work
        if in_forward:
            return np.array([forward, of_input, of_weights])
        if self.deferred:
            return np.array([0.0, forward + of_input, forward + of_weights])
        return np.array([0.0, forward + of_input + of_weights, 0.0])

    def layer_floats(self) -> int:
        """What a layer keeps of a token with nothing to be computed again, in floats."""
        c = self.config
        heads, pairs = c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads
        count = c.hidden_size + 4 + self.q_width + self.kv_width + self.q_width + heads
        count += 0 if c.parallel_residual else c.hidden_size
        count += c.intermediate_size * (2 if c.gated else 1)
        return count + (pairs * c.head_dim + 2 * pairs if c.qk_norm else 0)

    def kept_floats(self) -> int:
        """What a layer keeps of a token from its forward to its backward, in floats."""
        c = self.config
        if self.recompute == "full":
            return c.hidden_size
        if self.recompute == "attention":
            up = c.intermediate_size * (2 if c.gated else 1)
            return c.hidden_size * (1 if c.parallel_residual else 2) + 2 + up
        return self.layer_floats()

    def kept_bytes(self, first: int, last: int, exits: Sequence[int]) -> float:
        """What a chunk keeps of a microbatch."""
        layers, width = last - first, self.config.hidden_size
        if self.rates.activation_bytes is not None:
            kept = layers * self.rows * width * self.rates.activation_bytes
        else:
            kept = float(_FLOAT * self.rows * (layers * self.kept_floats() + width))
        if self.in_forward and self.rates.logit_bytes is not None:
            kept += len(exits) * self.rows * self.config.vocab_size * self.rates.logit_bytes[0]
        return kept

    def queued_bytes(self, first: int, last: int, exits: Sequence[int]) -> float:
        """What a chunk keeps of a microbatch between the two parts of a split backward: the
        operands of its weight gradients (csrc/model/queue.h)."""
        c = self.config
        layer = 5 * c.hidden_size + c.intermediate_size * (3 if c.gated else 2)
        layer += 2 * self.q_width + self.kv_width
        heads = len(exits) + (last == c.num_hidden_layers) if self.deferred else 0
        return float(_FLOAT * self.rows * ((last - first) * layer + heads * c.hidden_size))

    def transient_bytes(self, last: int, exits: Sequence[int]) -> float:
        """What the backward of a chunk needs beside that, while it runs."""
        c = self.config
        heads = len(exits) + (last == c.num_hidden_layers)
        if self.rates.logit_bytes is not None:
            kept, more = self.rates.logit_bytes
            early = more if self.in_forward else kept + more
            sizes = [early] * len(exits) + [kept + more] * (heads - len(exits))
            return self.rows * c.vocab_size * max(sizes, default=0.0)
        width = c.hidden_size
        total = _FLOAT * self.rows * width
        if heads:
            rows = max(1, min(self.rows, _LOGIT_CHUNK_BYTES // (_FLOAT * c.vocab_size)))
            total += _FLOAT * rows * (c.vocab_size + 2 * width + 5)
        if self.recompute != "none" or any(c.exits[i].branch for i in exits):
            total += _FLOAT * self.rows * self.layer_floats()
        return float(total)

    def parameters(self, layout: Layout) -> npt.NDArray[np.float64]:
        """Parameters of each rank; a matrix that several uses share counts once."""
        c = self.config
        biases = c.bias_q * self.q_width + c.bias_kv * self.kv_width + c.bias_o * c.hidden_size
        norms = (1 if c.shared_norm else 2) * self.norm_size + (2 * c.head_dim if c.qk_norm else 0)
        mlp = self.mlp_size + c.bias_up * c.intermediate_size * (2 if c.gated else 1)
        mlp += c.bias_down * c.hidden_size
        layer = self.attention_size + biases + mlp + norms
        counts = np.zeros(layout.ranks)
        matrices: list[set[Any]] = [set() for _ in range(layout.ranks)]
        for g, layers in enumerate(layout.split):
            rank = layout.rank_of(g)
            counts[rank] += layers * layer
            for i in layout.exits[g]:
                each = c.exits[i]
                matrices[rank].add(self.matrix_of(i))
                counts[rank] += self.norm_size if each.norm == "own" else 0
                if each.branch is not None:
                    counts[rank] += mlp if each.branch == "mlp" else layer
        matrices[0].add("embedding")
        if c.positions == "learned":
            counts[0] += c.max_position_embeddings * c.hidden_size
        matrices[-1].add("embedding" if c.tie_word_embeddings else "final")
        counts[-1] += self.norm_size
        size = c.vocab_size * c.hidden_size
        return counts + np.array([len(each) * size for each in matrices], np.float64)

    def matrix_of(self, index: int) -> Any:
        """Which output matrix an early exit has; equal for exits that share one."""
        output = self.config.exits[index].output
        if isinstance(output, int):
            return self.matrix_of(output)
        if output == "own":
            return index
        return "embedding" if self.config.tie_word_embeddings else output

    def costs(self, layout: Layout) -> Costs:
        """The costs of a layout."""
        spans = list(zip(layout.bounds[:-1], layout.bounds[1:], layout.exits, strict=True))
        work = np.array([self.work(*each) for each in spans]) / self.rates.flops
        message = 0.0
        if self.rates.bandwidth is not None:
            size = self.rates.element_bytes * self.rows * self.config.hidden_size
            message = self.rates.latency + size / self.rates.bandwidth
        return Costs(
            ranks=layout.ranks,
            chunks=layout.chunks,
            forward=work[:, 0],
            backward=work[:, 1] + work[:, 2],
            backward_input=work[:, 1],
            backward_weight=work[:, 2],
            kept_bytes=np.array([self.kept_bytes(*each) for each in spans]),
            queued_bytes=np.array([self.queued_bytes(*each) for each in spans]),
            transient_bytes=np.array([self.transient_bytes(b, exits) for _, b, exits in spans]),
            static_bytes=self.parameters(layout) * self.rates.parameter_bytes,
            message=message,
            exit_time=work[:, 3],
            layout=layout,
        )
