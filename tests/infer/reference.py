"""The model in NumPy, in any precision: every option of a config, no cache, no early leaving.

Independent of the native core: it reads the dict of `ModelConfig.to_core()` and parameters by name.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _activation(name, x):
    if name == "relu":
        return np.maximum(x, 0)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return (0.5 * x * (1 + _erf(x / math.sqrt(2)))).astype(x.dtype)
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


class Reference:
    """`core`: the dict of a config; `parameters`: arrays by name; dtype: of the arithmetic."""

    def __init__(self, core, parameters, dtype=np.float64):
        self.c, self.dtype = core, np.dtype(dtype).type
        self.kv = {}  # keys and values of the last run, [T, K, D] by the name of their attention
        self.p = {name: np.asarray(value).astype(dtype) for name, value in parameters.items()}

    def _linear(self, x, name, key="weight"):
        y = x @ self.p[f"{name}.{key}"].T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def _norm(self, x, name):
        c = self.c
        if c["norm"] == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.dtype(c["norm_eps"]))
        y = x / scale * (self.p[f"{name}.weight"] + self.dtype(c["norm_offset"]))
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def _rotate(self, x):
        """x [H, T, D]. The angle is a float32 product by definition; the rest is exact."""
        c = self.c
        if c["positions"] != "rope":
            return x
        dims = c["rope_dims"]
        positions = np.arange(x.shape[1], dtype=np.float32)[:, None]
        angle = (positions * np.asarray(c["rope_freq"], np.float32)).astype(np.float64)
        scale = np.float32(c["rope_scale"])
        cos = (np.cos(angle) * scale).astype(self.dtype)
        sin = (np.sin(angle) * scale).astype(self.dtype)
        half = dims // 2
        first = slice(0, dims, 2) if c["rope_interleaved"] else slice(0, half)
        second = slice(1, dims, 2) if c["rope_interleaved"] else slice(half, dims)
        y = x.copy()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        return y

    def _heads(self, x, name, count, norm):
        y = self._linear(x, name).reshape(len(x), count, self.c["head_dim"]).transpose(1, 0, 2)
        if self.c["qk_norm"] and norm:
            y = self._norm(y, norm)
        return self._rotate(y) if norm else y

    def _attention(self, x, name, window):
        c = self.c
        q = self._heads(x, f"{name}.q_proj", c["num_heads"], f"{name}.q_norm")
        k = self._heads(x, f"{name}.k_proj", c["num_kv_heads"], f"{name}.k_norm")
        v = self._heads(x, f"{name}.v_proj", c["num_kv_heads"], None)
        self.kv[name] = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
        groups = c["num_heads"] // c["num_kv_heads"]
        k_all, v_all = np.repeat(k, groups, 0), np.repeat(v, groups, 0)
        scores = q @ k_all.transpose(0, 2, 1) * self.dtype(c["attention_scale"])
        if c["attention_softcap"]:
            cap = self.dtype(c["attention_softcap"])
            scores = cap * np.tanh(scores / cap)
        row, column = np.ogrid[: len(x), : len(x)]
        seen = column <= row
        if window:
            seen &= row - column < window
        weights = softmax(np.where(seen, scores, -np.inf))
        joined = (weights @ v_all).transpose(1, 0, 2).reshape(len(x), -1)
        return self._linear(joined, f"{name}.o_proj")

    def _mlp(self, x, name):
        c = self.c
        up = self._linear(x, f"{name}.up_proj")
        if c["gated"]:
            inner = _activation(c["activation"], self._linear(x, f"{name}.gate_proj")) * up
        else:
            inner = _activation(c["activation"], up)
        return self._linear(inner, f"{name}.down_proj")

    def _block(self, x, name, window):
        """(state between attention and MLP, its norm, output)."""
        n1 = self._norm(x, f"{name}.input_layernorm")
        mid = x + self._attention(n1, f"{name}.self_attn", window)
        if self.c["shared_norm"]:
            n2 = n1
        else:
            source = x if self.c["parallel_residual"] else mid
            n2 = self._norm(source, f"{name}.post_attention_layernorm")
        return mid, n2, mid + self._mlp(n2, f"{name}.mlp")

    def _output(self, exit_index):
        exits = self.c["exits"]
        if exit_index == len(exits):
            return self.p[
                "model.embed_tokens.weight" if self.c["tie_embeddings"] else "lm_head.weight"
            ]
        output = exits[exit_index]["output"]
        if output >= 0:
            return self._output(output)
        if output == -1:
            return self.p[f"exits.{exit_index}.head.weight"]
        return self.p["model.embed_tokens.weight"] if output == -2 else self._output(len(exits))

    def _head(self, index, hidden):
        kind = self.c["exits"][index]["norm"] if index < len(self.c["exits"]) else "final"
        if kind != "none":
            hidden = self._norm(hidden, f"exits.{index}.norm" if kind == "own" else "model.norm")
        logits = hidden @ self._output(index).T
        cap = self.dtype(self.c["logit_softcap"])
        return cap * np.tanh(logits / cap) if cap else logits

    def _exit_hidden(self, index, x, mid, n2, window):
        exit = self.c["exits"][index]
        if exit["branch"] == "mlp":
            return mid + self._mlp(n2, f"exits.{index}.mlp")
        if exit["branch"] == "block":
            return self._block(x, f"exits.{index}.block", window)[2]
        return x

    def logits(self, tokens):
        """[E, T, V] of one sequence, the final exit last."""
        c, tokens = self.c, np.asarray(tokens)
        x = self.p["model.embed_tokens.weight"][tokens] * self.dtype(c["embedding_scale"])
        if c["positions"] == "learned":
            x = x + self.p["model.embed_positions.weight"][: len(tokens)]
        hidden = {}
        for layer in range(c["num_layers"]):
            window = c["window"][layer]
            mid, n2, y = self._block(x, f"model.layers.{layer}", window)
            for i, exit in enumerate(c["exits"]):
                if exit["layer"] == layer + 1:
                    state = x if exit["before"] else y
                    hidden[i] = self._exit_hidden(i, state, mid, n2, window)
            x = y
        hidden[len(c["exits"])] = x
        return np.stack([self._head(i, hidden[i]) for i in range(len(hidden))])
