"""Table 1 of EE-LLM (Chen et al., ICML 2024), and the simulator's side of it."""

import numpy as np

from eellm.config import ModelConfig
from eellm.pipeline import Costs, Schedule
from eellm.pipeline.costs import Rates, upper_bound

# Seconds a step and peak GB, of 1.3B and 7B: 4 ranks, 64 microbatches of 2 x 2048 tokens.
ROWS = {
    "standard": ((5.23, 19.85), (17.75, 62.27)),
    "early exits": ((5.31, 24.05), (17.93, 67.42)),
    "early exits (1)": ((5.29, 22.56), (17.91, 65.79)),
    "early exits (2)": ((5.28, 20.23), (17.81, 62.27)),
    "early exits (1 and 2)": ((5.24, 19.85), (17.79, 62.27)),
}
SIZES = [(24, 2048, 5440), (32, 4096, 10880)]
# The one fitted constant: bytes that a layer keeps for each token and channel, from the standard
# model's memory. A logit has 4 bytes (float32) from its forward on, and 6 more (its gradient in
# float32 and bf16) in its backward; a parameter has 18 (bf16, master, gradient, two moments).
ACTIVATION_BYTES = 61.0
TABLE_1 = Rates(
    flops=1.5e14,
    parameter_bytes=18.0,
    activation_bytes=ACTIVATION_BYTES,
    logit_bytes=(4.0, 6.0),
)


def simulated(size, row):
    """Time, memory and upper bound of a row of the table."""
    layers, width, wide = SIZES[size]
    early = [{"layer": i, "head": "embedding", "output": "own"} for i in (layers // 4, layers // 2)]
    config = ModelConfig.llama(
        vocab_size=32000, hidden_size=width, intermediate_size=wide, num_attention_heads=32,
        num_hidden_layers=layers, exits=[] if row == "standard" else early,
    )  # fmt: skip
    first, second = "1" in row, "2" in row
    costs = Costs.of_model(
        config, 4, seq_length=2048, micro_batch_size=2, rates=TABLE_1,
        exit_step="backward" if first or not config.exits else "forward",
        rank_edge="later" if second else "earlier",
    )  # fmt: skip
    result = Schedule("1f1b", 4, 64, exits=costs.layout.exit_ranks).simulate(costs)
    total = costs.forward + costs.backward
    head = 3 * 2 * 4096 * width * 32000 / TABLE_1.flops
    counts = np.array([len(each) for each in costs.layout.exits])
    layer = float(total[3] - head)
    bound = upper_bound(64, layer, counts * head, head=head)
    return result.time, float(result.peak_bytes.max()), bound
