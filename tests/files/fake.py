"""A stand-in for the native model and trainer: a table and arrays."""

import numpy as np


class FakeModel:
    """Rows as csrc/model/params.h has them; what is left out of a row gets its usual value."""

    def __init__(self, rows, seed=0):
        self.table = [filled(row) for row in rows]
        rng = np.random.default_rng(seed)
        self.arrays = {
            row["name"]: rng.standard_normal(row["shape"], dtype=np.float32) for row in self.table
        }

    def parameter(self, name):
        return self.arrays[name]


def filled(row):
    usual = {
        "offset": 0,
        "held": True,
        "owned": True,
        "decay": True,
        "frozen": False,
        "tied": False,
        "layer": 0,
        "exit": -1,
        "source": row["name"],
        "source_row": 0,
        "source_rows": row["shape"][0],
        "transposed": False,
    }
    return {**usual, **row}


class FakeTrainer:
    def __init__(self, model, seed=1):
        self.steps = 0
        self.first = FakeModel(model.table, seed).arrays
        self.second = FakeModel(model.table, seed + 1).arrays

    def moment1(self, name):
        return self.first[name]

    def moment2(self, name):
        return self.second[name]


def gpt2_rows(width=4, vocab=6, exits=False):
    """Some parameters of a one-layer GPT-2: fused, transposed, plain, and of an exit."""
    layer = "transformer.h.0.attn."
    embedding = {"name": "model.embed_tokens.weight", "shape": (vocab, width)}
    rows = [{**embedding, "source": "transformer.wte.weight"}]
    for i, part in enumerate("qkv"):
        fused = {"source_row": i * width, "source_rows": 3 * width}
        name = f"model.layers.0.self_attn.{part}_proj"
        rows.append(
            {
                "name": f"{name}.weight",
                "shape": (width, width),
                "source": f"{layer}c_attn.weight",
                "transposed": True,
                **fused,
            }
        )
        rows.append(
            {"name": f"{name}.bias", "shape": (width,), "source": f"{layer}c_attn.bias", **fused}
        )
    rows.append(
        {
            "name": "model.layers.0.mlp.up_proj.weight",
            "shape": (2 * width, width),
            "source": "transformer.h.0.mlp.c_fc.weight",
            "transposed": True,
        }
    )
    if exits:
        rows.append({"name": "exits.0.norm.weight", "shape": (width,), "exit": 0})
    return rows
