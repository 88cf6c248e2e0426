"""Where a model is: a folder, or a name on the Hugging Face hub; and which files it may use."""

import json
import os
import re
from pathlib import Path
from typing import Any

from eellm.errors import Shown, invalid
from eellm.files.safetensors import is_pickle, pickle_error

MAX_JSON = 64 << 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def find_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model; a name that is no folder is fetched from the Hugging Face hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        with open(path, "rb") as file:
            if is_pickle(file.read(9)):
                raise pickle_error(str(path))
        raise invalid(
            f"{path} is a file",
            "a folder with config.json and model.safetensors",
            Shown("a file"),
            "name its folder, or convert it with eellm convert",
        )
    text = os.fspath(name)
    if not _HUB_NAME.fullmatch(text):
        raise FileNotFoundError(f"there is no folder {text}; give the path of a model directory")
    return _fetch(text, revision)


def _fetch(name: str, revision: str | None) -> Path:
    advice = "give the path of a model directory, or a name that the Hugging Face hub knows"
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {name}, and without the package huggingface_hub it cannot be "
            f"fetched from the hub; {advice} after installing that package"
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(_FETCHED)
            )
        )
    except Exception as error:  # the hub client raises errors of several libraries
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"there is no folder {name}, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}); {advice}, "
            "and check the network connection"
        ) from error


def inside(folder: Path, name: object) -> Path:
    """The path of a file that a folder's own files name; refuses ways out of the folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise invalid(f"{folder} names a file that may lie elsewhere", "a plain file name", name)
    path = folder / name
    if path.is_symlink():
        root, target = folder.resolve(), path.resolve()
        allowed = [root]
        if root.parent.name == "snapshots":  # the hub's cache keeps contents beside snapshots
            allowed.append(root.parent.parent / "blobs")
        if not any(each in target.parents for each in allowed):
            raise invalid(
                f"{path} is a link out of its folder", "a file in the folder", str(target)
            )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    size = path.stat().st_size
    if size > MAX_JSON:
        raise invalid(f"{path} is too large", f"at most {MAX_JSON} bytes", size)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise invalid(f"{path} is broken", "JSON", Shown(str(error)[:200])) from None
    if not isinstance(value, dict):
        raise invalid(f"{path} is invalid", "a JSON object", type(value).__name__)
    return value
