"""Small models that together have every option and every head, and data for a step; no PyTorch."""

import math
from pathlib import Path

import numpy as np


def base_config(**changes):
    """A small Llama-like config; `changes` override fields."""
    config = dict(
        family="eellm", vocab_size=67, hidden_size=24, intermediate_size=40, num_layers=4,
        num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64, norm="rmsnorm", norm_eps=1e-5,
        norm_offset=0.0, activation="silu", gated=True, bias_q=False, bias_kv=False, bias_o=False,
        bias_up=False, bias_down=False, norm_bias=False, qk_norm=False, parallel_residual=False,
        shared_norm=False, tie_embeddings=False, positions="rope", rope_dims=8,
        rope_interleaved=False, rope_scale=1.0, attention_scale=8**-0.5, attention_softcap=0.0,
        logit_softcap=0.0, embedding_scale=1.0, embedding_dropout=0.0, attention_dropout=0.0,
        residual_dropout=0.0, exits=[],
    )  # fmt: skip
    config.update(changes)
    config.setdefault("window", [0] * config["num_layers"])
    half = config["rope_dims"] // 2
    freq = 10000.0 ** (-np.arange(half) / max(half, 1))
    config.setdefault("rope_freq", freq.astype(np.float32))
    return config


def gpt2_config(**changes):
    """A small GPT-2."""
    gpt2 = dict(
        family="gpt2", num_kv_heads=4, head_dim=6, norm="layernorm", norm_bias=True,
        activation="gelu_tanh", gated=False, bias_q=True, bias_kv=True, bias_o=True, bias_up=True,
        bias_down=True, tie_embeddings=True, positions="learned", attention_scale=6**-0.5,
    )  # fmt: skip
    return base_config(**{**gpt2, **changes})


def exit_(layer, *, before=False, branch="none", norm="own", output=-2):
    """One early exit of a config."""
    return dict(layer=layer, before=before, branch=branch, norm=norm, output=output)


MIXED = [
    exit_(1, before=True, norm="none"),
    exit_(1, branch="block"),
    exit_(2, branch="mlp", output=-1),
    exit_(3, norm="final", output=-3),
    exit_(4, before=False, output=2),
]
HEADS = {
    "embedding": [exit_(1, norm="none"), exit_(3, norm="none")],
    "norm": [exit_(1), exit_(2)],
    "before": [exit_(2, before=True), exit_(4, before=True)],
    "mlp": [exit_(1, branch="mlp"), exit_(3, branch="mlp", output=-1)],
    "block": [exit_(1, branch="block", output=-1), exit_(3, branch="block")],
    "mixed": MIXED,
}
MODELS = {
    "llama": base_config(),
    "llama_tied": base_config(tie_embeddings=True),
    "gpt2": gpt2_config(),
    "gpt2_untied": gpt2_config(tie_embeddings=False, activation="gelu"),
    "parallel": base_config(parallel_residual=True, norm="layernorm", norm_bias=True, gated=False),
    "parallel_shared": base_config(parallel_residual=True, shared_norm=True, rope_interleaved=True,
                                   rope_dims=4, activation="gelu", bias_q=True),
    "gemma": base_config(norm_offset=1.0, activation="gelu_tanh", embedding_scale=24**0.5,
                         attention_softcap=5.0, logit_softcap=3.0, window=[0, 5, 0, 3],
                         num_kv_heads=1, tie_embeddings=True, head_dim=10, rope_dims=10),
    "qk_norm": base_config(qk_norm=True, bias_q=True, bias_kv=True, bias_o=True, bias_up=True,
                           bias_down=True),
    "relu_nope": base_config(positions="none", activation="relu", gated=False, bias_kv=True),
}  # fmt: skip
CASES = [(m, "mixed") for m in MODELS if not m.startswith("parallel")]
CASES += [(m, "norm") for m in MODELS if m.startswith("parallel")]
CASES += [("parallel", "block"), ("llama", "embedding"), ("llama", "before"), ("gpt2", "mlp")]
CASES += [("gpt2", "block"), ("llama_tied", "mlp")]

M, B, T = 2, 2, 13


def randomise(model, seed=0, scale=0.3):
    """Parameters far from their symmetric initial values, so that every term matters."""
    rng = np.random.default_rng(seed)
    for row in model.table:
        array = np.asarray(model.parameter(row["name"]))
        centre = 0.7 if "norm" in row["name"] and row["name"].endswith("weight") else 0.0
        std = scale if array.ndim == 1 else 1.2 / math.sqrt(array.shape[1])
        array[...] = centre + std * rng.standard_normal(array.shape)


def batch(config, seed=1):
    """Two microbatches of two sequences, some targets masked, one document boundary."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config["vocab_size"], (M, B * T), dtype=np.int32)
    targets = rng.integers(0, config["vocab_size"], (M, B * T), dtype=np.int32)
    targets[rng.random((M, B * T)) < 0.2] = -1
    positions = np.tile(np.arange(T, dtype=np.int32), (M, B))
    positions[0, 5:T] = np.arange(T - 5)  # the second document of the first sequence
    segments = np.array([0, 5, T, 2 * T, 0, T, 2 * T], np.int32)
    counts = np.array([3, 2], np.int32)
    rows = np.zeros((M, B * T), np.uint64)
    return dict(tokens=tokens, targets=targets, positions=positions, row_ids=rows,
                segments=segments, segment_counts=counts)  # fmt: skip


# Committed results of PyTorch in float64 for two of the models (tests/golden/make_golden.py).
FILE = Path(__file__).resolve().parent.parent / "golden" / "parity.npz"
GOLDEN = {
    "llama": dict(base_config(hidden_size=16, intermediate_size=24, head_dim=4, rope_dims=4,
                              attention_scale=0.5, vocab_size=41), exits=HEADS["mixed"]),
    "gpt2": dict(gpt2_config(hidden_size=16, intermediate_size=24, head_dim=4,
                             attention_scale=0.5, vocab_size=41), exits=HEADS["mlp"]),
}  # fmt: skip
GOLDEN_STEPS = dict(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-4, weight_decay=0.1, clip=1.0)


def golden_weights(config):
    """Loss weight of each exit."""
    return [0.25 + 0.1 * e for e in range(len(config["exits"]))]
