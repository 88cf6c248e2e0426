"""Reads models in the llama2.c v0 layout and writes them as model directories."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eellm.config import ModelConfig
from eellm.errors import invalid
from eellm.files import directory
from eellm.files.disk import Folder
from eellm.files.dtypes import SAVED_AS, from_float32
from eellm.files.peers import Peers
from eellm.files.safetensors import Entry

_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_LIMIT = 1 << 24
MAGIC_V1 = 0x616B3432  # versions 1 and 2 begin with it


@dataclass(frozen=True)
class Llama2c:
    """A model read: its config, and its tensors under Transformers' names."""

    config: ModelConfig
    tensors: dict[str, npt.NDArray[np.float32]]


def read_header(data: npt.NDArray[np.uint8], where: str) -> dict[str, int]:
    """The seven checked sizes; vocab_size negative: the output matrix is not shared."""
    if data.size < 28:
        raise invalid(f"{where} is too short", "28 bytes of header", data.size)
    numbers = [int(each) for each in data[:28].view("<i4")]
    if numbers[0] & 0xFFFFFFFF == MAGIC_V1:
        raise NotImplementedError(
            f"{where} is in version 1 or 2 of llama2.c's layout (expected version 0); export it "
            "with --version 0"
        )
    sizes = dict(zip(_HEADER, numbers, strict=True))
    for key, value in sizes.items():
        if not 1 <= (abs(value) if key == "vocab_size" else value) <= _LIMIT:
            raise invalid(
                f"{where}: {key} is invalid",
                f"an integer from 1 to {_LIMIT}",
                value,
                "the file is no llama2.c model of version 0, or damaged",
            )
    for key, divisor, of in (
        ("n_heads", sizes["n_heads"], sizes["dim"]),
        ("n_kv_heads", sizes["n_kv_heads"], sizes["n_heads"]),
    ):
        if of % divisor:
            raise invalid(f"{where}: {key} is invalid", f"a divisor of {of}", divisor)
    if sizes["dim"] // sizes["n_heads"] % 2:
        raise invalid(f"{where}: n_heads is invalid", "heads of an even width", sizes["n_heads"])
    return sizes


def _parts(sizes: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What stands in the file after the header, in order."""
    dim, hidden, layers = sizes["dim"], sizes["hidden_dim"], sizes["n_layers"]
    width = dim // sizes["n_heads"]
    kv = width * sizes["n_kv_heads"]
    vocab = abs(sizes["vocab_size"])
    yield "embedding", (vocab, dim)
    yield "input_layernorm", (layers, dim)
    yield "self_attn.q_proj", (layers, dim, dim)
    yield "self_attn.k_proj", (layers, kv, dim)
    yield "self_attn.v_proj", (layers, kv, dim)
    yield "self_attn.o_proj", (layers, dim, dim)
    yield "post_attention_layernorm", (layers, dim)
    yield "mlp.gate_proj", (layers, hidden, dim)
    yield "mlp.down_proj", (layers, dim, hidden)
    yield "mlp.up_proj", (layers, hidden, dim)
    yield "norm", (dim,)
    yield "rope_cos", (sizes["seq_len"], width // 2)
    yield "rope_sin", (sizes["seq_len"], width // 2)
    if sizes["vocab_size"] < 0:
        yield "head", (vocab, dim)


def halves(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of queries or keys reordered from rotated pairs (2i, 2i + 1) to (i, i + D / 2)."""
    rows, cols = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, cols)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, cols)


def read(path: str | os.PathLike[str]) -> Llama2c:
    """Reads a model and checks its sizes against the file's length."""
    where = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {where}; give a llama2.c model")
    if not Path(path).stat().st_size:
        raise invalid(f"{where} is empty", "a llama2.c model", 0)
    return parse(np.memmap(path, np.uint8, "r"), where)


def parse(data: npt.NDArray[np.uint8], where: str) -> Llama2c:
    """The model in the bytes of a file, as views of them where nothing is reordered."""
    sizes = read_header(data, where)
    shapes = dict(_parts(sizes))
    counts = {key: int(np.prod([int(n) for n in shape])) for key, shape in shapes.items()}
    expected = 28 + 4 * sum(counts.values())
    if data.size != expected:
        raise invalid(
            f"{where} has the wrong length",
            f"{expected} bytes for {', '.join(f'{k} {v}' for k, v in sizes.items())}",
            data.size,
            "the file is cut short, or no llama2.c model of version 0",
        )
    numbers = data[28:].view("<f4")
    parts, position = {}, 0
    for key, shape in shapes.items():
        parts[key] = numbers[position : position + counts[key]].reshape(shape)
        position += counts[key]
    return Llama2c(_config(sizes), _named(parts, sizes))


def _config(sizes: dict[str, int]) -> ModelConfig:
    return ModelConfig.llama(
        vocab_size=abs(sizes["vocab_size"]),
        hidden_size=sizes["dim"],
        intermediate_size=sizes["hidden_dim"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        max_position_embeddings=sizes["seq_len"],
        norm_eps=1e-5,
        tie_word_embeddings=sizes["vocab_size"] > 0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _named(
    parts: dict[str, npt.NDArray[np.float32]], sizes: dict[str, int]
) -> dict[str, npt.NDArray[np.float32]]:
    rotated = {"self_attn.q_proj": sizes["n_heads"], "self_attn.k_proj": sizes["n_kv_heads"]}
    result = {"model.embed_tokens.weight": parts["embedding"]}
    beside = ("embedding", "norm", "rope_cos", "rope_sin", "head")
    for layer in range(sizes["n_layers"]):
        for key, values in parts.items():
            if key not in beside:
                weight = values[layer]
                if key in rotated:
                    weight = halves(weight, rotated[key])
                result[f"model.layers.{layer}.{key}.weight"] = weight
    result["model.norm.weight"] = parts["norm"]
    if "head" in parts:
        result["lm_head.weight"] = parts["head"]
    return result


def convert(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
) -> ModelConfig:
    """Writes a llama2.c model as a model directory that Transformers can load too.

    tokenizer: a SentencePiece .model file, a tokenizer.json, or a folder with either; without one,
    a single .model file beside the model.
    """
    if dtype not in SAVED_AS:
        raise invalid("dtype is invalid", f"one of {', '.join(SAVED_AS)}", dtype)
    model = read(path)
    found = _tokenizer(Path(path), tokenizer)
    entries = [
        Entry(name, SAVED_AS[dtype], values.shape, from_float32(values, dtype, name))
        for name, values in model.tensors.items()
    ]
    folder = Folder(target, staged=True)
    try:
        directory.write_config(folder, model.config, dtype)
        directory.write_tensors(
            folder, directory.WEIGHTS, entries, directory.MAX_SHARD_BYTES, Peers()
        )
        if found is not None and found.is_dir():
            directory.copy_tokenizer(found, folder)
        elif found is not None:
            folder.copy(found, f"tokenizer{found.suffix}")
        directory.commit(folder)
    except BaseException:
        folder.abort()
        raise
    return model.config


def _tokenizer(model: Path, given: str | os.PathLike[str] | None) -> Path | None:
    if given is None:
        beside = sorted(model.parent.glob("*.model"))
        return beside[0] if len(beside) == 1 else None
    path = Path(given)
    if path.is_dir() or (path.is_file() and path.suffix in (".model", ".json")):
        return path
    raise invalid(f"{path} is no tokenizer", "a .model or .json file, or a folder", path.name)
