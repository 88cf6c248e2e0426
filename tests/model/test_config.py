"""ModelConfig against Transformers' configs, its rules, and damaged config.json files."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from eellm.config import ExitConfig, ModelConfig
from tests.files import fuzz

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS = [
    None,
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"type": "linear", "factor": 2},
    LLAMA3,
    YARN,
    {**YARN, "beta_fast": 16, "beta_slow": 2.5, "truncate": False},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5},
    {**YARN, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 0.5},
]


def reference_frequencies(transformers, **values):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**SMALL, **values)
    module = LlamaRotaryEmbedding(config)
    return module.inv_freq.numpy(), module.attention_scaling, config


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("head_dim", [8, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6, 12345.6])
def test_rope_is_that_of_transformers(transformers, scaling, head_dim, theta):
    expected, factor, reference = reference_frequencies(
        transformers,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=dict(scaling) if scaling else None,
        max_position_embeddings=2048,
    )
    old = {"model_type": "llama", **SMALL, "head_dim": head_dim, "max_position_embeddings": 2048}
    old |= {"rope_theta": theta, "rope_scaling": scaling}
    for values in (old, reference.to_dict()):  # as Transformers 4 and 5 write it
        core = ModelConfig.from_hf(values).to_core()
        assert core["rope_dims"] == head_dim and core["rope_freq"].dtype == np.float32
        assert core["rope_scale"] == factor
        # PyTorch's float32 power may be one unit off the correctly rounded one that we take; the
        # two operations after it can turn that into two.
        difference = np.abs(core["rope_freq"].view(np.int32) - expected.view(np.int32))
        assert difference.max() <= 2 and np.count_nonzero(difference) <= 1


def test_a_wrong_scaling_would_be_seen(transformers):
    """Negative control of the test above."""
    expected = reference_frequencies(transformers, rope_scaling=dict(LLAMA3))[0]
    values = {"model_type": "llama", **SMALL, "rope_scaling": {**LLAMA3, "factor": 8.001}}
    got = ModelConfig.from_hf(values).to_core()["rope_freq"]
    assert np.abs(got.view(np.int32) - expected.view(np.int32)).max() > 2


def test_partial_rotary(transformers):
    config = ModelConfig(**SMALL, head_dim=16, partial_rotary_factor=0.5, rope_scaling=LLAMA3)
    reference = transformers.LlamaConfig(
        **SMALL, head_dim=16, rope_parameters={**LLAMA3, "rope_theta": 1e4}
    )
    reference.rope_parameters["partial_rotary_factor"] = 0.5
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](reference)
    core = config.to_core()
    assert core["rope_dims"] == 8
    np.testing.assert_array_almost_equal_nulp(core["rope_freq"], expected.numpy(), 2)


def assert_same_config(got, expected):
    got, expected = got.to_dict(), expected.to_dict()
    assert got.pop("architectures") and not expected.pop("architectures")
    assert got == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "attention_dropout": 0.1},
        {"rope_scaling": dict(LLAMA3), "rope_theta": 500000.0, "eos_token_id": [3, 4]},
        {"rope_scaling": {**YARN, "beta_fast": 16}, "hidden_act": "gelu_pytorch_tanh"},
        {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "pretraining_tp": 2},
    ],
)
def test_llama_round_trip(transformers, changes):
    reference = transformers.LlamaConfig(**SMALL, **changes)
    for short in (True, False):
        values = json.loads(reference.to_json_string(use_diff=short))
        ours = ModelConfig.from_hf(values)
        again = ours.to_hf()
        assert json.loads(json.dumps(again)) == again
        assert ModelConfig.from_hf(again) == ours
        assert_same_config(*map(transformers.LlamaConfig.from_dict, (again, values)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": 99, "activation_function": "gelu", "scale_attn_weights": False},
        {"resid_pdrop": 0.0, "attn_pdrop": 0.3, "embd_pdrop": 0.2, "layer_norm_epsilon": 1e-6},
        {"tie_word_embeddings": False, "summary_type": "first", "initializer_range": 0.1},
    ],
)
def test_gpt2_round_trip(transformers, changes):
    reference = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64, **changes
    )
    ours = ModelConfig.from_hf(json.loads(reference.to_json_string()))
    again = ours.to_hf()
    assert ModelConfig.from_hf(json.loads(json.dumps(again))) == ours
    assert_same_config(transformers.GPT2Config.from_dict(again), reference)


def test_the_config_of_gpt2_on_the_hub():
    values = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": None, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }  # fmt: skip
    config = ModelConfig.from_hf(values)
    kinds = {key: config.to_core()[key] for key in ("positions", "norm", "activation", "gated")}
    assert kinds == {
        "positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "gated": False,
    }  # fmt: skip
    assert config.tie_word_embeddings and config.intermediate_size == 3072
    assert config.to_hf()["task_specific_params"] == values["task_specific_params"]
    assert replace(ModelConfig.gpt2(), extra={}).hidden_size == 768


def own(**changes):
    return ModelConfig(**{**SMALL, **changes})


def test_own_round_trip():
    config = own(
        model_type="eellm", head_dim=10, num_key_value_heads=1, hidden_act="gelu", norm="layernorm",
        norm_bias=True, norm_offset=1.0, rope_interleaved=True, partial_rotary_factor=0.4,
        rope_scaling={"type": "linear", "factor": 2.0}, bias_q=True, bias_down=True, qk_norm=True,
        parallel_residual=True, shared_norm=True, sliding_window=8,
        layer_types=["full_attention", "sliding_attention"] * 3, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, embedding_scale=5.0, attention_scale=0.3, embd_pdrop=0.1,
        attn_pdrop=0.2, resid_pdrop=0.3, initializer_range=0.1, bos_token_id=1,
        eos_token_id=[2, 3], exits=[{"layer": 2, "head": "block"}, ExitConfig(4, output=0)],
    )  # fmt: skip
    written = json.loads(json.dumps(config.to_hf()))
    assert written["architectures"] == ["EellmForCausalLM"] and written["format_version"] == 1
    assert ModelConfig.from_hf({**written, "transformers_version": "5"}) == replace(
        config, extra={"transformers_version": "5"}
    )
    core = config.to_core()
    assert core["window"] == [0, 8] * 3 and core["rope_dims"] == 4
    assert core["rope_scale"] == 1.0 and len(core["rope_freq"]) == 2
    assert [each["output"] for each in core["exits"]] == [-3, 0]
    assert core["exits"][0] == {
        "layer": 2, "before": False, "branch": "block", "norm": "own", "output": -3,
    }  # fmt: skip
    assert config.eos_token_ids == (2, 3)
    hash(config)


def test_every_field_reaches_the_core():
    """to_core has exactly the fields of struct ee_config, by the names of its reader."""
    names = set(own().to_core())
    expected = """family vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads
        head_dim max_positions norm norm_eps norm_offset activation gated bias_q bias_kv bias_o
        bias_up bias_down norm_bias qk_norm parallel_residual shared_norm tie_embeddings positions
        rope_dims rope_interleaved rope_scale rope_freq attention_scale attention_softcap
        logit_softcap embedding_scale window embedding_dropout attention_dropout residual_dropout
        exits"""
    assert names == set(expected.split())


HEADS = {
    "embedding": (None, None),
    "norm": (None, "own"),
    "mlp": ("mlp", "own"),
    "block": ("block", "own"),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_shorthand(head):
    each = ExitConfig(layer=4, head=head)
    assert (each.branch, each.norm) == HEADS[head]
    assert ExitConfig(layer=4, head=head, norm="final").norm == "final"
    assert ExitConfig(layer=4, head=head, norm="none", branch="none").to_dict() == {
        "layer": 4, "position": "after", "branch": None, "norm": None, "output": None,
    }  # fmt: skip
    assert ExitConfig.from_dict({"layer": 4, "head": head}) == each


def test_the_output_of_an_exit_follows_the_model():
    each = ExitConfig(2)
    assert own(exits=[each]).exits[0].output == "final"
    assert own(exits=[each], tie_word_embeddings=True).exits[0].output == "embedding"
    assert own(exits=[ExitConfig(2, output="own")]).exits[0].output == "own"
    assert each.output is None


def test_depth_counts_half_layers():
    assert ExitConfig(3).depth == ExitConfig(4, position="before").depth == 6
    assert ExitConfig(3, head="mlp").depth == 5
    own(exits=[ExitConfig(2), ExitConfig(3, head="mlp"), ExitConfig(3), ExitConfig(6)])


REFUSED = {
    "vocab_size": ({"vocab_size": 0}, "vocab_size"),
    "a fraction": ({"hidden_size": 32.0}, "hidden_size"),
    "a boolean": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "heads": ({"num_attention_heads": 5}, "num_attention_heads.*divisor of hidden_size.*head_dim"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads.*divisor"),
    "activation": ({"hidden_act": "mish"}, "hidden_act.*relu.*'mish'"),
    "norm": ({"norm": "batchnorm"}, "norm.*layernorm, rmsnorm"),
    "norm bias": ({"norm_bias": True}, "norm_bias"),
    "eps": ({"norm_eps": float("nan")}, "norm_eps.*nan"),
    "shared norm": ({"shared_norm": True}, "shared_norm.*parallel_residual"),
    "odd rotary": ({"partial_rotary_factor": 0.4, "head_dim": 8}, "partial_rotary_factor"),
    "no rotary": ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
    "flag": ({"gated": 1}, "gated.*true or false"),
    "softcap": ({"final_logit_softcapping": -1}, "final_logit_softcapping"),
    "dropout": ({"resid_pdrop": 1.0}, "resid_pdrop"),
    "window": ({"sliding_window": -1}, "sliding_window"),
    "layer types": ({"layer_types": ["full_attention"]}, "layer_types.*6 layers"),
    "layer type": ({"layer_types": ["other"] * 6}, "layer_types.*sliding_attention"),
    "no window": ({"layer_types": ["sliding_attention"] * 6}, "sliding_window is missing"),
    "eos": ({"eos_token_id": "x"}, "eos_token_id"),
    "linear": ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
    "factor": ({"rope_scaling": {**LLAMA3, "factor": 0}}, r"rope_scaling\.factor is invalid"),
    "llama3": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
    "scaling": ({"rope_scaling": 3}, "rope_scaling is not a table"),
    "theta": ({"rope_theta": 0}, "rope_theta"),
    "exit layer": ({"exits": [ExitConfig(7)]}, "early exit 0.*1 to 6.*7"),
    "exit order": ({"exits": [ExitConfig(3), ExitConfig(2)]}, "exit 1 is out of order.*deeper"),
    "exit twice": (
        {"exits": [ExitConfig(3), ExitConfig(4, position="before")]},
        "exit 1 is out of order.*after layer 3.*before layer 4",
    ),
    "exit cycle": ({"exits": [ExitConfig(1, output=1), ExitConfig(2, output=0)]}, "output of"),
    "exit of itself": ({"exits": [ExitConfig(1, output=0)]}, "output of early exit 0"),
    "no such exit": ({"exits": [ExitConfig(1, output=5)]}, "output of early exit 0"),
    "exits no list": ({"exits": 3}, "exits is invalid"),
    "parallel branch": (
        {"exits": [ExitConfig(2, branch="mlp")], "parallel_residual": True},
        "branch.*parallel_residual",
    ),
    "many exits": (
        {"num_hidden_layers": 70, "exits": [ExitConfig(i + 1) for i in range(65)]},
        "exits is too long",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_values(name):
    changes, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        own(**changes)
    own()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"layer": 0}, "layer"),
        ({"layer": 2, "position": "behind"}, "position"),
        ({"layer": 2, "branch": "attention"}, "branch"),
        ({"layer": 2, "norm": "batch"}, "norm"),
        ({"layer": 2, "output": "other"}, "output"),
        ({"layer": 2, "output": -1}, "output"),
        ({"layer": 2, "output": True}, "output"),
        ({"layer": 2, "head": "other"}, "head"),
        ({"layer": 2, "head": "mlp", "position": "before"}, "position.*after"),
        ({"layer": 2, "heads": "mlp"}, "unknown key.*'heads'"),
        ({"position": "after"}, "layer of an early exit is missing"),
        (3, "not a table"),
    ],
)
def test_refused_exits(values, match):
    with pytest.raises(ValueError, match=match):
        ExitConfig.from_dict(values)


LLAMA = {"model_type": "llama", **SMALL}
GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model_type": "mistral"}, "'mistral'.*eellm, llama, gpt2"),
        ({}, "None.*eellm, llama, gpt2"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({**GPT2, "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention"),
        ({**GPT2, "activation_function": "relu6"}, "activation_function 'relu6'"),
        ({**LLAMA, "hidden_act": "mish"}, "hidden_act 'mish'"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({**LLAMA, "rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({**LLAMA, "rope_parameters": {"full_attention": {}}}, "rope_parameters"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_not_served_is_named(values, match):
    with pytest.raises(NotImplementedError, match=match):
        ModelConfig.from_hf(values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({**LLAMA, "vocab_size": None}, "vocab_size is missing"),
        ({"model_type": "gpt2"}, "vocab_size is missing"),
        ({"model_type": "eellm", **SMALL}, "format_version"),
        ({"model_type": "eellm", "format_version": 1}, "vocab_size is missing"),
        (
            {"model_type": "eellm", "format_version": 1, **SMALL, "rope_thetta": 1.0},
            "'rope_thetta'.*did you mean rope_theta",
        ),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor.*model_type eellm"),
        ({**LLAMA, "early_exits": {"exits": []}}, "format_version"),
        ({**LLAMA, "early_exits": {"format_version": 2, "exits": []}}, "newer eellm"),
        ({**LLAMA, "early_exits": {"format_version": 1, "exits": [{"layer": 9}]}}, "exit 0.*9"),
        ([], "not a table"),
    ],
)
def test_refused_files(values, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_hf(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True}, {"norm": "layernorm"}, {"positions": "learned"}, {"gated": False},
        {"rope_interleaved": True}, {"sliding_window": 4}, {"bias_q": True}, {"bias_up": True},
        {"norm_offset": 1.0}, {"attention_scale": 1.0}, {"embedding_scale": 2.0},
    ],
)  # fmt: skip
def test_llama_takes_only_what_transformers_can_load(changes):
    with pytest.raises(ValueError, match=r"for model_type llama.*use model_type eellm"):
        ModelConfig.llama(**{**SMALL, **changes})
    own(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"gated": True}, {"bias_kv": False}, {"num_key_value_heads": 1}, {"head_dim": 4}],
)
def test_gpt2_takes_only_what_transformers_can_load(changes):
    with pytest.raises(ValueError, match="for model_type gpt2"):
        ModelConfig.gpt2(**changes)


def test_constructors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"unknown key of the model.*got hiden_size"):
        ModelConfig.llama(hiden_size=3)
    with pytest.raises(ValueError, match="vocab_size is missing"):
        ModelConfig.llama(hidden_size=32)
    with pytest.raises(NotImplementedError, match="'bert'"):
        ModelConfig.create("bert")


def test_the_picture_shows_layers_and_exits():
    config = own(exits=[ExitConfig(2), ExitConfig(4, head="mlp")])
    html = config._repr_html_()
    assert html.count("<rect") == 6 and html.count("<path") == 3
    assert "after 2" in html and "final" in html and "2 early exits" in html


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_damaged_configs_raise_clean_errors(count):
    exits = [{"layer": 2, "position": "after", "branch": None, "norm": "own", "output": "final"}]
    full = own(exits=exits, sliding_window=3, layer_types=["full_attention"] * 6).to_hf()
    starts = [
        full,
        {**LLAMA, "rope_scaling": LLAMA3, "early_exits": full["early_exits"]},
        {**LLAMA, "rope_parameters": YARN},
        ModelConfig.from_hf(GPT2).to_hf(),
    ]

    def read(values):
        config = ModelConfig.from_hf(values)
        core = config.to_core()
        assert np.isfinite(core["rope_freq"]).all() and len(core["window"]) == core["num_layers"]
        json.dumps(config.to_hf())
        config._repr_html_()

    def make(rng):
        return fuzz.damage_json(starts[int(rng.integers(0, len(starts)))], rng)

    accepted = fuzz.run(count, 20260105, make, read, (ValueError, NotImplementedError))
    assert 0 < accepted < count


def test_the_fields_have_checks():
    """No field takes just anything."""
    for each in fields(ModelConfig):
        if each.name not in ("extra", "rope_scaling", "layer_types", "exits"):
            with pytest.raises((ValueError, NotImplementedError), match=each.name):
                own(**{each.name: object()})
