"""The NumPy model of these tests is right: Transformers gives the same logits in float64."""

import numpy as np
import pytest

from eellm.config import ModelConfig
from tests.infer.reference import Reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 51,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
KINDS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}, {}),
    "mistral": (
        "MistralConfig",
        {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 8},
        {"sliding_window": 5, "head_dim": 8},
    ),
    "qwen3": (
        "Qwen3Config",
        {"num_key_value_heads": 2, "head_dim": 8},
        {"qk_norm": True, "head_dim": 8},
    ),
    "cohere": (
        "CohereConfig",
        {"logit_scale": 1.0, "num_key_value_heads": 2},
        {
            "norm": "layernorm",
            "parallel_residual": True,
            "shared_norm": True,
            "rope_interleaved": True,
            "tie_word_embeddings": True,
        },
    ),
}


def _hf(name, options):
    config = getattr(transformers, name)(**{**SIZES, **options}, attn_implementation="eager")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def _hf_logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()


def _same(ours, theirs):
    # Transformers computes rotary angles and norms in float32 even in a float64 model.
    return np.abs(ours - theirs).max() < 2.0**-18 * np.abs(theirs).max()


TOKENS = np.random.default_rng(0).integers(0, 51, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_like(kind):
    name, options, ours = KINDS[kind]
    model = _hf(name, options)
    theta = float(model.config.rope_parameters["rope_theta"])
    values = {**SIZES, **ours, "num_key_value_heads": 2, "rope_theta": theta}
    values["norm_eps"] = getattr(model.config, "rms_norm_eps", None) or model.config.layer_norm_eps
    core = ModelConfig(**values).to_core()
    parameters = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    reference = Reference(core, parameters)
    wanted = _hf_logits(model, TOKENS)
    assert _same(reference.logits(TOKENS)[-1], wanted)
    broken = Reference({**core, "rope_interleaved": not core["rope_interleaved"]}, parameters)
    assert not _same(broken.logits(TOKENS)[-1], wanted)


def test_gpt2():
    options = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 64}
    config = transformers.GPT2Config(
        vocab_size=51, bos_token_id=0, eos_token_id=0, attn_implementation="eager", **options
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    core = ModelConfig.gpt2(
        **{key: SIZES[key] for key in SIZES if not key.endswith("_id")}
    ).to_core()
    reference = Reference(core, _gpt2_names(state))
    assert _same(reference.logits(TOKENS)[-1], _hf_logits(model, TOKENS))


def _gpt2_names(state):
    """Transformers' names and [in, out] matrices to Llama's."""
    result = {}
    pairs = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    pairs |= {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj"}
    pairs |= {"mlp.c_proj": "mlp.down_proj", "ln_f": "model.norm"}
    for key, value in state.items():
        part, kind = key.removeprefix("transformer.").rsplit(".", 1)
        layer = ""
        if part.startswith("h."):
            _, number, part = part.split(".", 2)
            layer = f"model.layers.{number}."
        matrix = kind == "weight" and value.ndim == 2
        if part == "attn.c_attn":
            for name, piece in zip("qkv", np.split(value, 3, axis=-1), strict=True):
                result[f"{layer}self_attn.{name}_proj.{kind}"] = piece.T if matrix else piece
        elif part in pairs:
            result[f"{layer}{pairs[part]}.{kind}"] = value.T if matrix else value
        elif part in ("wte", "wpe"):
            name = {"wte": "embed_tokens", "wpe": "embed_positions"}[part]
            result[f"model.{name}.weight"] = value
    return result
