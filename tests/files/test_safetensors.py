"""The safetensors reader and writer against the reference library, its rules, and damaged files."""

import json

import numpy as np
import pytest

from eellm.files.disk import Folder
from eellm.files.safetensors import (
    DTYPES,
    Entry,
    SafetensorsFile,
    entries_of,
    parse_header,
    save_file,
    write_safetensors,
)
from tests.files import fuzz

reference = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    result = {
        "empty": np.zeros((0, 3), np.int64),
        "scalar": np.array(3.5),
        "flag": np.array([True]),
    }
    for i, kind in enumerate("<u1 <i1 <u2 <i2 <f2 <u4 <i4 <f4 <u8 <i8 <f8".split()):
        shape = tuple(rng.integers(1, 6, i % 4))
        result[f"of.{kind[1:]}"] = np.asarray(rng.integers(0, 100, shape)).astype(kind)
    return result


def same(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and got[key].shape == value.shape, key
        np.testing.assert_array_equal(got[key], value)


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    reference.save_file(arrays(), path, metadata={"format": "pt", "ä": "ö"})
    file = SafetensorsFile(path)
    same({key: file[key] for key in file}, arrays())
    assert file.metadata == {"format": "pt", "ä": "ö"}


def test_the_library_reads_what_we_write(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(arrays(), path)
    same(reference.load_file(path), arrays())
    assert parse_header(path.read_bytes(), "a").data_start % 64 == 0


def test_bfloat16_is_read_as_bits(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_torch

    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_torch({"a": values}, tmp_path / "a.safetensors")
    bits = SafetensorsFile(tmp_path / "a.safetensors")["a"]
    np.testing.assert_array_equal(bits, values.view(torch.uint16).numpy())
    write_safetensors(Folder(tmp_path), "b.safetensors", [Entry("a", "BF16", (7, 5), bits)])
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], values)


def test_views_are_read_only_and_copy_nothing(tmp_path):
    save_file({"a": np.arange(12, dtype=np.float32)}, tmp_path / "a.safetensors")
    view = SafetensorsFile(tmp_path / "a.safetensors")["a"]
    assert not view.flags.writeable and not view.flags.owndata
    with pytest.raises(ValueError):
        view[0] = 1


def test_dtypes_without_numpy_type_are_listed_and_refused(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    path = tmp_path / "a.safetensors"
    path.write_bytes(built(header, b"xy"))
    file = SafetensorsFile(path)
    assert file.tensors["a"].dtype == "F8_E4M3"
    with pytest.raises(ValueError, match=r"a\.safetensors: 'a'.*F32.*F8_E4M3"):
        file["a"]


def built(header, data=b""):
    text = header if isinstance(header, bytes) else fuzz.encode(header)
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


DATA = b"\0" * 4
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BROKEN = {
    "too short": (b"\0" * 7, "too short"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "header length"),
    "header over the limit": ((1 << 62).to_bytes(8, "little") + b"{}", "header length"),
    "no brace": (built(b" {}"), "'{'"),
    "empty header": (built(b""), "'{'"),
    "no JSON": (built(b'{"a"'), "JSON"),
    "no UTF-8": (built(b'{"\xff":1}'), "JSON"),
    "too deep": (built(DEEP), "JSON"),
    "NaN": (built(b'{"a":NaN}'), "JSON"),
    "huge number": (built(b'{"a":' + b"9" * 6000 + b"}"), "JSON"),
    "key twice": (
        built(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2), DATA),
        "stands twice",
    ),
    "metadata no text": (built({"__metadata__": {"a": 1}}), "__metadata__"),
    "tensor no table": (built({"a": 1}), "data_offsets"),
    "unknown dtype": (built({"a": tensor("F31")}, DATA), "'a' has an unknown dtype"),
    "negative size": (built({"a": tensor(shape=[-1])}, DATA), "'a' has an invalid shape"),
    "size no integer": (built({"a": tensor(shape=[1.0])}, DATA), "'a' has an invalid shape"),
    "size a boolean": (built({"a": tensor(shape=[True])}, DATA), "'a' has an invalid shape"),
    "shape overflows": (built({"a": tensor(shape=[1 << 62, 1 << 62])}, DATA), "too large"),
    "shape overflows to zero": (built({"a": tensor(shape=[1 << 62, 4, 0])}), "too large"),
    "rank too large": (built({"a": tensor(shape=[1] * 65)}, DATA), "too large"),
    "offsets reversed": (built({"a": tensor(offsets=[4, 0])}, DATA), "data_offsets"),
    "size and offsets differ": (built({"a": tensor(shape=[2])}, DATA), "number of bytes"),
    "hole at the beginning": (built({"a": tensor(offsets=[4, 8])}, DATA * 2), "follows a hole"),
    "hole": (
        built({"a": tensor(), "b": tensor(offsets=[8, 12])}, DATA * 3),
        "'b' follows a hole",
    ),
    "overlap": (built({"a": tensor(), "b": tensor()}, DATA), "overlaps"),
    "data missing": (built({"a": tensor()}, DATA[:3]), "wrong length"),
    "data left": (built({"a": tensor()}, DATA + b"x"), "wrong length"),
    "zip of a pickle": (b"PK\x03\x04" + b"\0" * 20, "pickled weights.*from_pretrained"),
    "pickle": (b"\x80\x02}q" + b"\0" * 20, "pickled weights"),
    "unprintable name": (built({"a\n": tensor()}, DATA), "unusable name"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_rule(name, tmp_path):
    data, match = BROKEN[name]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"(?s)broken.*{match}"):
        SafetensorsFile(path)


def test_a_valid_file_of_the_same_make_is_accepted():
    assert parse_header(built({"a": tensor()}, DATA), "a").tensors["a"].shape == (1,)
    assert parse_header(built({}), "a").tensors == {}


def test_other_kinds_of_files(tmp_path):
    with pytest.raises(OSError):
        SafetensorsFile(tmp_path / "missing")
    with pytest.raises(ValueError, match="no file"):
        SafetensorsFile(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="too short"):
        SafetensorsFile(tmp_path / "empty")


def test_writing_refuses_names_and_dtypes(tmp_path):
    with pytest.raises(ValueError, match="stands twice"):
        write_safetensors(Folder(tmp_path), "a", [Entry("a", "F32", (1,), np.zeros(1))] * 2)
    with pytest.raises(ValueError, match="not written"):
        entries_of({"a": np.zeros(2, complex)})


def valid_files():
    result = []
    for seed in range(4):
        result.append(reference.save(arrays(seed), metadata={"a": "b"} if seed % 2 else None))
    return result


def split(data):
    stop = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:stop]), data[stop:]


