"""The llama2.c layout: sizes, order, rotated pairs, and what is refused."""

import numpy as np
import pytest

from eellm.files import directory, llama2c
from eellm.files.safetensors import SafetensorsFile
from tests.files import fuzz

SIZES = {
    "dim": 12,
    "hidden_dim": 20,
    "n_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 1,
    "vocab_size": 11,
    "seq_len": 7,
}


def written(path, sizes=None, seed=0):
    """A file of random numbers, and its parts by their place in the layout."""
    s = {**SIZES, **(sizes or {})}
    dim, hidden, layers, vocab = s["dim"], s["hidden_dim"], s["n_layers"], abs(s["vocab_size"])
    kv = dim * s["n_kv_heads"] // s["n_heads"]
    shapes = {
        "embedding": (vocab, dim), "norm1": (layers, dim), "wq": (layers, dim, dim),
        "wk": (layers, kv, dim), "wv": (layers, kv, dim), "wo": (layers, dim, dim),
        "norm2": (layers, dim), "w1": (layers, hidden, dim), "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim), "norm": (dim,),
        "rope": (2, s["seq_len"], dim // s["n_heads"] // 2),
    }  # fmt: skip
    if s["vocab_size"] < 0:
        shapes["head"] = (vocab, dim)
    rng = np.random.default_rng(seed)
    parts = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    header = np.array(list(s.values()), "<i4").tobytes()
    path.write_bytes(header + b"".join(part.tobytes() for part in parts.values()))
    return parts


@pytest.mark.parametrize("vocab", [11, -11])
def test_every_part_finds_its_place(tmp_path, vocab):
    parts = written(tmp_path / "a.bin", {"vocab_size": vocab})
    model = llama2c.read(tmp_path / "a.bin")
    names = {
        "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj",
        "w2": "mlp.down_proj", "w3": "mlp.up_proj", "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    }  # fmt: skip
    for key, name in names.items():
        for layer in range(2):
            got = model.tensors[f"model.layers.{layer}.{name}.weight"]
            np.testing.assert_array_equal(got, parts[key][layer])
    np.testing.assert_array_equal(model.tensors["model.embed_tokens.weight"], parts["embedding"])
    np.testing.assert_array_equal(model.tensors["model.norm.weight"], parts["norm"])
    assert ("lm_head.weight" in model.tensors) == (vocab < 0) != model.config.tie_word_embeddings
    if vocab < 0:
        np.testing.assert_array_equal(model.tensors["lm_head.weight"], parts["head"])
    config = model.config
    assert (config.norm_eps, config.rope_theta, config.bos_token_id) == (1e-5, 10000.0, 1)
    assert config.num_key_value_heads == 1 and config.max_position_embeddings == 7


def test_halves_keep_the_scores_of_rotated_pairs():
    """Rotating pairs (2i, 2i + 1) of the old rows = rotating (i, i + D / 2) of the new ones."""
    rng = np.random.default_rng(0)
    heads, width, cols = 3, 8, 5
    old = rng.standard_normal((heads * width, cols)).astype(np.float32)
    new = llama2c.halves(old, heads).astype(np.float64)
    x = rng.standard_normal(cols)
    angle = rng.standard_normal(width // 2)
    a = (old.astype(np.float64) @ x).reshape(heads, width // 2, 2)
    pairs = (a[..., 0] + 1j * a[..., 1]) * np.exp(1j * angle)
    b = (new @ x).reshape(heads, 2, width // 2)
    split = (b[:, 0] + 1j * b[:, 1]) * np.exp(1j * angle)
    np.testing.assert_allclose(split, pairs, rtol=0, atol=1e-12)
    wrong = (old.astype(np.float64) @ x).reshape(heads, 2, width // 2)  # negative control
    assert np.abs((wrong[:, 0] + 1j * wrong[:, 1]) * np.exp(1j * angle) - pairs).max() > 0.1


def test_a_converted_directory(tmp_path):
    written(tmp_path / "a.bin")
    (tmp_path / "tok.model").write_bytes(b"model")
    config = llama2c.convert(tmp_path / "a.bin", tmp_path / "out", dtype="bfloat16")
    assert directory.read_config(tmp_path / "out").hidden_size == config.hidden_size == 12
    file = SafetensorsFile(tmp_path / "out/model.safetensors")
    assert {info.dtype for info in file.tensors.values()} == {"BF16"}
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"model"
    (tmp_path / "second.model").write_bytes(b"")  # which one is meant is not known
    llama2c.convert(tmp_path / "a.bin", tmp_path / "out2")
    assert not (tmp_path / "out2/tokenizer.model").exists()
    llama2c.convert(tmp_path / "a.bin", tmp_path / "out2", tokenizer=tmp_path / "tok.model")
    assert (tmp_path / "out2/tokenizer.model").read_bytes() == b"model"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/tokenizer.json").write_text("{}")
    for given in ("folder", "folder/tokenizer.json"):
        llama2c.convert(tmp_path / "a.bin", tmp_path / "out2", tokenizer=tmp_path / given)
        assert (tmp_path / "out2/tokenizer.json").read_text() == "{}"
    with pytest.raises(ValueError, match=r"tok\.bin is no tokenizer"):
        llama2c.convert(tmp_path / "a.bin", tmp_path / "out3", tokenizer=tmp_path / "tok.bin")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("dim", 0, "dim is invalid"),
        ("n_layers", -1, "n_layers is invalid"),
        ("vocab_size", 0, "vocab_size is invalid"),
        ("n_heads", 5, "n_heads is invalid"),
        ("n_kv_heads", 2, "n_kv_heads is invalid"),
        ("n_heads", 12, "even width"),
        ("seq_len", 1 << 24, "wrong length"),
        ("hidden_dim", 1 << 24, "wrong length"),
        ("vocab_size", -11, "wrong length"),
        ("dim", 0x616B3432, "version 0"),
    ],
)
def test_bad_headers(tmp_path, key, value, match):
    path = tmp_path / "a.bin"
    written(path)
    data = bytearray(path.read_bytes())
    at = 4 * list(SIZES).index(key)
    data[at : at + 4] = np.int32(value).tobytes()
    path.write_bytes(data)
    with pytest.raises((ValueError, NotImplementedError), match=f"(?s)a.bin.*{match}"):
        llama2c.read(path)


def test_bad_files(tmp_path):
    with pytest.raises(OSError, match="no file"):
        llama2c.read(tmp_path / "missing")
    path = tmp_path / "a.bin"
    for data in (b"", b"123", bytes(27)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.bin is"):
            llama2c.read(path)
    written(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="wrong length"):
        llama2c.read(path)


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_damaged_files_raise_clean_errors(tmp_path, count):
    path = tmp_path / "a.bin"
    written(path, {"dim": 4, "hidden_dim": 4, "n_heads": 2, "seq_len": 2, "n_layers": 1})
    data = path.read_bytes()

    def make(rng):
        if rng.integers(0, 2):
            return fuzz.damage_bytes(data, rng)
        header = np.frombuffer(data[:28], "<i4").copy()
        header[rng.integers(0, 7)] = rng.choice([-(2**31), -2, -1, 0, 1, 2, 8, 2**24, 2**31 - 1])
        return header.tobytes() + data[28:]

    def read(value):
        model = llama2c.parse(np.frombuffer(value, np.uint8), "input")
        assert all(tensor.size >= 0 for tensor in model.tensors.values())

    clean = (ValueError, NotImplementedError)
    assert fuzz.run(count, 20260103, make, read, clean) > 0
