"""Model directories: names, shapes, fused and transposed tensors, shards, and what is refused."""

import functools
import json
import logging
import os
import sys

import numpy as np
import pytest

from eellm.config import ExitConfig, ModelConfig
from eellm.files import directory
from eellm.files.dtypes import from_float32, to_float32
from eellm.files.locate import find_folder, inside, read_json
from eellm.files.safetensors import SafetensorsFile, save_file
from tests.files import fuzz
from tests.files.fake import FakeModel, gpt2_rows

CONFIG = ModelConfig.gpt2(
    vocab_size=6, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, exits=[ExitConfig(1)]
)


def model(seed=0):
    return FakeModel(gpt2_rows(exits=True), seed)


def assert_equal(got, expected):
    for name, value in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], value, err_msg=name)


def load(folder, into=None, **options):
    target = into or model(9)
    directory.load_parameters(
        target, directory.read_config(folder), directory.Weights(folder), **options
    )
    return target


def rewrite(folder, change, file="model.safetensors"):
    """Saves the tensors of a file anew after `change` has had its way with them."""
    path = folder / file
    old = SafetensorsFile(path)
    tensors = {key: np.array(old[key]) for key in old}
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path):
    directory.save_directory(tmp_path / "model", CONFIG, model())
    return tmp_path / "model"


def test_tensors_stand_as_transformers_has_them(folder):
    source, file = model(), SafetensorsFile(folder / "model.safetensors")
    parts = [source.arrays[f"model.layers.0.self_attn.{each}_proj.weight"] for each in "qkv"]
    np.testing.assert_array_equal(
        file["transformer.h.0.attn.c_attn.weight"], np.concatenate([each.T for each in parts], 1)
    )
    assert file["transformer.h.0.mlp.c_fc.weight"].shape == (4, 8)
    assert list(SafetensorsFile(folder / "exits.safetensors")) == ["exits.0.norm.weight"]
    assert file.metadata["format"] == "pt"


def test_a_saved_model_loads_again(folder):
    assert_equal(load(folder), model())
    assert directory.read_config(folder) == ModelConfig.from_hf(CONFIG.to_hf() | {
        "torch_dtype": "float32"
    })  # fmt: skip


@pytest.mark.parametrize("size", [1, 100, 200])
def test_shards(tmp_path, size):
    directory.save_directory(tmp_path, CONFIG, model(), max_shard_bytes=size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1 and files == {p.name for p in tmp_path.glob("model-*.safetensors")}
    assert_equal(load(tmp_path), model())
    directory.save_directory(tmp_path, CONFIG, model(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "exits.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert_equal(load(tmp_path), model(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    directory.save_directory(tmp_path, CONFIG, model(), dtype=dtype)
    got = load(tmp_path)
    for name, value in model().arrays.items():
        expected = torch.from_numpy(value).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(got.arrays[name], expected)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype


def test_conversions_agree_with_torch_on_every_kind_of_number():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, 3_000_000, dtype=np.uint64).astype(np.uint32)
    edges = np.array([0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x3F808000,
                      0x3F818000, 1, 0x80000000], np.uint32)  # fmt: skip
    values = np.concatenate([edges, bits]).view(np.float32)
    ours = from_float32(values, "bfloat16", "values")
    theirs = torch.from_numpy(values).bfloat16()
    back, expected = to_float32(ours, "BF16", "values"), theirs.float().numpy()
    np.testing.assert_array_equal(back, expected)  # NaN equals NaN, whatever its bits
    halves = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(
        to_float32(halves.view(np.float16), "F16", "halves"),
        torch.from_numpy(halves.view(np.float16)).float().numpy(),
    )


def test_float16_that_overflows_is_refused():
    with pytest.raises(ValueError, match=r"w does not fit into float16.*65504.*bfloat16"):
        from_float32(np.array([1e6], np.float32), "float16", "w")


def test_prefixes_are_optional_and_buffers_ignored(folder):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
        tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)

    rewrite(folder, strip)
    assert_equal(load(folder), model())


def test_missing_and_unexpected_tensors(folder, caplog):
    rewrite(folder, lambda t: t.update({"extra.weight": np.zeros(2, np.float32)}))
    with pytest.raises(ValueError, match=r"extra\.weight.*strict=False"):
        load(folder)
    with caplog.at_level(logging.WARNING, "eellm"):
        assert_equal(load(folder, strict=False), model())
    assert "extra.weight" in caplog.text
    rewrite(folder, lambda t: t.pop("transformer.wte.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(expected transformer\.wte\.weight\)"):
        load(folder, strict=False)
    (folder / "exits.safetensors").unlink()
    rewrite(folder, lambda t: t.update({"transformer.wte.weight": np.zeros((6, 4), np.float32)}))
    with pytest.raises(ValueError, match=r"exits\.0\.norm\.weight.*exits=\[\.\.\.\]"):
        load(folder, strict=False)


def test_a_wrong_shape_names_file_key_and_both_shapes(folder):
    name = "transformer.h.0.mlp.c_fc.weight"
    rewrite(folder, lambda t: t.update({name: np.zeros((8, 4), np.float32)}))
    with pytest.raises(ValueError, match=rf"model\.safetensors: '{name}'.*\[4, 8\].*\[8, 4\]"):
        load(folder)


def test_a_wrong_dtype_is_refused(folder):
    rewrite(folder, lambda t: t.update({"transformer.wte.weight": np.zeros((6, 4), np.int64)}))
    with pytest.raises(ValueError, match=r"'transformer\.wte\.weight'.*BF16.*I64"):
        load(folder)


def test_an_output_matrix_beside_tied_embeddings(folder):
    embedding = model().arrays["model.embed_tokens.weight"]
    rewrite(folder, lambda t: t.update({"lm_head.weight": embedding}))
    assert_equal(load(folder), model())
    rewrite(folder, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match="tie_word_embeddings to false"):
        load(folder)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..", "", "a\\b", "a\0", 3, None])
def test_names_out_of_the_folder_are_refused(folder, name):
    index = {"weight_map": {"transformer.wte.weight": name}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="plain file name"):
        directory.Weights(folder)


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    os.rename(folder / "model.safetensors", tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="link out of its folder"):
        directory.Weights(folder)


def test_the_cache_of_the_hub_is_read(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a/snapshots/1", tmp_path / "models--a/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(folder.iterdir()):
        os.rename(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert_equal(load(snapshot), model())


def test_an_index_must_fit_its_files(tmp_path):
    directory.save_directory(tmp_path, CONFIG, model(), max_shard_bytes=100)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "other": file}}))
    with pytest.raises(ValueError, match=f"{file} has no 'other'"):
        directory.Weights(tmp_path)
    path.write_text(json.dumps(index))
    (tmp_path / file).unlink()
    with pytest.raises(OSError, match=f"{file}, which is not there"):
        directory.Weights(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(folder, name):
    os.rename(folder / "model.safetensors", folder / name)
    with pytest.raises(ValueError, match=f"{name} holds pickled weights.*save_pretrained"):
        directory.Weights(folder)


def test_a_pickle_by_another_name_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="pickled weights"):
        directory.Weights(folder)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        directory.read_config(tmp_path)
    with pytest.raises(OSError, match="has no weights"):
        directory.Weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is broken"):
        directory.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config\.json: vocab_size is missing"):
        directory.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(NotImplementedError, match=r"config\.json: .*'mamba'.*eellm, llama, gpt2"):
        directory.read_config(tmp_path)


