"""Models against Transformers: loaded, run, saved and loaded again; new exits; golden logits."""

import json
import pickle

import numpy as np
import pytest

from eellm.config import ExitConfig, ModelConfig
from eellm.files.llama2c import convert
from eellm.model import Model
from tests.model import oracle

TOKENS = np.random.default_rng(0).integers(0, 61, (3, 29))

LLAMAS = {
    "llama 2": {},
    "llama 3": {"num_key_value_heads": 2, "rope_scaling": oracle.LLAMA3, "rope_theta": 5e5},
    "llama tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 20},
    "llama biased": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "llama yarn": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip
GPT2S = {
    "gpt2": {},
    "gpt2 untied": {"tie_word_embeddings": False, "n_inner": 70, "scale_attn_weights": False},
    "gpt2 gelu": {"activation_function": "gelu"},
    "gpt2 relu": {"activation_function": "relu"},
}
NAMES = [*LLAMAS, *GPT2S]


def reference(torch, transformers, name):
    if name in LLAMAS:
        config = transformers.LlamaConfig(**oracle.LLAMA, **json.loads(json.dumps(LLAMAS[name])))
    else:
        config = transformers.GPT2Config(**oracle.GPT2, **GPT2S[name])
    return oracle.random_model(torch, config)


def assert_agrees(folder, got, tokens=TOKENS):
    single = oracle.logits(oracle.load(folder), tokens)
    double = oracle.logits(oracle.in_float64(oracle.load(folder)), tokens)
    assert double.dtype == np.float64
    oracle.assert_twice(got, single, double)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_saved_weights(torch, transformers, tmp_path, name):
    model = reference(torch, transformers, name)
    model.save_pretrained(tmp_path / "theirs")
    ours = Model.from_pretrained(tmp_path / "theirs")
    assert ours.num_parameters == model.num_parameters()
    got = ours.forward(TOKENS)
    assert got.shape == (1, 3, 29, 61)
    assert_agrees(tmp_path / "theirs", got[0])

    ours.save_pretrained(tmp_path / "ours")
    again = oracle.load(tmp_path / "ours")
    assert_same_weights(again, model)
    np.testing.assert_array_equal(Model.from_pretrained(tmp_path / "ours").forward(TOKENS), got)


def assert_same_weights(got, expected):
    theirs = expected.state_dict()
    assert got.state_dict().keys() == theirs.keys()
    for key, value in got.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), theirs[key].numpy(), err_msg=key)


