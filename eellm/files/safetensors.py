"""The safetensors format: a reader that maps the file and checks all of it, and a writer."""

import json
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from eellm.errors import Shown, invalid
from eellm.files.disk import Folder

MAX_HEADER = 100_000_000
_ALIGN = 64
_MAX_RANK = 64  # as NumPy's

# Bits of an element, and NumPy's type where there is one (bfloat16 comes as its bits).
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "?"),
    "U8": (8, "<u1"),
    "I8": (8, "<i1"),
    "U16": (16, "<u2"),
    "I16": (16, "<i2"),
    "F16": (16, "<f2"),
    "BF16": (16, "<u2"),
    "U32": (32, "<u4"),
    "I32": (32, "<i4"),
    "F32": (32, "<f4"),
    "U64": (64, "<u8"),
    "I64": (64, "<i8"),
    "F64": (64, "<f8"),
    "C64": (64, None),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F8_E4M3": (8, None),
    "F8_E5M2": (8, None),
    "F8_E8M0": (8, None),
    "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None),
}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header tells it; start and stop count from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The checked header of a file of `size` bytes, whose data begin at `data_start`."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int


def pickle_error(where: str) -> ValueError:
    """The error for weights that could only be unpickled."""
    return invalid(
        f"{where} holds pickled weights, which can run code when loaded",
        "safetensors",
        Shown("a pickle"),
        "save them anew with Transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
        ".save_pretrained(NEW_FOLDER)",
    )


def is_pickle(beginning: bytes) -> bool:
    """Whether a file, by its first 9 bytes, is a pickle or PyTorch's zip archive of one.

    A safetensors file may begin with the same bytes, but has a brace at the ninth.
    """
    return beginning.startswith(_PICKLES) and beginning[8:9] != b"{"


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} stands twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def parse_header(data: memoryview | bytes, where: str) -> Header:
    """Reads and checks the header of a whole file in memory; ValueError says what is wrong."""
    size = len(data)
    if is_pickle(bytes(data[:9])):
        raise pickle_error(where)
    if size < 8:
        raise invalid(f"{where} is too short", "at least 8 bytes", size)
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, size - 8):
        raise invalid(
            f"{where} has an impossible header length",
            f"at most {min(MAX_HEADER, size - 8)} bytes",
            length,
            "the file is cut short or no safetensors file; fetch it again",
        )
    raw = bytes(data[8 : 8 + length])
    if not raw.startswith(b"{"):
        raise invalid(f"{where} has a broken header", "'{' at its beginning", raw[:1])
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_refuse_constant
        )
        if b"\\ud" in raw.lower():  # half a surrogate pair is no Unicode
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"{where} has a broken header", "JSON", Shown(str(error)[:200])) from None
    metadata = _metadata(header.pop("__metadata__", None), where)
    tensors = {key: _tensor(key, value, where) for key, value in header.items()}
    _check_layout(tensors, size - 8 - length, where)
    return Header(metadata, tensors, 8 + length)


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise invalid(f"{where}: __metadata__ is invalid", "texts under keys", value)
    return value


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(each) is int and 0 <= each < 1 << 63 for each in value
    )


