"""A wrong config is refused by name: keys and types by the boundary, values by the core."""

import numpy as np
import pytest

from eellm import _core
from tests.parity.cases import base_config, exit_, gpt2_config

pytestmark = pytest.mark.usefixtures("collected_once")

EXIT = exit_(1)


def refuse(config, error, text):
    live = _core.alloc_stats()[1:]
    with pytest.raises(error, match=text):
        _core.Model(config, 1)
    assert _core.alloc_stats()[1:] == live


@pytest.mark.parametrize("key", [*base_config()])
def test_missing_keys(key):
    config = base_config()
    del config[key]
    refuse(config, KeyError, f"the config has no key '{key}'")


@pytest.mark.parametrize("key", [*EXIT])
def test_missing_keys_of_an_exit(key):
    broken = {name: value for name, value in EXIT.items() if name != key}
    refuse(base_config(exits=[EXIT, broken]), KeyError, f"early exit 1 has no key '{key}'")


WRONG = {int: ("a", 1.5, None, True), float: ("a", None, [1.0]), bool: (0, "no", None)}
WRONG |= {str: (None, 3, b"rope", ["rope"])}


@pytest.mark.parametrize("key", [*base_config()])
def test_wrong_types(key):
    value = base_config()[key]
    for wrong in WRONG.get(type(value), (3, None, {}, {"a": 1})):
        kinds = "(a string|an integer|a number|True or False|a sequence)"
        refuse(base_config() | {key: wrong}, TypeError, f"^{key} must be {kinds}.*, got ")


@pytest.mark.parametrize("key", [*EXIT])
def test_wrong_types_of_an_exit(key):
    for wrong in WRONG[type(EXIT[key])]:
        refuse(base_config(exits=[EXIT | {key: wrong}]), TypeError, f"^{key} must be ")


def test_wrong_containers():
    for wrong in (None, 3, "config", [("a", 1)]):
        refuse(wrong, TypeError, r"^the config must be a mapping \(see ModelConfig.to_core\), got ")
    for wrong in (None, "abc", ["a"]):
        refuse(base_config(exits=[wrong]), TypeError, "^early exit 0 must be a mapping")
    refuse(base_config(window=[0, "a", 0, 0]), TypeError, "^window must be an integer, got str")
    refuse(base_config(window=[0] * 3), ValueError, r"window .* a layer \(4\), got 3")
    refuse(base_config(rope_freq=[1.0] * 3), ValueError, "rope_freq must have 4 numbers, got 3")
    refuse(base_config(rope_freq=[1, 1, 1, "a"]), TypeError, r"rope_freq\[3\] must be a number")
    refuse(base_config(exits=[EXIT] * 65), ValueError, "0 to 64 early exits, got 65")
    with pytest.raises(TypeError):
        _core.Model()


class Angry(dict):
    def __getitem__(self, key):
        raise ZeroDivisionError("angry")


def test_errors_of_a_mapping_pass_through():
    refuse(Angry(), ZeroDivisionError, "angry")


def test_numbers_that_do_not_fit():
    for value in (2**31, -(2**31) - 1, 2**200, -(2**200)):
        text = f"vocab_size: {value} does not fit in 32 bits"
        refuse(base_config(vocab_size=value), ValueError, text)
        refuse(base_config(window=[0, value, 0, 0]), ValueError, "window: .* does not fit")


KINDS = {
    "family": "bert",
    "norm": "batchnorm",
    "activation": "selu",
    "positions": "alibi",
}


@pytest.mark.parametrize("key", KINDS)
def test_unknown_kinds(key):
    refuse(base_config(**{key: KINDS[key]}), ValueError, f"{key}: unknown value '{KINDS[key]}'")
    refuse(base_config(**{key: ""}), ValueError, f"{key}: unknown value ''")
    refuse(base_config(**{key: "rope\0"}), ValueError, f"{key}: unknown value")


SIZES = {
    "vocab_size": ("vocab_size", 1 << 24),
    "hidden_size": ("hidden_size", 1 << 20),
    "intermediate_size": ("intermediate_size", 1 << 24),
    "num_layers": ("num_hidden_layers", 4096),
    "num_heads": ("num_attention_heads", 1 << 12),
    "num_kv_heads": ("num_key_value_heads", 1 << 12),
    "head_dim": ("head_dim", 1 << 12),
    "max_positions": ("max_position_embeddings", 1 << 24),
}


@pytest.mark.parametrize("key", SIZES)
def test_sizes_out_of_range(key):
    name, limit = SIZES[key]
    for value in (0, -1, limit + 1):
        text = f"{name} must lie between 1 and {limit}, got {value}"
        refuse(base_config() | {key: value}, ValueError, text)