@pytest.mark.parametrize("name", ["llama 3", "gpt2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_half_precision_and_shards(torch, transformers, tmp_path, name, dtype, shard):
    model = reference(torch, transformers, name).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == (shard == "20KB")
    ours = Model.from_pretrained(tmp_path / "theirs")
    assert_agrees(tmp_path / "theirs", ours.forward(TOKENS)[0])
    limit = 20_000 if shard == "20KB" else 10**9
    ours.save_pretrained(tmp_path / "ours", dtype=dtype, max_shard_bytes=limit)
    again = oracle.load(tmp_path / "ours", dtype="auto")
    assert again.dtype == model.dtype
    assert_same_weights(again.float(), model.float())


def test_a_wrong_weight_would_be_seen(torch, transformers, tmp_path):
    """Negative control of the comparison of logits."""
    reference(torch, transformers, "llama 3").save_pretrained(tmp_path)
    ours = Model.from_pretrained(tmp_path)
    ours.parameter("model.layers.1.self_attn.k_proj.weight")[3, 5] += 1e-3
    with pytest.raises(AssertionError):
        assert_agrees(tmp_path, ours.forward(TOKENS)[0])


def test_loss(torch, transformers, tmp_path):
    model = reference(torch, transformers, "gpt2")
    model.save_pretrained(tmp_path)
    ours = Model.from_pretrained(tmp_path, exits=[ExitConfig(3)])
    tokens = torch.from_numpy(TOKENS)
    expected = oracle.in_float64(model)(tokens, labels=tokens).loss.item()
    np.testing.assert_allclose(ours.loss(TOKENS), [expected] * 2, rtol=1e-5)
    targets = np.where(TOKENS % 3 == 0, -1, TOKENS[:, ::-1])
    with torch.no_grad():
        logits = model(tokens).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=-1
    )
    np.testing.assert_allclose(ours.loss(TOKENS, targets), [expected.item()] * 2, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama 3", "llama tied", "llama biased", "gpt2", "gpt2 untied"])
def test_copied_exits_repeat_the_final_one(torch, transformers, tmp_path, name):
    """A copy of the last layer on the state below it is the last layer; so for the MLP."""
    reference(torch, transformers, name).save_pretrained(tmp_path)
    exits = [
        ExitConfig(2, head="block", output="own"),
        ExitConfig(3, head="mlp", output="own"),
        ExitConfig(3),
    ]
    ours = Model.from_pretrained(tmp_path, exits=exits)
    logits = ours.forward(TOKENS)
    assert logits.shape[0] == 4
    for each in logits[:3]:
        np.testing.assert_array_equal(each, logits[3])
    ours.save_pretrained(tmp_path / "exits")
    np.testing.assert_array_equal(Model.from_pretrained(tmp_path / "exits").forward(TOKENS), logits)
    plain = oracle.load(tmp_path / "exits")
    assert_same_weights(plain, oracle.load(tmp_path))
    none = Model.from_pretrained(tmp_path / "exits", exits=[])
    np.testing.assert_array_equal(none.forward(TOKENS)[0], logits[3])


def test_random_exits(torch, transformers, tmp_path):
    reference(torch, transformers, "llama 3").save_pretrained(tmp_path)
    exits = [{"layer": 1, "head": "mlp", "output": "own"}]
    first, again, other = (
        Model.from_pretrained(tmp_path, exits=exits, init="random", seed=seed).parameters()
        for seed in (1, 1, 2)
    )
    head = "exits.0.head.weight"
    np.testing.assert_array_equal(first[head], again[head])
    assert np.abs(first[head] - other[head]).max() > 0.01
    assert 0.015 < first[head].std() < 0.025
    np.testing.assert_array_equal(first["exits.0.norm.weight"], 1)
    np.testing.assert_array_equal(first["model.norm.weight"], other["model.norm.weight"])
    with pytest.raises(ValueError, match="init is invalid"):
        Model.from_pretrained(tmp_path, exits=exits, init="zero")


OWN = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "head_dim": 10,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": False, "norm": "layernorm", "norm_bias": True, "positions": "learned"},
        {"qk_norm": True, "bias_q": True, "bias_up": True, "partial_rotary_factor": 0.4},
        {"parallel_residual": True, "shared_norm": True, "rope_interleaved": True},
        {"positions": "none", "tie_word_embeddings": True, "sliding_window": 4},
        {"exits": [{"layer": 1}, {"layer": 2, "head": "block", "output": 0}]},
    ],
)
def test_own_models_are_saved_and_loaded(tmp_path, changes):
    config = ModelConfig(**{**OWN, **changes})
    model = Model.from_config(config, seed=3)
    logits = model.forward(TOKENS)
    assert np.isfinite(logits).all()
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.forward(TOKENS), logits)
    assert again.config == ModelConfig.from_hf({**config.to_hf(), "torch_dtype": "float32"})
    assert model.parameters().keys() == again.parameters().keys()


