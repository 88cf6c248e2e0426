"""Runs of the training loop on ranks that are threads."""

import functools

import numpy as np

import eellm

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
# Every kind of head, on ranks of their own with eight layers on four.
MIXED = (
    {"layer": 1, "position": "before", "head": "embedding"},
    {"layer": 2, "position": "after", "head": "norm"},
    {"layer": 3, "position": "after", "branch": "mlp", "norm": "final", "output": "final"},
    {"layer": 5, "position": "before", "head": "block"},
    {"layer": 7, "position": "after", "norm": "own", "output": 1},
)


def make_config(family, vocab_size=97, exits=MIXED):
    """GPT-2 with tied, Llama with untied embeddings."""
    tied = family == "gpt2"
    return eellm.ModelConfig.create(
        family, vocab_size=vocab_size, tie_word_embeddings=tied, exits=list(exits), **SIZES
    )


def train_config(steps, **changes):
    values = {
        "steps": steps,
        "seq_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 12,
        "learning_rate": 3e-3,
        "schedule": "constant",
        "exit_weights": 0.3,
    }
    return eellm.TrainConfig(**(values | changes))


def run(ranks, config, train, tokens, *, inspect=None, **options):
    """What each rank's history says: (kind, step, losses, gradient norm), and what `inspect` finds
    in its trainer."""
    parallel = eellm.ParallelConfig(timeout=60.0, **options.pop("parallel", {}))

    def work(group):
        model = eellm.Model.from_config(config, seed=3, threads=1, group=group)
        trainer = eellm.Trainer(model, train, tokens, progress="none", **options)
        history = trainer.train()
        curve = [(r["kind"], r["step"], r["losses"], r.get("grad_norm")) for r in history]
        return curve, inspect(trainer) if inspect else None

    return eellm.run_local(ranks, work, parallel)


@functools.cache
def random_tokens(vocab_size=97, count=6000):
    return np.random.default_rng(11).integers(0, vocab_size, count)