NUMBERS = {
    "norm_eps": ("norm_eps", (-1e-9, 1.5)),
    "attention_scale": ("attention_scale", (0.0, -1.0, 2e6)),
    "attention_softcap": ("attn_logit_softcapping", (-1.0, 2e6)),
    "logit_softcap": ("final_logit_softcapping", (-1.0, 2e6)),
    "embedding_scale": ("embedding_scale", (0.0, 2e6)),
    "embedding_dropout": ("embd_pdrop", (-0.1, 1.0)),
    "attention_dropout": ("attn_pdrop", (-0.1, 1.0)),
    "residual_dropout": ("resid_pdrop", (-0.1, 1.0)),
}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_out_of_range(key):
    name, values = NUMBERS[key]
    for value in values:
        refuse(base_config(**{key: value}), ValueError, f"{name} must lie between ")


@pytest.mark.parametrize("key", ["norm_offset", "rope_scale", *NUMBERS])
def test_numbers_must_be_finite(key):
    for value in (float("nan"), float("inf"), -1e300):
        refuse(base_config(**{key: value}), ValueError, f"{key} must be a finite number, got ")


GPT2 = "a GPT-2 model has learned positions"
COMBINATIONS = [
    (base_config(num_kv_heads=3), r"num_key_value_heads must divide num_attention_heads \(4\)"),
    (base_config(rope_dims=0, rope_freq=[]), "rope_dims must lie between 2"),
    (base_config() | {"rope_dims": -4}, "rope_dims must lie between 2"),
    (base_config() | {"rope_dims": 2**31 - 1}, "rope_dims must lie between 2"),
    (base_config(rope_dims=5), "an even number from 2 to head_dim"),
    (base_config(rope_dims=10), r"an even number from 2 to head_dim \(8\), got 10"),
    (base_config(rope_freq=[1, 1, float("nan"), 1]), r"rope_freq\[2\] must be a finite number"),
    (base_config(window=[0, -1, 0, 0]), "sliding_window of layer 2 must not be negative, got -1"),
    (base_config(shared_norm=True), "needs parallel_residual"),
    (base_config(norm_bias=True), "RMSNorm has no bias"),
    (gpt2_config(bias_kv=False), "GPT-2 has a bias on all of query, key and value"),
    (gpt2_config(gated=True), GPT2),
    (gpt2_config(qk_norm=True), GPT2),
    (gpt2_config(positions="none"), GPT2),
    (gpt2_config(parallel_residual=True), GPT2),
    (gpt2_config(num_kv_heads=2), GPT2),
]
EXITS = [
    ([exit_(0)], "early exit 0: layer must lie between 1 and 4, got 0"),
    ([exit_(1), exit_(5)], "early exit 1: layer must lie between 1 and 4, got 5"),
    ([exit_(2, before=True, branch="mlp")], "early exit 0: an MLP branch is parallel"),
    ([exit_(2), exit_(1)], "exit 1 .after layer 1. does not lie deeper than exit 0"),
    ([exit_(2), exit_(2)], "each depth once"),
    ([exit_(1), exit_(2, before=True)], "each depth once"),
    ([exit_(1, output=0)], "early exit 0: output must be"),
    ([exit_(1, output=1), exit_(2, output=0)], "early exit 0: output must be"),
    ([exit_(1, output=2), exit_(2)], "early exit 0: output must be"),
    ([exit_(1, output=-4)], "early exit 0: output"),
    ([exit_(1, branch="attention")], "branch: unknown value 'attention'"),
    ([exit_(1, norm="other")], "norm: unknown value 'other'"),
]


@pytest.mark.parametrize(("config", "text"), COMBINATIONS)
def test_combinations(config, text):
    refuse(config, ValueError, text)


@pytest.mark.parametrize(("exits", "text"), EXITS)
def test_exits(exits, text):
    refuse(base_config(exits=exits), ValueError, text)


def test_an_mlp_branch_needs_no_parallel_residual():
    config = base_config(parallel_residual=True, exits=[exit_(1, branch="mlp")])
    refuse(config, ValueError, "early exit 0: an MLP branch needs a layer without parallel")


def test_what_is_right_passes():
    """The negative control, at the limits, and with the types of NumPy."""
    config = base_config(
        hidden_size=np.int64(24), norm_eps=np.float64(0.0), window=np.array([0, 3, 0, 2**31 - 1]),
        exits=(exit_(1, output=1), exit_(4)), attention_dropout=0.999, max_positions=1,
    )  # fmt: skip
    model = _core.Model(config, threads=1, isa="plain")
    assert model.threads == 1 and model.isa == "plain"
    assert len(_core.Model(base_config(exits=[]), 1).table) > 0


def test_threads_and_instruction_sets():
    for threads in (-1, 1025, 2**31 - 1):
        with pytest.raises(ValueError, match="threads must lie between 0"):
            _core.Model(base_config(), threads)
    for isa in ("sse9", "AVX2", "plain "):
        with pytest.raises(ValueError, match=isa):
            _core.Model(base_config(), 1, isa)
    with pytest.raises(TypeError):
        _core.Model(base_config(), "2")
    with pytest.raises(TypeError):
        _core.Model(base_config(), 1, None)
    assert _core.Model(base_config()).threads == _core.build_info()["cpus"]


def test_sizes_that_no_machine_holds():
    huge = base_config(vocab_size=1 << 24, hidden_size=1 << 20, intermediate_size=1 << 24)
    refuse(huge, MemoryError, "the parameters")
