"""Schedules as JSON files, for people to read and to edit.

An action is a letter (F forward, B backward, I backward of the input, W of the weights), the
microbatch, `.chunk` where a rank has several, and `:` with letters for what it does beside: r
receives, s sends, k keeps activations. The list of a rank is one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eellm.errors import Shown, check_integer, invalid
from eellm.pipeline.schedule import ACTION, Actions, Schedule

FORMAT_VERSION = 1
_LETTERS = "FBIW"
_FLAGS = "rsk"
_LEGEND = (
    "F forward, B backward, I backward of the input, W of the weights; microbatch; .chunk of the "
    "rank; r receives, s sends, k keeps activations"
)
_ACTION = re.compile(r"([FBIW])([0-9]{1,9})(?:\.([0-9]{1,4}))?(?::(r?s?k?))?")
_KEYS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "name": (str,),
    "ranks": (int,),
    "chunks": (int,),
    "microbatches": (int,),
    "fill": (list,),
    "ratio": (int, float),
    "exits": (list,),
    "actions": (str,),
    "lists": (list,),
}


def as_text(actions: Actions, chunks: int) -> str:
    """A list of actions as text."""
    flags = ["".join(c for i, c in enumerate(_FLAGS) if value >> i & 1) for value in range(8)]
    flags = [f":{each}" if each else "" for each in flags]
    return " ".join(
        f"{_LETTERS[kind]}{microbatch}{f'.{chunk}' if chunks > 1 else ''}{flags[flag]}"
        for kind, flag, chunk, microbatch in actions.tolist()
    )


def from_text(text: str, rank: int) -> Actions:
    """The list of a rank from its text."""
    return np.array([_action(each, rank, i) for i, each in enumerate(text.split())], ACTION)


def _action(text: str, rank: int, index: int) -> tuple[int, int, int, int]:
    match = _ACTION.fullmatch(text)
    if match is None:
        raise invalid(
            f"rank {rank}, action {index} is no action",
            f"the like of F0:sk ({_LEGEND})",
            text,
            "correct the file",
        )
    letter, microbatch, chunk, flags = match.groups()
    value = sum(1 << _FLAGS.index(each) for each in flags or "")
    return _LETTERS.index(letter), value, int(chunk or 0), int(microbatch)


def _head(schedule: Schedule) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "name": schedule.name,
        "ranks": schedule.ranks,
        "chunks": schedule.chunks,
        "microbatches": schedule.microbatches,
        "fill": list(schedule.fill),
        "ratio": schedule.ratio,
        "exits": list(schedule.exits),
        "actions": _LEGEND,
    }


def as_object(schedule: Schedule) -> dict[str, Any]:
    """A schedule as values for JSON, with its lists."""
    lists = [as_text(each, schedule.chunks) for each in schedule.lists]
    return {**_head(schedule), "lists": lists}


def _lines(schedule: Schedule) -> Iterator[str]:
    yield "{\n"
    for key, value in _head(schedule).items():
        yield f"  {json.dumps(key)}: {json.dumps(value)},\n"
    yield '  "lists": [\n'
    for rank in range(schedule.ranks):
        end = "\n" if rank == schedule.ranks - 1 else ",\n"
        yield f"    {json.dumps(as_text(schedule.actions(rank), schedule.chunks))}{end}"
    yield "  ]\n}\n"


def save(schedule: Schedule, path: Path) -> None:
    """Writes a schedule; a file that cannot be written whole leaves the old one as it was."""
    from eellm.files.disk import Folder

    folder = Folder(path.parent, staged=True)
    try:
        with folder.create(path.name) as writer:
            for line in _lines(schedule):
                writer.write(line.encode())
        folder.commit()
    except BaseException:
        folder.abort()
        raise


def load(path: Path) -> Schedule:
    """Reads and validates a schedule."""
    return parse(path.read_bytes(), str(path))


def parse(data: bytes, where: str) -> Schedule:
    """The valid schedule in the bytes of a file."""
    values = decode(data, where, "schedule", "eellm schedule --save")
    try:
        return from_object(values).validate()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def decode(data: bytes, where: str, what: str, command: str) -> Any:
    """The JSON in the bytes of a file."""
    try:
        return json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise invalid(
            f"{where} is no {what}", "JSON", Shown(error), f"write one with {command}"
        ) from None


def check_keys(
    values: Any, keys: Mapping[str, tuple[type, ...]], advice: str, optional: Sequence[str] = ()
) -> None:
    """Raises ValueError unless values is an object with these keys of these types."""
    if not isinstance(values, dict):
        raise invalid("this is no such file", "an object", Shown(type(values).__name__), advice)
    for key in values:
        if key not in keys:
            raise invalid("unknown key", f"one of {', '.join(keys)}", key)
    names = {int: "an integer", str: "a text", list: "a list", dict: "an object"}
    for key, kind in keys.items():
        if key in optional and key not in values:
            continue
        value = values.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = names.get(kind[0], "") if len(kind) == 1 else "a number"
            raise invalid(f"{key} is invalid", wanted, value, advice)


def from_object(values: Any) -> Schedule:
    """A schedule from the values of a file; it is not yet validated."""
    check_keys(values, _KEYS, "write one with eellm schedule --save", ["actions"])
    check_integer("format_version", values["format_version"], 1, FORMAT_VERSION, "update eellm")
    lists = []
    for rank, text in enumerate(values["lists"]):
        if not isinstance(text, str):
            raise invalid(f"the list of rank {rank} is invalid", "a text of actions", text)
        lists.append(from_text(text, rank))
    return Schedule(
        values["name"],
        values["ranks"],
        values["microbatches"],
        values["chunks"],
        fill=tuple(values["fill"]),
        ratio=values["ratio"],
        exits=values["exits"],
        lists=lists,
    )
