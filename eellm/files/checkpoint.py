"""Checkpoints of a training run: whole or absent, whatever happens while one is written.

A checkpoint is a folder `step-XXXXXXXX`: a model directory with optimizer.safetensors (the moments
by parameter name), state.json and manifest.json (size and SHA-256 of every other file). It is
written under another name, brought to the disk, read back, and then renamed; older ones go last.
Ranks that share a model write one checkpoint together, each its own parameters in files of its own;
it is loaded into any other layout.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eellm.config import ModelConfig
from eellm.errors import Shown, invalid
from eellm.files import directory
from eellm.files.directory import Parameters
from eellm.files.disk import FileRecord, Folder, rename, sha256_of, sync_folder
from eellm.files.locate import inside, read_json
from eellm.files.peers import Peers
from eellm.files.safetensors import Entry

if TYPE_CHECKING:
    from eellm._core import ParameterRow

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,18})(\.old)?")

log = logging.getLogger("eellm")


class Moments(Protocol):
    """What keeps the moments of AdamW: a native trainer."""

    steps: int

    def moment1(self, name: str) -> Any:
        """First moment of a parameter."""

    def moment2(self, name: str) -> Any:
        """Second moment of a parameter."""


def write_checkpoint(
    root: str | os.PathLike[str],
    step: int,
    write: Callable[[Folder], None],
    keep: int = 0,
    peers: Peers | None = None,
) -> Path:
    """Writes a checkpoint through `write` and removes all but the newest `keep` (0: none).

    With peers every rank calls it, and `write` writes the rank's part.
    """
    peers = peers or Peers()
    if not isinstance(step, int) or not 0 <= step < 10**18:
        raise invalid("step is invalid", "an integer from 0", step)
    if not isinstance(keep, int) or keep < 0:
        raise invalid("keep is invalid", "a number of checkpoints, or 0 for all", keep)
    parent = Folder(root).path
    target = parent / f"step-{step:08d}"
    temporary = parent / f".new-{target.name}"
    peers.on_first(lambda: _clean(parent))
    folder = peers.together(lambda: Folder(temporary, hashed=True))
    try:
        peers.together(lambda: write(folder))
        parts = peers.gather({name: vars(record) for name, record in folder.files.items()})
        mine = dict(folder.files)
        for part in parts:
            folder.files.update({name: FileRecord(**record) for name, record in part.items()})

        def finish() -> None:
            if peers.first:
                _write_manifest(folder, step)
            folder.commit()

        peers.together(finish)
        peers.together(lambda: _verify(temporary, mine))
        peers.on_first(lambda: _put(temporary, target))
    except BaseException:
        if peers.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    peers.on_first(lambda: _remove_old(parent, target, keep))
    return target


def _write_manifest(folder: Folder, step: int) -> None:
    files = {
        name: {"size": record.size, "sha256": record.sha256}
        for name, record in sorted(folder.files.items())
    }
    values = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    folder.write(MANIFEST, (json.dumps(values, indent=1) + "\n").encode())


def _put(temporary: Path, target: Path) -> None:
    """Gives the new checkpoint its name; one of the same step stays findable until then."""
    old = target.with_name(target.name + ".old")
    if not target.exists():
        rename(temporary, target)
    else:
        if old.exists():  # left by a process that ended between the two renames below
            _remove(old)
        rename(target, old)
        try:
            rename(temporary, target)
        except BaseException:
            os.rename(old, target)
            raise
    sync_folder(target.parent)
    if old.exists():
        _remove(old)


def _clean(root: Path) -> None:
    """Removes what an earlier process left unfinished."""
    for pattern in (".new-step-*", ".gone-step-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Removes a checkpoint; half removed, it no longer looks like one."""
    gone = path.with_name(f".gone-{path.name}")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        rename(path, gone)
        shutil.rmtree(gone)
    except OSError as error:
        log.warning("cannot remove the old checkpoint %s: %s", path, error)


def _remove_old(root: Path, new: Path, keep: int) -> None:
    if not keep:
        return
    kept = 0
    for _, path in sorted(_list(root), reverse=True):
        if path == new or kept < keep:
            kept += _looks_complete(path)
        else:
            _remove(path)


def _list(root: Path) -> list[tuple[tuple[int, bool], Path]]:
    """Checkpoints with the key they are sorted by: step, and whether it is no leftover."""
    result = []
    if root.is_dir():
        for path in root.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                result.append(((int(match[1]), match[2] is None), path))
    return result


def _manifest(path: Path) -> dict[str, FileRecord]:
    """The files that a checkpoint must hold."""
    values = read_json(inside(path, MANIFEST))
    if values.get("format_version") != FORMAT_VERSION:
        raise invalid(
            f"{path / MANIFEST}: format_version is invalid",
            str(FORMAT_VERSION),
            values.get("format_version"),
            "the checkpoint was written by a newer eellm; update it",
        )
    files = values.get("files")
    if not isinstance(files, dict):
        raise invalid(f"{path / MANIFEST}: files is invalid", "a table", files)
    result = {}
    for name, record in files.items():
        if not isinstance(record, dict) or not {"size", "sha256"} <= record.keys():
            raise invalid(f"{path / MANIFEST}: {name!r} is invalid", "size and sha256", record)
        result[name] = FileRecord(record["size"], record["sha256"])
    match = _NAME.fullmatch(path.name.removeprefix(".new-"))
    if match and values.get("step") != int(match[1]):
        raise invalid(f"{path / MANIFEST}: step is invalid", match[1], values.get("step"))
    return result


