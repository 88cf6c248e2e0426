"""What a model is: sizes, kinds and early exits, with Hugging Face's keys as field names."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import numpy as np

from eellm import rope
from eellm.errors import Shown, check_integer, check_one_of, invalid
from eellm.exits import MAX_EXITS, MAX_LAYERS, ExitConfig

FAMILIES = ("eellm", "llama", "gpt2")
EXITS_FORMAT_VERSION = 1

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
LAYER_TYPES = ("full_attention", "sliding_attention")


_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 24,
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "norm_eps": (0, 1),
    "norm_offset": (-1e6, 1e6),
    "rope_theta": (2, 1e12),
    "partial_rotary_factor": (0, 1),
    "attention_scale": (1e-6, 1e6),
    "attn_logit_softcapping": (1e-6, 1e6),
    "final_logit_softcapping": (1e-6, 1e6),
    "embedding_scale": (1e-6, 1e6),
    "embd_pdrop": (0, 0.999),
    "attn_pdrop": (0, 0.999),
    "resid_pdrop": (0, 0.999),
    "initializer_range": (0, 1e3),
}
_FLAGS = (
    "gated",
    "bias_q",
    "bias_kv",
    "bias_o",
    "bias_up",
    "bias_down",
    "norm_bias",
    "qk_norm",
    "parallel_residual",
    "shared_norm",
    "tie_word_embeddings",
    "rope_interleaved",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's architecture. `ModelConfig.llama(...)` and `.gpt2(...)` set a family's kinds.

    model_type "llama" and "gpt2" are what Transformers can load; "eellm" takes every combination.
    None means: num_key_value_heads as many as heads, head_dim hidden_size / heads,
    intermediate_size 4 hidden_size (8/3 where gated), attention_scale 1 / sqrt(head_dim).
    sliding_window holds for the layers that layer_types calls "sliding_attention", for all without
    layer_types. norm_offset is added to the weight of each norm. extra keeps what config.json says
    beyond these fields.
    """

    model_type: str = "eellm"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int = None  # type: ignore[assignment]
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    gated: bool = True
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    norm_offset: float = 0.0
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    partial_rotary_factor: float = 1.0
    rope_interleaved: bool = False
    tie_word_embeddings: bool = False
    bias_q: bool = False
    bias_kv: bool = False
    bias_o: bool = False
    bias_up: bool = False
    bias_down: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    shared_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    exits: tuple[ExitConfig, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)

    def __post_init__(self) -> None:
        """Fills in what is None, checks every field and all of them together."""
        self._check_family()
        self._fill()
        self._check_values()
        self._check_kinds()
        if self.rope_scaling is not None:
            scaling = rope.check_scaling(self.rope_scaling, self.max_position_embeddings)
            self._set("rope_scaling", None if scaling["rope_type"] == "default" else scaling)
        if self.positions == "rope":
            self._check_rope()
        self._check_layers()
        self._check_exits()
        if self.model_type == "llama":
            _check_llama(self)
        elif self.model_type == "gpt2":
            _check_gpt2(self)

    def _set(self, key: str, value: object) -> None:
        object.__setattr__(self, key, value)

    def _check_family(self) -> None:
        if self.model_type not in FAMILIES:
            raise unserved(self.model_type)

    def _fill(self) -> None:
        for key in ("hidden_size", "num_attention_heads"):
            check_integer(key, getattr(self, key), 1, _SIZES[key])
        if self.intermediate_size is None:
            wide = -(-8 * self.hidden_size // 3 // 64) * 64 if self.gated else 4 * self.hidden_size
            self._set("intermediate_size", wide)
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise invalid(
                    "num_attention_heads is invalid",
                    f"a divisor of hidden_size ({self.hidden_size})",
                    self.num_attention_heads,
                    "or set head_dim",
                )
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        if isinstance(self.exits, str | bytes | Mapping) or not hasattr(self.exits, "__iter__"):
            raise invalid("exits is invalid", "a list of early exits", self.exits)
        exits = [
            each if isinstance(each, ExitConfig) else ExitConfig.from_dict(each)
            for each in self.exits
        ]
        output = "embedding" if self.tie_word_embeddings else "final"
        exits = [replace(each, output=output) if each.output is None else each for each in exits]
        self._set("exits", tuple(exits))
        if isinstance(self.eos_token_id, list):
            self._set("eos_token_id", tuple(self.eos_token_id))
        if isinstance(self.layer_types, list):
            self._set("layer_types", tuple(self.layer_types))
        for key in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
            if getattr(self, key) == 0:
                self._set(key, None)
        self._set("extra", dict(self.extra))

    def _check_values(self) -> None:
        for key, limit in _SIZES.items():
            check_integer(key, getattr(self, key), 1, limit)
        if self.num_attention_heads % self.num_key_value_heads:
            raise invalid(
                "num_key_value_heads is invalid",
                f"a divisor of num_attention_heads ({self.num_attention_heads})",
                self.num_key_value_heads,
            )
        defaults = {each.name: each.default for each in fields(self)}
        for key, (low, high) in _NUMBERS.items():
            value = getattr(self, key)
            if value is None and defaults[key] is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not low <= value <= high:
                raise invalid(f"{key} is invalid", f"a number from {low:g} to {high:g}", value)
            self._set(key, float(value))
        for key in _FLAGS:
            if not isinstance(getattr(self, key), bool):
                raise invalid(f"{key} is invalid", "true or false", getattr(self, key))
        for key in ("bos_token_id", "eos_token_id"):
            value = getattr(self, key)
            for token in value if isinstance(value, tuple) else (value,):
                if token is not None:
                    check_integer(key, token, 0, 2**31 - 1)

    def _check_kinds(self) -> None:
        check_one_of("hidden_act", self.hidden_act, tuple(ACTIVATIONS))
        check_one_of("norm", self.norm, ("layernorm", "rmsnorm"))
        check_one_of("positions", self.positions, ("none", "learned", "rope"))
        if self.norm_bias and self.norm != "layernorm":
            raise invalid("norm_bias is invalid", "false: RMSNorm has no bias", True)
        if self.shared_norm and not self.parallel_residual:
            raise invalid("shared_norm is invalid", "false without parallel_residual", True)

    def _check_rope(self) -> None:
        if self.rope_dims < 2 or self.rope_dims % 2:
            raise invalid(
                "partial_rotary_factor is invalid",
                f"a share of head_dim ({self.head_dim}) that is an even number of channels",
                Shown(f"{self.partial_rotary_factor:g}, {self.rope_dims} channels"),
            )
        if not np.isfinite(self.rope_frequencies()[0]).all():
            raise invalid(
                "rope_theta or rope_scaling is invalid",
                "finite frequencies",
                Shown(f"{self.rope_theta:g}, {self.rope_scaling}"),
            )

    def _check_layers(self) -> None:
        if self.sliding_window is not None:
            check_integer("sliding_window", self.sliding_window, 1, 2**31 - 1)
        if self.layer_types is None:
            return
        if not isinstance(self.layer_types, tuple):
            raise invalid("layer_types is invalid", "a list", self.layer_types)
        if len(self.layer_types) != self.num_hidden_layers:
            raise invalid(
                "layer_types has the wrong length",
                f"one entry for each of the {self.num_hidden_layers} layers",
                len(self.layer_types),
            )
        for kind in self.layer_types:
            check_one_of("layer_types", kind, LAYER_TYPES)
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise invalid("sliding_window is missing", "a length, as layer_types names it", None)

    def _check_exits(self) -> None:
        if len(self.exits) > MAX_EXITS:
            raise invalid("exits is too long", f"at most {MAX_EXITS}", len(self.exits))
        for i, each in enumerate(self.exits):
            check_integer(f"layer of early exit {i}", each.layer, 1, self.num_hidden_layers)
            if each.branch == "mlp" and self.parallel_residual:
                raise invalid(
                    f"branch of early exit {i} is invalid",
                    "none or block in a model with parallel_residual",
                    each.branch,
                )
            if i and each.depth <= self.exits[i - 1].depth:
                before = self.exits[i - 1]
                raise invalid(
                    f"early exit {i} is out of order",
                    f"deeper than exit {i - 1}, {before.position} layer {before.layer}",
                    Shown(f"{each.position} layer {each.layer}"),
                    "list exits from the shallowest to the deepest, each depth once",
                )
            self._resolve_output(i)

    def _resolve_output(self, index: int) -> None:
        seen = {index}
        output = self.exits[index].output
        while isinstance(output, int):
            if output >= len(self.exits) or output in seen:
                raise invalid(
                    f"output of early exit {index} is invalid",
                    "own, embedding, final or the index of an exit that leads to one",
                    self.exits[index].output,
                )
            seen.add(output)
            output = self.exits[output].output

    @property
    def rope_dims(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor) if self.positions == "rope" else 0

    def rope_frequencies(self) -> tuple[np.ndarray, float]:
        """Angles per position of each pair of channels, and the factor of cosines and sines."""
        if self.positions != "rope":
            return np.zeros(0, np.float32), 1.0
        return rope.frequencies(
            self.rope_dims, self.rope_theta, self.rope_scaling, self.max_position_embeddings
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens, none, one or several."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def windows(self) -> list[int]:
        """Sliding window of each layer, 0 for none."""
        window = self.sliding_window or 0
        kinds = self.layer_types or ("sliding_attention",) * self.num_hidden_layers
        return [window if kind == "sliding_attention" else 0 for kind in kinds]

    def to_core(self) -> dict[str, Any]:
        """The fields of struct ee_config (csrc/model/config.h)."""
        frequencies, rope_scale = self.rope_frequencies()
        scale = self.attention_scale
        return {
            "family": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_layers": self.num_hidden_layers,
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_positions": self.max_position_embeddings,
            "norm": self.norm,
            "norm_eps": self.norm_eps,
            "norm_offset": self.norm_offset,
            "activation": ACTIVATIONS[self.hidden_act],
            "gated": self.gated,
            "bias_q": self.bias_q,
            "bias_kv": self.bias_kv,
            "bias_o": self.bias_o,
            "bias_up": self.bias_up,
            "bias_down": self.bias_down,
            "norm_bias": self.norm_bias,
            "qk_norm": self.qk_norm,
            "parallel_residual": self.parallel_residual,
            "shared_norm": self.shared_norm,
            "tie_embeddings": self.tie_word_embeddings,
            "positions": self.positions,
            "rope_dims": self.rope_dims,
            "rope_interleaved": self.rope_interleaved,
            "rope_scale": rope_scale,
            "rope_freq": np.ascontiguousarray(frequencies, np.float32),
            "attention_scale": self.head_dim**-0.5 if scale is None else scale,
            "attention_softcap": self.attn_logit_softcapping or 0.0,
            "logit_softcap": self.final_logit_softcapping or 0.0,
            "embedding_scale": self.embedding_scale,
            "window": self.windows,
            "embedding_dropout": self.embd_pdrop,
            "attention_dropout": self.attn_pdrop,
            "residual_dropout": self.resid_pdrop,
            "exits": [each.to_core() for each in self.exits],
        }

    @classmethod
    def create(cls, model_type: str, **values: Any) -> "ModelConfig":
        """A config of a family: its kinds unless `values` say otherwise."""
        if model_type not in FAMILIES:
            raise unserved(model_type)
        known = tuple(each.name for each in fields(cls))
        for key in values:
            if key not in known:
                raise invalid("unknown key of the model", f"one of {', '.join(known)}", Shown(key))
        merged = {**FAMILY_KINDS[model_type], **values, "model_type": model_type}
        for each in fields(cls):
            required = each.default is MISSING and each.default_factory is MISSING
            if required and each.name not in merged:
                raise invalid(f"{each.name} is missing", "a value", Shown("none"))
        return cls(**merged)

    @classmethod
    def llama(cls, **values: Any) -> "ModelConfig":
        """A Llama: RMSNorm, rotary positions, SwiGLU."""
        return cls.create("llama", **values)

    @classmethod
    def gpt2(cls, **values: Any) -> "ModelConfig":
        """A GPT-2: LayerNorm, learned positions, biases, tied embeddings; 124M unless changed."""
        sizes = {
            "vocab_size": 50257,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        }
        return cls.create("gpt2", **{**sizes, **values})

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """A config from the content of a Hugging Face config.json."""
        from eellm.files import hf_config

        return hf_config.read(values)

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that Transformers and `from_hf` read."""
        from eellm.files import hf_config

        return hf_config.write(self)

    def _repr_html_(self) -> str:
        return _picture(self)


FAMILY_KINDS: dict[str, dict[str, Any]] = {
    "eellm": {},
    "llama": {},
    "gpt2": {
        "max_position_embeddings": 1024,
        "hidden_act": "gelu_new",
        "gated": False,
        "norm": "layernorm",
        "norm_bias": True,
        "positions": "learned",
        "tie_word_embeddings": True,
        **dict.fromkeys(("bias_q", "bias_kv", "bias_o", "bias_up", "bias_down"), True),
    },
}


def unserved(model_type: object) -> NotImplementedError:
    """The error for a model type that no family here can take."""
    return NotImplementedError(
        f"model_type {model_type!r} is not served (expected one of {', '.join(FAMILIES)}); choose "
        "a model of one of these types"
    )


def _require(config: ModelConfig, wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise invalid(
                f"{key} is invalid for model_type {config.model_type}",
                str(value),
                getattr(config, key),
                "use model_type eellm, which takes every combination",
            )


_PLAIN = {  # what neither family has
    "norm_offset": 0.0,
    "qk_norm": False,
    "parallel_residual": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "sliding_window": None,
    "layer_types": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "embedding_scale": 1.0,
}


def _check_llama(config: ModelConfig) -> None:
    kinds = {"norm": "rmsnorm", "positions": "rope", "gated": True, "attention_scale": None}
    if config.attention_scale is not None:
        kinds["attention_scale"] = config.head_dim**-0.5
    _require(config, {**_PLAIN, **kinds})
    _require(config, {"bias_kv": config.bias_q, "bias_o": config.bias_q})
    _require(config, {"bias_down": config.bias_up})


def _check_gpt2(config: ModelConfig) -> None:
    kinds = {**FAMILY_KINDS["gpt2"], "num_key_value_heads": config.num_attention_heads}
    for key in ("max_position_embeddings", "hidden_act", "tie_word_embeddings"):
        del kinds[key]
    _require(config, {**_PLAIN, **kinds})
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise invalid(
            "head_dim is invalid for model_type gpt2",
            f"hidden_size / num_attention_heads ({config.hidden_size} / "
            f"{config.num_attention_heads})",
            config.head_dim,
        )
    if config.attention_scale not in (None, 1.0):
        _require(config, {"attention_scale": config.head_dim**-0.5})


def _picture(config: ModelConfig) -> str:
    """The layers as a row of boxes with an arrow for each exit, and the sizes below."""
    layers = config.num_hidden_layers
    width = 720 / max(layers, 8)
    parts = []
    for i in range(layers):
        title = f"layer {i + 1}"
        parts.append(
            f'<rect x="{10 + i * width:.1f}" y="44" width="{width * 0.86:.1f}" height="30" rx="2" '
            f'fill="#8fb4d9"><title>{title}</title></rect>'
        )
    stops = [(each.depth, f"{each.position} {each.layer}", each) for each in config.exits]
    for depth, label, each in [*stops, (2 * layers, "final", None)]:
        x = 10 + depth / 2 * width - 0.07 * width
        color = "#333" if each is None else "#c0562b"
        title = label if each is None else f"{each.branch or 'no branch'}, norm {each.norm}, "
        title += "" if each is None else f"output {each.output}"
        parts.append(
            f'<path d="M{x:.1f} 59V24M{x - 4:.1f} 30l4 -7l4 7" stroke="{color}" fill="none" '
            f'stroke-width="2"><title>{title}</title></path>'
            f'<text x="{x:.1f}" y="16" font-size="11" text-anchor="middle" fill="{color}">'
            f"{label}</text>"
        )
    tied = "tied" if config.tie_word_embeddings else "untied"
    sizes = (
        f"{config.model_type}: {layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads ({config.num_key_value_heads} key-value) of "
        f"{config.head_dim}, feed-forward {config.intermediate_size}, vocabulary "
        f"{config.vocab_size} ({tied}), {len(config.exits)} early exits"
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="82" role="img" '
        f'font-family="sans-serif">{"".join(parts)}</svg><div>{sizes}</div>'
    )
