"""Small models and token streams that training tests share."""

import numpy as np

import eellm

VOCAB = 40


def small_config(**changes):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "exits": [{"layer": 1, "head": "norm"}],
    }
    return eellm.ModelConfig.llama(**{**values, **changes})


def small_train(**changes):
    values = {
        "steps": 12,
        "seq_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "learning_rate": 1e-2,
    }
    values["warmup_steps"] = min(2, changes.get("steps", values["steps"]) - 1)
    return eellm.TrainConfig(**{**values, **changes})


def text_tokens(count=4000, seed=0):
    """Tokens that follow each other by a rule with some noise, so that there is much to learn."""
    rng = np.random.default_rng(seed)
    tokens = np.empty(count, np.int32)
    tokens[0] = 1
    noise = rng.random(count) < 0.1
    drawn = rng.integers(0, VOCAB, count)
    for i in range(1, count):
        tokens[i] = drawn[i] if noise[i] else (5 * tokens[i - 1] + 3) % VOCAB
    return tokens


def parameters_of(model):
    return {name: np.array(values) for name, values in model.parameters().items()}


def same_parameters(left, right):
    return all(np.array_equal(left[name], right[name]) for name in left) and len(left) == len(right)