def test_find_folder(tmp_path, monkeypatch):
    assert find_folder(tmp_path) == tmp_path
    with pytest.raises(OSError, match="there is no folder"):
        find_folder(tmp_path / "missing")
    (tmp_path / "a.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="pickled"):
        find_folder(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="eellm convert"):
        find_folder(tmp_path / "b.bin")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OSError, match=r"no folder owner/name.*huggingface_hub"):
        find_folder("owner/name")


def test_hub_names_go_to_the_hub_client(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    calls = []

    def fetch(name, **options):
        calls.append((name, options["revision"]))
        if name == "owner/missing":
            raise ConnectionError("no network")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert find_folder("owner/name", "main") == tmp_path
    with pytest.raises(OSError, match=r"no folder owner/missing.*hub.*no network.*connection"):
        find_folder("owner/missing")
    assert calls == [("owner/name", "main"), ("owner/missing", None)]


def test_a_failed_save_leaves_the_old_model(folder, monkeypatch):
    from eellm.files.disk import reset_faults

    n = 1
    while True:
        reset_faults()
        monkeypatch.setenv("EELLM_FAIL_AT", str(n))
        try:
            directory.save_directory(folder, CONFIG, model(5))
            break
        except OSError as error:
            assert "free some space" in str(error) and str(folder) in str(error)
        monkeypatch.delenv("EELLM_FAIL_AT")
        assert not list(folder.glob("*.eellm-new"))
        load(folder)
        n += 1
    assert n > 10
    assert_equal(load(folder), model(5))


def test_a_file_is_no_folder_to_save_in(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="is a file"):
        directory.save_directory(tmp_path / "a", CONFIG, model())


def test_tokenizer_files_are_copied(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "other.txt").write_text("")
    directory.save_directory(tmp_path / "new", CONFIG, model(), tokenizer=folder)
    assert (tmp_path / "new/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "new/other.txt").exists()
    directory.save_directory(folder, CONFIG, model(), tokenizer=folder)
    assert (folder / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_damaged_indexes_raise_clean_errors(memory_path, monkeypatch, count):
    monkeypatch.setattr(directory, "SafetensorsFile", functools.cache(SafetensorsFile))
    directory.save_directory(memory_path, CONFIG, model(), max_shard_bytes=100)
    path = memory_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    def make(rng):
        if rng.integers(0, 2):
            return fuzz.damage_bytes(json.dumps(index).encode(), rng)
        return fuzz.encode(fuzz.damage_json(index, rng))

    def read(data):
        path.write_bytes(data)
        weights = directory.Weights(memory_path)
        assert all(file.path.parent == memory_path for file in weights.backbone.values())

    assert fuzz.run(count, 20260102, make, read, (ValueError, OSError)) > 0


def test_reading_json_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("eellm.files.locate.MAX_JSON", 10)
    (tmp_path / "a.json").write_text('{"a": 123456}')
    with pytest.raises(ValueError, match="too large"):
        read_json(tmp_path / "a.json")
    assert inside(tmp_path, "a.json") == tmp_path / "a.json"