def _tensor(key: str, value: Any, where: str) -> TensorInfo:
    name = f"{where}: {key!r}"
    if not key.isprintable():  # also what is no valid Unicode
        raise invalid(f"{where} has an unusable name", "a printable one", key)
    if not isinstance(value, dict):
        raise invalid(f"{name} is invalid", "dtype, shape and data_offsets", value)
    dtype, shape, offsets = (value.get(each) for each in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise invalid(f"{name} has an unknown dtype", f"one of {', '.join(DTYPES)}", dtype)
    if not _counts(shape):
        raise invalid(f"{name} has an invalid shape", "a list of counts", shape)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise invalid(f"{name} has invalid data_offsets", "begin and end", offsets)
    bits = DTYPES[dtype][0]
    for count in shape:
        bits *= count
        if bits >= 1 << 64 or len(shape) > _MAX_RANK:
            raise invalid(f"{name} is too large", "a tensor that can be addressed", shape)
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise invalid(
            f"{name} has the wrong number of bytes",
            f"{bits / 8:.16g} for {dtype} {shape}",
            offsets[1] - offsets[0],
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _check_layout(tensors: Mapping[str, TensorInfo], size: int, where: str) -> None:
    position = 0
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "follows a hole"
            raise invalid(f"{where}: {key!r} {kind}", f"offset {position}", info.start)
        position = info.stop
    if position != size:
        raise invalid(
            f"{where} has the wrong length",
            f"{position} bytes of data",
            size,
            "the file is cut short or damaged; fetch it again",
        )


class SafetensorsFile:
    """A mapped file: `file[name]` is a read-only view of a tensor, without a copy."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Maps the file and checks its header."""
        self.path = Path(path)
        self._map: mmap.mmap | bytes = b""
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise invalid(f"{path} is no file", "a regular file", Shown("another kind"))
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = parse_header(memoryview(self._map), str(path))
        self.metadata, self.tensors = header.metadata, header.tensors
        self._data_start = header.data_start

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self.tensors)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """A view of the tensor, bfloat16 as uint16."""
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        info = self.tensors[name]
        kind = DTYPES[info.dtype][1]
        if kind is None:
            readable = ", ".join(key for key, (_, numpy) in DTYPES.items() if numpy)
            raise invalid(
                f"{self.path}: {name!r} has a dtype that is not read",
                f"one of {readable}",
                info.dtype,
            )
        count = math.prod(info.shape)
        if count == 0:
            return np.empty(info.shape, kind)
        view = np.frombuffer(self._map, kind, count, self._data_start + info.start)
        return view.reshape(info.shape)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: `data` is an array or makes one when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8


_OF_NUMPY = {kind: key for key, (_, kind) in DTYPES.items() if kind and key != "BF16"}


def entries_of(tensors: Mapping[str, npt.NDArray[Any]]) -> list[Entry]:
    """Entries of arrays, each in its own dtype."""
    result = []
    for name, array in tensors.items():
        kind = array.dtype.newbyteorder("<").str.replace("|b1", "?").replace("|", "<")
        if kind not in _OF_NUMPY:
            raise invalid(f"{name} has a dtype that is not written", "numbers", array.dtype.name)
        result.append(Entry(name, _OF_NUMPY[kind], array.shape, array))
    return result


def write_safetensors(
    folder: Folder,
    name: str,
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, one tensor after the other: wide dtypes first, then by name."""
    ordered = sorted(entries, key=lambda each: (-DTYPES[each.dtype][0], each.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for each in ordered:
        if each.name in header:
            raise invalid(f"{name}: the name {each.name!r} stands twice", "each once", each.name)
        header[each.name] = {
            "dtype": each.dtype,
            "shape": list(each.shape),
            "data_offsets": [position, position + each.nbytes],
        }
        position += each.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    with folder.create(name) as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for each in ordered:
            data = each.data() if callable(each.data) else each.data
            array = np.ascontiguousarray(data, DTYPES[each.dtype][1])
            if array.nbytes != each.nbytes:
                raise invalid(f"{name}: {each.name!r}", f"{each.nbytes} bytes", array.nbytes)
            writer.write(array.reshape(-1).view(np.uint8))


def save_file(tensors: Mapping[str, npt.NDArray[Any]], path: str | os.PathLike[str]) -> None:
    """Writes arrays to a file of any name."""
    target = Path(path)
    folder = Folder(target.parent, staged=True)
    try:
        write_safetensors(folder, target.name, entries_of(tensors))
        folder.commit()
    except BaseException:
        folder.abort()
        raise


def total_bytes(entries: Sequence[Entry]) -> int:
    """Bytes of data of several entries."""
    return sum(each.nbytes for each in entries)