def _verify(path: Path, names: Iterable[str] | None = None) -> None:
    """Compares files with the manifest, all of them without `names`."""
    manifest = _manifest(path)
    for name in manifest if names is None else names:
        expected = manifest[name]
        got = sha256_of(inside(path, name))
        if got != expected:
            raise invalid(
                f"{path / name} is damaged",
                f"{expected.size} bytes with SHA-256 {expected.sha256}",
                Shown(f"{got.size} bytes with {got.sha256}"),
                "use the checkpoint before it",
            )


def verify(path: str | os.PathLike[str]) -> None:
    """Compares every file of a checkpoint with its manifest; raises what is wrong."""
    _verify(Path(path))


def _looks_complete(path: Path) -> bool:
    with suppress(OSError, ValueError):
        return all(
            inside(path, name).stat().st_size == record.size
            for name, record in _manifest(path).items()
        )
    return False


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that is whole, None without one; says which are damaged."""
    for _, path in sorted(_list(Path(root)), reverse=True):
        try:
            _verify(path)
        except (OSError, ValueError) as error:
            log.warning("the checkpoint %s is passed over: %s", path, error)
            continue
        return path
    return None


def save_training(
    root: str | os.PathLike[str],
    step: int,
    config: ModelConfig,
    model: Parameters,
    moments: Moments,
    state: Mapping[str, Any],
    keep: int = 0,
    tokenizer: Path | None = None,
    peers: Peers | None = None,
) -> Path:
    """A checkpoint of model, moments and state; `state` is what else a run needs, as JSON."""
    peers = peers or Peers()

    def write(folder: Folder) -> None:
        largest = directory.MAX_SHARD_BYTES
        directory.write_model(folder, config, model, peers=peers)
        entries = _moment_entries(model, moments)
        directory.write_tensors(folder, OPTIMIZER, entries, largest, peers, {"format_version": "1"})
        if not peers.first:
            return
        if tokenizer is not None:
            directory.copy_tokenizer(tokenizer, folder)
        values = {
            **state,
            "format_version": FORMAT_VERSION,
            "step": step,
            "adam_steps": moments.steps,
        }
        folder.write(STATE, (json.dumps(values, indent=1) + "\n").encode())

    return write_checkpoint(root, step, write, keep, peers)


def _trained(model: Parameters) -> list["ParameterRow"]:
    return [row for row in model.table if not row["frozen"]]


def _moment_entries(model: Parameters, moments: Moments) -> list[Entry]:
    result = []
    for row in _trained(model):
        name, shape = row["name"], tuple(row["shape"])
        if not row["owned"]:
            continue
        for key, of in (("moment1", moments.moment1), ("moment2", moments.moment2)):
            result.append(Entry(f"{key}.{name}", "F32", shape, partial(_array, of, name)))
    return result


def _array(of: Callable[[str], Any], name: str) -> np.ndarray:
    return np.asarray(of(name))


def read_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint's state.json."""
    values = read_json(inside(Path(path), STATE))
    if values.get("format_version") != FORMAT_VERSION:
        raise invalid(
            f"{Path(path) / STATE}: format_version is invalid",
            str(FORMAT_VERSION),
            values.get("format_version"),
            "the checkpoint was written by a newer eellm; update it",
        )
    for key in ("step", "adam_steps"):
        if type(values.get(key)) is not int or values[key] < 0:
            raise invalid(f"{Path(path) / STATE}: {key} is invalid", "a count", values.get(key))
    return values


def load_training(
    path: str | os.PathLike[str], config: ModelConfig, model: Parameters, moments: Moments
) -> dict[str, Any]:
    """Fills a model and its moments from a checkpoint and returns its state."""
    folder = Path(path)
    state = read_state(folder)
    directory.load_parameters(model, config, directory.Weights(folder))
    tensors = directory.open_tensors(folder, OPTIMIZER)
    if tensors is None:
        raise FileNotFoundError(f"{folder} has no {OPTIMIZER}; give a checkpoint of a training run")
    trained = _trained(model)
    expected = {f"{key}.{row['name']}" for key in ("moment1", "moment2") for row in trained}
    if expected != set(tensors):
        difference = sorted(expected ^ set(tensors))
        raise invalid(
            f"{folder / OPTIMIZER} does not fit the model",
            f"{len(expected)} moments",
            Shown(f"{len(tensors)}, differing in {', '.join(difference[:3])}"),
            "resume with the config that the checkpoint was written with",
        )
    for row in trained:
        if not row["held"]:
            continue
        name, shape = row["name"], tuple(row["shape"])
        for key, of in (("moment1", moments.moment1), ("moment2", moments.moment2)):
            file = tensors[f"{key}.{name}"]
            info = file.tensors[f"{key}.{name}"]
            if info.shape != shape or info.dtype != "F32":
                raise invalid(
                    f"{file.path}: '{key}.{name}' is wrong",
                    f"F32 {list(shape)}",
                    Shown(f"{info.dtype} {list(info.shape)}"),
                )
            np.asarray(of(name))[...] = file[f"{key}.{name}"]
    moments.steps = state["adam_steps"]
    return state
