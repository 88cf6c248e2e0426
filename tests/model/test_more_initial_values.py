"""The spread of initial values: output projections start smaller by the square root of 2 L."""

import numpy as np

from eellm import ModelConfig
from eellm.model import Model


def test_spread():
    config = ModelConfig.llama(
        vocab_size=200, hidden_size=128, num_hidden_layers=8, num_attention_heads=4,
        intermediate_size=192, max_position_embeddings=8, initializer_range=0.03,
        exits=[{"layer": 2, "head": "mlp", "output": "own"}],
    )  # fmt: skip
    for name, values in Model.from_config(config, seed=1).parameters().items():
        if values.ndim == 1:
            assert (values == 1).all(), name
            continue
        output = name.endswith(("o_proj.weight", "down_proj.weight"))
        wanted = 0.03 / 4 if output else 0.03
        # Five standard deviations of the estimate from n normal numbers.
        slack = 5 / np.sqrt(2 * values.size)
        assert abs(values.std(dtype=np.float64) / wanted - 1) <= slack, name
        assert abs(values.mean(dtype=np.float64)) <= 5 * wanted / np.sqrt(values.size), name
