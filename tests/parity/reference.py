"""The model written once more with PyTorch: every option of struct ee_config, every head, autograd.

It reads the same mapping that the core reads (`ModelConfig.to_core`) and parameters by their names,
so that float32 and float64 runs of it are the oracle for logits, losses and gradients.
"""

import numpy as np
import torch
import torch.nn.functional as F


class Reference:
    """The model over a mapping name -> torch tensor (leaf tensors where gradients are wanted)."""

    def __init__(self, config, parameters):
        self.c, self.p = config, parameters

    def norm(self, x, name):
        c, p = self.c, self.p
        weight = p[name + ".weight"] + c["norm_offset"]
        if c["norm"] == "layernorm":
            return F.layer_norm(x, x.shape[-1:], weight, p.get(name + ".bias"), c["norm_eps"])
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c["norm_eps"]) * weight

    def linear(self, x, name):
        return F.linear(x, self.p[name + ".weight"], self.p.get(name + ".bias"))

    def rotate(self, x, positions):
        """x [B, H, T, D], positions [B, T]."""
        c = self.c
        if c["positions"] != "rope":
            return x
        half = c["rope_dims"] // 2
        angle = positions.float()[..., None] * torch.tensor(c["rope_freq"][:half])
        cos = (angle.double().cos() * c["rope_scale"]).to(x.dtype)[:, None]
        sin = (angle.double().sin() * c["rope_scale"]).to(x.dtype)[:, None]
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        if c["rope_interleaved"]:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turned[..., :half], turned[..., half:]
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned, rest), -1)

    def attention(self, h, prefix, layer, positions, segments):
        c = self.c
        batch, time, _ = h.shape
        heads, kv, width = c["num_heads"], c["num_kv_heads"], c["head_dim"]
        q = self.linear(h, prefix + "self_attn.q_proj").view(batch, time, heads, width)
        k = self.linear(h, prefix + "self_attn.k_proj").view(batch, time, kv, width)
        v = self.linear(h, prefix + "self_attn.v_proj").view(batch, time, kv, width)
        if c["qk_norm"]:
            q = self.norm(q, prefix + "self_attn.q_norm")
            k = self.norm(k, prefix + "self_attn.k_norm")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * c["attention_scale"]
        if c["attention_softcap"]:
            scores = c["attention_softcap"] * torch.tanh(scores / c["attention_softcap"])
        index = torch.arange(time)
        seen = index[None, :] <= index[:, None]
        if c["window"][layer]:
            seen = seen & (index[:, None] - index[None, :] < c["window"][layer])
        seen = seen[None] & (segments[:, :, None] == segments[:, None, :])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, heads * width)
        return self.linear(out, prefix + "self_attn.o_proj")

    def mlp(self, h, prefix):
        act = {
            "relu": F.relu, "gelu": F.gelu, "silu": F.silu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        }[self.c["activation"]]  # fmt: skip
        up = self.linear(h, prefix + "mlp.up_proj")
        if self.c["gated"]:
            up = act(self.linear(h, prefix + "mlp.gate_proj")) * up
        else:
            up = act(up)
        return self.linear(up, prefix + "mlp.down_proj")

    def block(self, x, prefix, layer, positions, segments):
        """(output, state between attention and MLP)"""
        h = self.norm(x, prefix + "input_layernorm")
        attention = self.attention(h, prefix, layer, positions, segments)
        norm2 = prefix + "post_attention_layernorm"
        if self.c["parallel_residual"]:
            if not self.c["shared_norm"]:
                h = self.norm(x, norm2)
            return x + attention + self.mlp(h, prefix), None
        mid = x + attention
        return mid + self.mlp(self.norm(mid, norm2), prefix), mid

    def head(self, e, hidden, positions, segments):
        c = self.c
        exit = c["exits"][e]
        prefix = f"exits.{e}."
        if exit["branch"] == "mlp":
            norm2 = f"model.layers.{exit['layer'] - 1}.post_attention_layernorm"
            hidden = hidden + self.mlp(self.norm(hidden, norm2), prefix)
        elif exit["branch"] == "block":
            args = (prefix + "block.", exit["layer"] - 1, positions, segments)
            hidden = self.block(hidden, *args)[0]
        if exit["norm"] == "own":
            hidden = self.norm(hidden, prefix + "norm")
        elif exit["norm"] == "final":
            hidden = self.norm(hidden, "model.norm")
        source = e
        while c["exits"][source]["output"] >= 0:
            source = c["exits"][source]["output"]
        final = "model.embed_tokens.weight" if c["tie_embeddings"] else "lm_head.weight"
        output = c["exits"][source]["output"]
        name = {-1: f"exits.{source}.head.weight", -2: "model.embed_tokens.weight", -3: final}
        return self.cap(hidden @ self.p[name[output]].T)

    def cap(self, logits):
        cap = self.c["logit_softcap"]
        return cap * torch.tanh(logits / cap) if cap else logits

    def logits(self, tokens, positions=None, segments=None):
        """Logits of every exit, the final one last: list of [B, T, V]."""
        c, p = self.c, self.p
        tokens = torch.as_tensor(np.asarray(tokens)).long()
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        positions = torch.as_tensor(positions).long()
        if segments is None:
            segments = torch.zeros_like(tokens)
        x = p["model.embed_tokens.weight"][tokens] * c["embedding_scale"]
        if c["positions"] == "learned":
            x = x + p["model.embed_positions.weight"][positions]
        states = {0: x}
        for layer in range(c["num_layers"]):
            x, mid = self.block(x, f"model.layers.{layer}.", layer, positions, segments)
            states[2 * layer + 1], states[2 * layer + 2] = mid, x
        out = []
        for e, exit in enumerate(c["exits"]):
            depth = 2 * exit["layer"] - 2 * exit["before"] - (exit["branch"] == "mlp")
            out.append(self.head(e, states[depth], positions, segments))
        final = "model.embed_tokens.weight" if c["tie_embeddings"] else "lm_head.weight"
        out.append(self.cap(self.norm(x, "model.norm") @ p[final].T))
        return out

    def loss(self, logits, targets, weights, temperature=(), dynamic=False):
        """(weighted sum, [cross-entropy of each exit]) as DESIGN: means over unmasked tokens."""
        targets = torch.as_tensor(np.asarray(targets)).long().flatten()
        mask = targets >= 0
        total, losses = 0.0, []
        for e, z in enumerate(logits):
            early = e < len(logits) - 1
            if early and len(temperature):
                z = z / temperature[e]
            z = z.flatten(0, 1)[mask]
            ce = F.cross_entropy(z, targets[mask], reduction="none")
            losses.append(ce.mean())
            if early and dynamic:
                ce = ce * z.softmax(-1).max(-1).values.detach()
            total = total + (weights[e] if early else 1.0) * ce.mean()
        return total, losses


def parameters_of(model, dtype=torch.float32):
    """Copies of a core model's parameters, as leaves."""
    return {
        row["name"]: torch.tensor(np.asarray(model.parameter(row["name"])), dtype=dtype)
        .clone()
        .requires_grad_()
        for row in model.table
    }
