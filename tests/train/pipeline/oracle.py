"""Gradients by PyTorch in one process, split by microbatch, exit and use of a tied parameter."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from tests.parity.reference import Reference
from tests.train.pipeline.common import MODELS, data_of, values_of

USE_EMBEDDING, USE_EXIT = 0, 1  # as csrc/model/params.h numbers uses


class Uses(dict):
    """Parameters of which each use of the tied ones is a leaf of its own."""

    def __init__(self, parameters, tied):
        super().__init__(parameters)
        self.tied, self.use, self.leaves = tied, USE_EMBEDDING, {}

    def __getitem__(self, name):
        use = self.use if name in self.tied else None
        value = super().__getitem__(name)
        return self.leaves.setdefault((name, use), value.clone().requires_grad_())

    def get(self, name, default=None):
        return self[name] if name in self else default


class Split(Reference):
    """The model, which says which head uses a parameter."""

    def head(self, e, hidden, positions, segments):
        self.p.use = USE_EXIT + e
        logits = super().head(e, hidden, positions, segments)
        self.p.use = USE_EXIT + e + 1  # the final head comes last
        return logits


def forward(config, values, tied, data, m, dtype):
    """The model's leaves, and the cross-entropies [exit][token] of a microbatch."""
    parameters = {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
    model = Split(config, Uses(parameters, tied))
    low = int((data["segment_counts"][:m] + 1).sum())
    bounds = data["segments"][low : low + data["segment_counts"][m] + 1]
    segments = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    logits = model.logits(data["tokens"][m : m + 1], data["positions"][m : m + 1],
                          torch.tensor(segments)[None])  # fmt: skip
    targets = torch.tensor(data["targets"][m]).long()
    losses = [F.cross_entropy(z[0], targets, reduction="none", ignore_index=-1) for z in logits]
    return model.p.leaves, losses


def gradients_of(leaves, loss):
    """{(name, use): gradient}, None without a dependence; use: None for a parameter with one."""
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {key: value.numpy() for key, value in zip(leaves, found, strict=True)
            if value is not None}  # fmt: skip


class Problem:
    """A model, its parameters, fixed microbatches, and the gradients of each of them."""

    def __init__(self, config, microbatches, seed=0, masked=0.0):
        self.config, self.values = config, values_of(config, seed)
        self.data = data_of(config, microbatches, seed + 50, masked)
        self.weights = [0.3 + 0.1 * e for e in range(len(config["exits"]))]
        self.tokens = (self.data["targets"] >= 0).sum(1)
        self._split = {}

    def split(self, dtype, tied):
        """[microbatch][exit]{(name, use): gradient of the weighted sum over tokens}"""
        if (dtype, tied) not in self._split:
            self._split[dtype, tied] = [
                self._of_microbatch(m, dtype, tied) for m in range(len(self.tokens))
            ]
        return self._split[dtype, tied]

    def _of_microbatch(self, m, dtype, tied):
        leaves, losses = forward(self.config, self.values, tied, self.data, m, dtype)
        weights = [*self.weights, 1.0]
        return [gradients_of(leaves, w * loss.sum())
                for w, loss in zip(weights, losses, strict=True)]  # fmt: skip


@functools.cache
def problem_of(model, microbatches, masked=0.0):
    config = dict(MODELS[model])
    config.update(embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    return Problem(config, microbatches, masked=masked)


def rms(value):
    return float(np.sqrt(np.mean(np.asarray(value, np.float64) ** 2)))


def errors(table, found, plain, exact):
    """By name, the root mean square error of `found` against what it may be: twice that of
    PyTorch's float32, and one rounding of the largest gradient of the same layer."""
    scale = {}
    for row in table:
        key = row["layer"], row["exit"]
        scale[key] = max(scale.get(key, 0.0), np.abs(exact[row["name"]]).max())
    shares = {}
    for row in table:
        name = row["name"]
        limit = 2 * rms(plain[name] - exact[name])
        limit += 2.0**-23 * scale[row["layer"], row["exit"]]
        shares[name] = rms(found[name] - exact[name]) / limit
    return shares