def test_converted_models_give_the_text_of_the_original(data, torch, transformers, tmp_path):
    for folder, name in (("stories260K", "stories260K"), ("babyllama361", "model5000")):
        source = data / "models" / folder
        golden = json.loads((source / f"{name}.golden.json").read_text())
        convert(source / f"{name}.bin", tmp_path / folder)
        tokens = np.array([golden["greedy_ids_from_bos"]])
        ours = Model.from_pretrained(tmp_path / folder)
        logits = ours.forward(tokens)[0]
        np.testing.assert_array_equal(logits[0, :-1].argmax(-1), tokens[0, 1:])
        assert_agrees(tmp_path / folder, logits, tokens)
        # The golden numbers were printed with six decimals by a float32 program of another order
        # of summation: its error is of the size of ours, and both sum some hundred terms.
        first = golden["logits_pos0_first8"]
        bound = 5e-7 + 64 * np.finfo(np.float32).eps * np.abs(logits[0, 0]).max()
        np.testing.assert_allclose(logits[0, 0, :8], first, rtol=0, atol=bound)
    assert (tmp_path / "stories260K/tokenizer.model").is_file()
    assert Model.from_pretrained(tmp_path / "stories260K").tokenizer is not None


def test_golden_logits_of_every_exit(data, torch, transformers):
    folder = data / "models" / "code16"
    golden = json.loads((folder / "golden.json").read_text())
    prompt = np.array([golden["prompt"]])
    all_logits = Model.from_pretrained(folder).forward(prompt)
    logits, expected = all_logits[:, 0, -1], np.array(golden["logits"])
    assert logits.shape == expected.shape == (4, 4096)
    single = oracle.logits(oracle.load(folder), prompt)
    double = oracle.logits(oracle.in_float64(oracle.load(folder)), prompt)
    oracle.assert_twice(all_logits[3], single, double)
    # The golden numbers are PyTorch's in float32, printed with six decimals: one error of theirs,
    # and two from us at most. At the final exit their error is known, and is much the same at all.
    error = np.abs(single - double).max()
    assert np.abs(logits - expected).max() <= 3 * error + 5e-7
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def small(**changes):
    return Model.from_config(ModelConfig(**{**OWN, **changes}))


def test_parameters_are_views():
    model = small()
    before = model.forward(TOKENS)
    model.parameters()["lm_head.weight"][...] *= 2
    np.testing.assert_allclose(model.forward(TOKENS), 2 * before, rtol=1e-5, atol=1e-6)
    assert model.num_parameters == sum(each.size for each in model.parameters().values())
    with pytest.raises(KeyError):
        model.parameter("no such thing")


def test_one_sequence_and_none():
    model = small()
    assert model([1, 2, 3]).shape == (1, 1, 3, 61)
    assert model.forward(np.zeros((0, 4), int)).shape == (1, 0, 4, 61)
    np.testing.assert_array_equal(model([1, 2, 3])[0, 0], model([[1, 2, 3]])[0, 0])


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([[0.5]], "integers"),
        ([[[1]]], "integers in one or two dimensions"),
        ([[61]], "from 0 to 60.*tokenizer"),
        ([[-1]], "from 0 to 60"),
        ([["a"]], "integers"),
        (np.zeros((1, 2049), int), "at most 2048"),
    ],
)
def test_wrong_tokens(tokens, match):
    with pytest.raises(ValueError, match=match):
        small().forward(tokens)


def test_wrong_targets():
    model = small()
    with pytest.raises(ValueError, match="wrong shape"):
        model.loss(TOKENS, TOKENS[:, 1:])
    with pytest.raises(ValueError, match="nothing to predict"):
        model.loss([[1]])
    with pytest.raises(ValueError, match=r"targets is invalid.*-1 to 60"):
        model.loss([[1]], [[-2]])


def test_what_a_model_says_of_itself():
    model = small(exits=[ExitConfig(1), ExitConfig(3, position="before")])
    assert "early exits: after 1, before 3" in repr(model)
    assert "<svg" in model._repr_html_() and "parameters" in model._repr_html_()
    with pytest.raises(FileNotFoundError, match="load_tokenizer"):
        _ = model.tokenizer


def test_pickled_weights_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    folder = tmp_path / "model"
    small().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="pickled weights"):
        Model.from_pretrained(folder)
    assert not (tmp_path / "opened").exists()
