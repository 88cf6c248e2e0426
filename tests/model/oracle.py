"""Random models of Transformers, and their logits in float32 and in true float64."""

import numpy as np

SMALL = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA = {
    **SMALL,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {**SMALL, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}


def random_model(torch, config, seed=0, std=0.15):
    """A model whose every parameter is random, biases and norms too."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * std)
            if "norm" in name or "ln_" in name:
                parameter.add_("weight" in name)
    return model


def load(folder, dtype="float32"):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


def in_float64(model):
    """The model in float64; Llama's norm and rotation, which Transformers always computes in
    float32, too."""
    import torch

    model = model.double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = _Norm(module)
        elif type(module).__name__ == "LlamaRotaryEmbedding":
            frequencies = module.inv_freq.double()
            scale = module.attention_scaling
            module.forward = lambda x, position_ids, f=frequencies, s=scale: _rotation(
                torch, position_ids, f, s
            )
    return model


class _Norm:
    def __init__(self, module):
        self.weight, self.eps = module.weight, module.variance_epsilon

    def __call__(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def _rotation(torch, position_ids, frequencies, scale):
    angles = position_ids[..., None].double() * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos() * scale, angles.sin() * scale


def logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


def assert_twice(got, single, double):
    """Our largest error against float64 is at most twice that of Transformers in float32."""
    ours, theirs = np.abs(got - double).max(), np.abs(single - double).max()
    assert ours <= 2 * theirs, f"error {ours:.3g}, Transformers {theirs:.3g}"