def damaged(rng, files):
    data = files[int(rng.integers(0, len(files)))]
    if rng.integers(0, 2):
        return fuzz.damage_bytes(data, rng)
    header, body = split(data)
    return built(fuzz.damage_json(header, rng), body)


def accepted_by_library(data):
    import safetensors

    try:
        safetensors.deserialize(data)
        return True
    except safetensors.SafetensorError:
        return False


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_damaged_files_raise_clean_errors(count):
    """What we accept the library accepts too, and every tensor of it can be read."""
    files = valid_files()

    def read(data):
        header = parse_header(data, "input")
        assert accepted_by_library(data)
        for info in header.tensors.values():
            kind = DTYPES[info.dtype][1]
            if kind and info.stop > info.start:
                np.frombuffer(data, kind, int(np.prod(info.shape)), header.data_start + info.start)

    accepted = fuzz.run(count, 20260101, lambda rng: damaged(rng, files), read, (ValueError,))
    assert 0 < accepted < count


def test_the_fuzzer_sees_a_missing_check(monkeypatch):
    """Negative control: without the check of the layout, damage goes through."""
    monkeypatch.setattr("eellm.files.safetensors._check_layout", lambda *arguments: None)
    with pytest.raises(AssertionError):
        test = test_damaged_files_raise_clean_errors
        test(10_000)
