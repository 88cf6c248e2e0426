"""config.json of a Hugging Face directory to and from ModelConfig."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from eellm.config import (
    ACTIVATIONS,
    EXITS_FORMAT_VERSION,
    FAMILIES,
    FAMILY_KINDS,
    ExitConfig,
    ModelConfig,
    unserved,
)
from eellm.errors import Shown, invalid

FORMAT_VERSION = 1

# Keys that any config.json may have and that say nothing about the architecture.
_GENERIC = frozenset(
    "architectures torch_dtype dtype transformers_version pad_token_id use_cache auto_map "
    "_name_or_path".split()
)
_GPT2_SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
_GPT2_VALUES = {  # our name, and what Transformers takes where the key is missing
    "n_positions": ("max_position_embeddings", 1024),
    "activation_function": ("hidden_act", "gelu_new"),
    "resid_pdrop": ("resid_pdrop", 0.1),
    "embd_pdrop": ("embd_pdrop", 0.1),
    "attn_pdrop": ("attn_pdrop", 0.1),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "initializer_range": ("initializer_range", 0.02),
    "bos_token_id": ("bos_token_id", 50256),
    "eos_token_id": ("eos_token_id", 50256),
    "tie_word_embeddings": ("tie_word_embeddings", True),
}
_GPT2_REFUSED = (
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "add_cross_attention",
)
_LLAMA_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_LLAMA_VALUES = {
    "num_key_value_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "hidden_act": ("hidden_act", "silu"),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
    "embd_pdrop": ("embd_pdrop", 0.0),
    "attention_dropout": ("attn_pdrop", 0.0),
    "resid_pdrop": ("resid_pdrop", 0.0),
}

_NULLABLE = ("bos_token_id", "eos_token_id")  # null means none, not the default


class _Source:
    """The keys of a config.json, of which those not taken are kept."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.rest = dict(values)

    def take(self, key: str, default: Any = None) -> Any:
        return self.rest.pop(key, default)

    def values(self, names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
        result = {}
        for key, (ours, default) in names.items():
            value = self.take(key, default)
            result[ours] = default if value is None and key not in _NULLABLE else value
        return result

    def size(self, key: str) -> Any:
        if self.rest.get(key) is None:
            raise invalid(f"{key} is missing", "an integer", Shown("none"))
        return self.rest.pop(key)


def read(values: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of the content of a config.json."""
    if not isinstance(values, Mapping):
        raise invalid("the config is not a table", "a JSON object", type(values).__name__)
    source = _Source(values)
    model_type = source.take("model_type")
    if model_type not in FAMILIES:
        raise unserved(model_type)
    if values.get("quantization_config") is not None:
        raise NotImplementedError(
            "quantization_config is not served (expected float32, float16 or bfloat16 weights); "
            "save the model without quantisation first"
        )
    exits = _read_exits(source.take("early_exits"))
    reader = {"gpt2": _read_gpt2, "llama": _read_llama, "eellm": _read_own}[model_type]
    fields_read = {**FAMILY_KINDS[model_type], **reader(source)}
    source.take("architectures")
    return ModelConfig(**fields_read, model_type=model_type, exits=exits, extra=source.rest)


def _read_exits(value: Any) -> tuple[ExitConfig, ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not isinstance(value.get("exits"), list):
        raise invalid("early_exits is invalid", "a table with format_version and exits", value)
    if value.get("format_version") != EXITS_FORMAT_VERSION:
        raise invalid(
            "early_exits.format_version is invalid",
            f"{EXITS_FORMAT_VERSION}",
            value.get("format_version"),
            "the model was written by a newer eellm; update it",
        )
    return tuple(ExitConfig.from_dict(each) for each in value["exits"])


def _read_gpt2(source: _Source) -> dict[str, Any]:
    for key in _GPT2_REFUSED:
        if source.take(key):
            raise NotImplementedError(
                f"{key} is not served (expected false, got true); choose a GPT-2 without it"
            )
    result = {ours: source.size(key) for key, ours in _GPT2_SIZES.items()}
    result.update(source.values(_GPT2_VALUES))
    source.take("n_ctx")
    result["intermediate_size"] = source.take("n_inner")
    if not source.take("scale_attn_weights", True):
        result["attention_scale"] = 1.0
    _check_activation("activation_function", result["hidden_act"])
    return result


def _read_llama(source: _Source) -> dict[str, Any]:
    result = {key: source.size(key) for key in _LLAMA_SIZES}
    result.update(source.values(_LLAMA_VALUES))
    _check_activation("hidden_act", result["hidden_act"])
    attention, mlp = source.take("attention_bias", False), source.take("mlp_bias", False)
    result.update(bias_q=attention, bias_kv=attention, bias_o=attention)
    result.update(bias_up=mlp, bias_down=mlp)
    result.update(_read_rope(source))
    return result


def _check_activation(key: str, value: Any) -> None:
    if value not in tuple(ACTIVATIONS):
        raise NotImplementedError(
            f"{key} {value!r} is not served (expected one of {', '.join(ACTIVATIONS)}); choose a "
            "model with one of those"
        )


def _read_rope(source: _Source) -> dict[str, Any]:
    """RoPE as Transformers 4 wrote it (rope_theta, rope_scaling) or as 5 does (rope_parameters)."""
    old, new = source.take("rope_scaling"), source.take("rope_parameters")
    parameters = old or new or {}
    if not isinstance(parameters, Mapping):
        raise invalid("rope_scaling is not a table", "a table with rope_type", parameters)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise NotImplementedError(
            "rope_parameters of their own for each kind of layer are not served; choose a model "
            "whose layers share them"
        )
    scaling = dict(parameters)
    result = {}
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        outside = source.take(key, default)
        inside = scaling.pop(key, None)
        result[key] = outside if inside is None else inside
    original = source.take("original_max_position_embeddings")
    if original is not None and scaling.get("rope_type", scaling.get("type")) in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = original
    return {**result, "rope_scaling": scaling or None}


def _own_fields() -> list[str]:
    return [each.name for each in fields(ModelConfig) if each.name not in _NOT_OWN]


_NOT_OWN = frozenset(("model_type", "exits", "extra"))


def _read_own(source: _Source) -> dict[str, Any]:
    version = source.take("format_version")
    if version != FORMAT_VERSION:
        raise invalid(
            "format_version is invalid",
            f"{FORMAT_VERSION}",
            version,
            "the model was written by a newer eellm; update it",
        )
    known = _own_fields()
    result = {key: source.take(key) for key in known if key in source.rest}
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if key not in result:
            raise invalid(f"{key} is missing", "an integer", Shown("none"))
    for key in source.rest:
        if key not in _GENERIC:
            close = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {close[0]}?" if close else "remove it"
            raise invalid("unknown key of model_type eellm", "a known one", key, advice)
    return result


def write(config: ModelConfig) -> dict[str, Any]:
    """The content of config.json: first what the file came with, then the fields."""
    values: dict[str, Any] = {}
    if config.model_type == "gpt2":
        values.update(_write_gpt2(config))
    elif config.model_type == "llama":
        values.update(_write_llama(config))
    else:
        values.update(architectures=["EellmForCausalLM"], model_type="eellm")
        values["format_version"] = FORMAT_VERSION
        values.update({key: _plain(getattr(config, key)) for key in _own_fields()})
    if config.exits:
        exits = [each.to_dict() for each in config.exits]
        values["early_exits"] = {"format_version": EXITS_FORMAT_VERSION, "exits": exits}
    kept = {key: value for key, value in config.extra.items() if key not in values}
    return {**values, **kept}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    values.update({key: getattr(config, ours) for key, ours in _GPT2_SIZES.items()})
    values.update({key: _plain(getattr(config, ours)) for key, (ours, _) in _GPT2_VALUES.items()})
    inner = config.intermediate_size
    values["n_inner"] = None if inner == 4 * config.hidden_size else inner
    values["scale_attn_weights"] = config.attention_scale != 1.0 or config.head_dim == 1
    return values


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    values.update({key: getattr(config, key) for key in _LLAMA_SIZES})
    for key, (ours, _) in _LLAMA_VALUES.items():
        value = _plain(getattr(config, ours))
        if key not in ("embd_pdrop", "resid_pdrop") or value:  # Transformers' Llama has neither
            values[key] = value
    values["attention_bias"], values["mlp_bias"] = config.bias_q, config.bias_up
    # The older form, which every version of Transformers reads.
    values["rope_theta"] = config.rope_theta
    values["rope_scaling"] = dict(config.rope_scaling) if config.rope_scaling else None
    return values
