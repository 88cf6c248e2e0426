"""Model directories in Hugging Face's form, read and written through the parameter table."""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from eellm.config import ModelConfig
from eellm.errors import Shown, invalid
from eellm.files.disk import Folder
from eellm.files.dtypes import SAVED_AS, check_dtype, from_float32, to_float32
from eellm.files.locate import inside, read_json
from eellm.files.peers import Peers
from eellm.files.safetensors import (
    DTYPES,
    Entry,
    SafetensorsFile,
    pickle_error,
    total_bytes,
    write_safetensors,
)

if TYPE_CHECKING:
    from eellm._core import ParameterRow

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXITS = "exits.safetensors"
EXITS_INDEX = "exits.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_BUFFERS = re.compile(r"(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
_SHARD = re.compile(r"(model|exits)-\d{5}-of-\d{5}\.safetensors")
_ROWS = 1024
_PREFIXES = ("transformer.", "model.")

log = logging.getLogger("eellm")


class Parameters(Protocol):
    """What has a parameter table and the parameters: a native model."""

    @property
    def table(self) -> Sequence["ParameterRow"]:
        """The rows."""

    def parameter(self, name: str) -> Any:
        """A view of a parameter that NumPy can take."""


def read_config(folder: Path) -> ModelConfig:
    """The config of a model directory."""
    path = inside(folder, CONFIG)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; give a model directory with {CONFIG} and {WEIGHTS}"
        )
    values = read_json(path)
    try:
        return ModelConfig.from_hf(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None


class Weights:
    """The tensors of a model directory by name, wherever they stand."""

    def __init__(self, folder: Path) -> None:
        """Maps all files of weights and checks their headers."""
        self.folder = folder
        self.backbone = _open_backbone(folder)
        self.exits = open_tensors(folder, EXITS) or {}


def open_tensors(folder: Path, name: str) -> dict[str, SafetensorsFile] | None:
    """The tensors of a file, or of the shards that its index names; None without either."""
    single, index = inside(folder, name), inside(folder, f"{name}.index.json")
    if single.is_file():
        return _tensors([SafetensorsFile(single)])
    return _open_shards(folder, index) if index.is_file() else None


def _open_backbone(folder: Path) -> dict[str, SafetensorsFile]:
    found = open_tensors(folder, WEIGHTS)
    if found is not None:
        return found
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for path in folder.glob(pattern):
            raise pickle_error(str(path))
    raise FileNotFoundError(
        f"{folder} has no weights (expected {WEIGHTS} or {INDEX}); give a model directory"
    )


def _open_shards(folder: Path, index: Path) -> dict[str, SafetensorsFile]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise invalid(f"{index}: weight_map is invalid", "file names by tensor name", names)
    files = {}
    for name in names.values():
        path = inside(folder, name)
        if name not in files:
            if not path.is_file():
                raise FileNotFoundError(f"{index} names {name}, which is not there; fetch it again")
            files[name] = SafetensorsFile(path)
    for key, name in names.items():
        if key not in files[name]:
            raise invalid(
                f"{index}: {name} has no {key!r}", "the tensor there", sorted(files[name])
            )
    return _tensors(files.values())


def _tensors(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    result: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file:
            if name in result:
                raise invalid(
                    f"{file.path}: {name!r} also stands in {result[name].path.name}",
                    "each tensor once",
                    name,
                )
            result[name] = file
    return result


def _find(tensors: Mapping[str, SafetensorsFile], name: str) -> str | None:
    """The key of a tensor, which may lack the prefix of its name."""
    if name in tensors:
        return name
    for prefix in _PREFIXES:
        if name.startswith(prefix) and name[len(prefix) :] in tensors:
            return name[len(prefix) :]
    return None


def source_shape(row: "ParameterRow") -> tuple[int, ...]:
    """Shape of the tensor of a file in which a parameter stands."""
    if len(row["shape"]) == 1:
        return (row["source_rows"],)
    rows, cols = row["source_rows"], row["shape"][1]
    return (cols, rows) if row["transposed"] else (rows, cols)


@dataclass(frozen=True)
class Source:
    """Where a parameter stands: a tensor of a file, or some rows of one."""

    row: "ParameterRow"
    file: SafetensorsFile
    key: str

    @property
    def dtype(self) -> str:
        """The dtype of the file: F32, F16 or BF16."""
        return self.file.tensors[self.key].dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.row["shape"]) * DTYPES[self.dtype][0] // 8

    def values(self) -> npt.NDArray[Any]:
        """A view of the file in the parameter's own shape; bfloat16 as uint16."""
        raw = self.file[self.key]
        rows = slice(self.row["source_row"], self.row["source_row"] + self.row["shape"][0])
        return raw[:, rows].T if self.row["transposed"] else raw[rows]

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32; may be a view of the file."""
        values = self.values().T if self.row["transposed"] else self.values()
        values = to_float32(values, self.dtype, f"{self.file.path}: {self.key!r}")
        return values.T if self.row["transposed"] else values


def find_parameters(
    table: Sequence["ParameterRow"],
    config: ModelConfig,
    weights: Weights,
    with_exits: bool = True,
    strict: bool = True,
) -> list[Source]:
    """Where each parameter of a table stands, all of it checked but the numbers.

    strict: a tensor that the model has no place for is an error, else a warning.
    """
    used: dict[bool, set[str]] = {False: set(), True: set()}
    found, missing = [], []
    for row in table:
        of_exit = row["exit"] >= 0
        if of_exit and not with_exits:
            continue
        tensors = weights.exits if of_exit else weights.backbone
        key = _find(tensors, row["source"])
        if key is None:
            missing.append(row["source"])
            continue
        used[of_exit].add(key)
        found.append(Source(row, tensors[key], key))
    _report_missing(weights.folder, list(dict.fromkeys(missing)))
    for source in found:
        _check_form(source)
    if config.tie_word_embeddings:
        _check_tied(weights.backbone, used[False], found)
    unexpected = [name for name in weights.backbone if name not in used[False]]
    unexpected = [name for name in unexpected if not _BUFFERS.search(name)]
    if with_exits:
        unexpected += [name for name in weights.exits if name not in used[True]]
    _report_unexpected(weights.folder, unexpected, strict)
    return found


def find_parameter(row: "ParameterRow", weights: Weights) -> Source:
    """Where one parameter stands."""
    tensors = weights.exits if row["exit"] >= 0 else weights.backbone
    key = _find(tensors, row["source"])
    if key is None:
        _report_missing(weights.folder, [row["source"]])
    assert key is not None
    source = Source(row, tensors[key], key)
    _check_form(source)
    return source


def load_parameters(
    target: Parameters,
    config: ModelConfig,
    weights: Weights,
    with_exits: bool = True,
    strict: bool = True,
) -> None:
    """Fills the parameters that a model holds from files, as `find_parameters` finds them."""
    for source in find_parameters(target.table, config, weights, with_exits, strict):
        if not source.row["held"]:
            continue
        np.asarray(target.parameter(source.row["name"]))[...] = source.float32()


def _check_form(source: Source) -> None:
    where, info = f"{source.file.path}: {source.key!r}", source.file.tensors[source.key]
    expected = source_shape(source.row)
    if info.shape != expected:
        raise invalid(
            f"{where} has the wrong shape",
            str(list(expected)),
            Shown(list(info.shape)),
            f"make {CONFIG} and the weights agree",
        )
    check_dtype(info.dtype, where)


def _some(names: Sequence[str]) -> Shown:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return Shown(", ".join(names[:5]) + more)


def _report_missing(folder: Path, names: Sequence[str]) -> None:
    if not names:
        return
    advice = f"make {CONFIG} and the weights agree"
    if "lm_head.weight" in names:
        advice += "; a model that shares its embedding says tie_word_embeddings true"
    elif names[0].startswith("exits."):
        advice += "; exits=[...] adds new exits to a model without"
    raise ValueError(f"{folder} lacks {len(names)} tensors (expected {_some(names)}); {advice}")


def _report_unexpected(folder: Path, names: Sequence[str], strict: bool) -> None:
    if not names:
        return
    message = f"{folder} has {len(names)} tensors that the model has no place for: {_some(names)}"
    if strict:
        raise ValueError(
            f"{message} (expected none); make {CONFIG} and the weights agree, or load with "
            "strict=False to leave them out"
        )
    log.warning("%s; they are left out", message)


def _check_tied(
    tensors: Mapping[str, SafetensorsFile], used: set[str], found: Sequence[Source]
) -> None:
    """An output matrix beside tied embeddings must hold the same numbers."""
    key = "lm_head.weight"
    if key not in tensors:
        return
    embedding = next(each for each in found if each.row["name"] == "model.embed_tokens.weight")
    used.add(key)
    head = replace(embedding, file=tensors[key], key=key)
    where = f"{head.file.path}: {key!r}"
    check_dtype(head.dtype, where)
    same = head.file.tensors[key].shape == source_shape(embedding.row)
    if not same or not _same_values(head, embedding, where):
        raise invalid(
            f"{where} is not the token embedding",
            "the same numbers, as tie_word_embeddings is true",
            Shown("others"),
            f"set tie_word_embeddings to false in {CONFIG}",
        )


def _same_values(one: Source, other: Source, where: str) -> bool:
    """Compares in pieces, so that no float32 copy of a whole matrix comes to be."""
    a, b = one.values(), other.values()
    return all(
        np.array_equal(
            to_float32(a[start : start + _ROWS], one.dtype, where),
            to_float32(b[start : start + _ROWS], other.dtype, where),
        )
        for start in range(0, len(a), _ROWS)
    )


def entries_of_model(source: Parameters, dtype: str, of_exits: bool) -> list[Entry]:
    """The tensors of a file that the model owns, joined and transposed as their family has them."""
    if dtype not in SAVED_AS:
        raise invalid("dtype is invalid", f"one of {', '.join(SAVED_AS)}", dtype)
    groups: dict[str, list[ParameterRow]] = {}
    for row in source.table:
        if (row["exit"] >= 0) == of_exits and row["owned"]:
            groups.setdefault(row["source"], []).append(row)
    return [
        Entry(name, SAVED_AS[dtype], source_shape(rows[0]), partial(_join, source, rows, dtype))
        for name, rows in groups.items()
    ]


def _join(source: Parameters, rows: Sequence["ParameterRow"], dtype: str) -> npt.NDArray:
    ordered = sorted(rows, key=lambda row: row["source_row"])
    parts = [np.asarray(source.parameter(row["name"])) for row in ordered]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if rows[0]["transposed"]:
        joined = joined.T
    return from_float32(joined, dtype, rows[0]["source"])


def write_model(
    folder: Folder,
    config: ModelConfig,
    source: Parameters,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    peers: Peers | None = None,
) -> None:
    """Writes config.json, the backbone and the exits into a folder; with peers each rank its
    part, and the first one the rest."""
    peers = peers or Peers()
    if peers.first:
        write_config(folder, config, dtype)
    backbone = entries_of_model(source, dtype, of_exits=False)
    write_tensors(folder, WEIGHTS, backbone, max_shard_bytes, peers)
    exits = entries_of_model(source, dtype, of_exits=True)
    write_tensors(folder, EXITS, exits, max_shard_bytes, peers, {"format_version": "1"})


def write_config(folder: Folder, config: ModelConfig, dtype: str) -> None:
    """Writes config.json for weights of a dtype."""
    values = config.to_hf()
    values.pop("dtype", None)  # the newer name of torch_dtype; every Transformers reads the older
    values["torch_dtype"] = dtype
    folder.write(CONFIG, (json.dumps(values, indent=2) + "\n").encode())


def write_tensors(
    folder: Folder,
    name: str,
    entries: Sequence[Entry],
    max_shard_bytes: int,
    peers: Peers,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file of tensors, or shards with an index: where it would be too large, or where
    several ranks have tensors for it. No tensors make no file."""
    if max_shard_bytes < 1:
        raise invalid("max_shard_bytes is invalid", "a positive number", max_shard_bytes)
    shards: list[list[Entry]] = []
    for each in entries:
        if not shards or total_bytes(shards[-1]) + each.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(each)
    counts = peers.gather(len(shards))
    first, total = sum(counts[: peers.rank]), sum(counts)
    if total == 1:
        for shard in shards:
            write_safetensors(folder, name, shard, metadata)
        return
    stem, ending = name.rsplit(".", 1)
    names = {}
    for i, shard in enumerate(shards):
        file = f"{stem}-{first + i + 1:05d}-of-{total:05d}.{ending}"
        write_safetensors(folder, file, shard, metadata)
        names.update({each.name: file for each in shard})
    parts = peers.gather({"size": total_bytes(entries), "names": names})
    if peers.first and total:
        joined = {key: file for part in parts for key, file in part["names"].items()}
        size = sum(part["size"] for part in parts)
        index = {"metadata": {"total_size": size}, "weight_map": joined}
        folder.write(f"{name}.index.json", (json.dumps(index, indent=2) + "\n").encode())


def copy_tokenizer(source: Path, folder: Folder) -> None:
    """Copies tokenizer files along."""
    for name in TOKENIZER_FILES:
        path = inside(source, name)
        if path.is_file():
            folder.copy(path, name)


def save_directory(
    path: str | os.PathLike[str],
    config: ModelConfig,
    source: Parameters,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Path | None = None,
    peers: Peers | None = None,
) -> None:
    """Writes a model directory; what it held before stays until all is written."""
    peers = peers or Peers()
    if Path(path).exists() and not Path(path).is_dir():
        raise invalid(f"{path} is a file", "a folder, new or old", Shown("a file"))
    folder = Folder(path, staged=True)

    def write() -> None:
        write_model(folder, config, source, dtype, max_shard_bytes, peers)
        if tokenizer is not None and peers.first:
            copy_tokenizer(tokenizer, folder)

    try:
        peers.together(write)
        peers.together(folder.commit)
        written = {name for part in peers.gather(sorted(folder.files)) for name in part}
        peers.on_first(lambda: _remove_stale(folder.path, written))
    except BaseException:
        folder.abort()
        raise


def commit(folder: Folder) -> None:
    """Gives the files of a staged model directory their names; drops weights of an older one."""
    folder.commit()
    _remove_stale(folder.path, set(folder.files))


def _remove_stale(path: Path, written: set[str]) -> None:
    for each in path.iterdir():
        stale = each.name in (WEIGHTS, INDEX, EXITS, EXITS_INDEX) or _SHARD.fullmatch(each.name)
        if stale and each.name not in written:
            each.unlink()
