"""Settings from TOML files and the command line, for frozen dataclasses.

A schema maps a section's name to a dataclass; the dataclass's field types say how values are read.
Sections are plain nested mappings until `build` makes the dataclass, whose own checks then run. A
class may say itself which keys it takes (`setting_types`), how it is made of them (`from_settings`)
and how it is written (`to_settings`).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from eellm.errors import Shown, invalid

Schema = Mapping[str, type]
T = TypeVar("T")

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def load_toml(path: str | Path) -> dict[str, Any]:
    """The mapping of a TOML file."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        got = Shown(f"byte {error.object[error.start]:#04x} at {error.start}")
        raise invalid(f"{path} is no text", "UTF-8", got, "save it as UTF-8") from None
    except FileNotFoundError:
        what = f"there is no settings file {path} (expected a TOML file, got nothing)"
        raise FileNotFoundError(f"{what}; eellm train --help shows one") from None
    except IsADirectoryError:
        raise invalid(f"{path} is a folder", "a TOML file", Shown("a folder")) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise invalid(f"{path} is no TOML", "key = value lines", Shown(str(error))) from None


def field_types(cls: type) -> dict[str, Any]:
    """The resolved types of a dataclass's settable fields, InitVars included."""
    if hasattr(cls, "setting_types"):
        return dict(cls.setting_types())
    hints = typing.get_type_hints(cls)
    names = list(inspect.signature(cls).parameters)
    kinds = {name: hints[name] for name in names if name in hints}
    return {
        name: kind.type if isinstance(kind, dataclasses.InitVar) else kind
        for name, kind in kinds.items()
    }


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error of an unknown name, with the nearest known one."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    advice = f"did you mean {near[0]}?" if near else "remove it"
    expected = "one of " + ", ".join(names)
    return ValueError(f"unknown {what} {name} (expected {expected}, got {name!r}); {advice}")


def check_names(values: Mapping[str, Any], cls: type, where: str) -> None:
    """Refuses keys that are no fields of the class."""
    names = field_types(cls)
    for name in values:
        if name not in names:
            raise unknown("key", f"{where}.{name}" if where else name, _dotted(names, where))


def _dotted(names: Iterable[str], where: str) -> list[str]:
    return [f"{where}.{name}" if where else name for name in names]


# -- Values ------------------------------------------------------------------------------------


def coerce(value: Any, kind: Any, name: str) -> Any:
    """The value as the type wants it: an int where a float is wanted, a tuple for a list.

    Raises ValueError, naming the key, where it does not fit.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, arguments, name)
    if origin is Literal:
        return _coerce_literal(value, arguments, name)
    if origin in (tuple, Sequence, list) or kind in (tuple, list):
        return _coerce_sequence(value, arguments, name)
    if _is_settings(kind):
        return value if isinstance(value, kind) else build(kind, value, name)
    if origin in (dict, Mapping) or kind in (dict, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
        raise invalid(f"{name} has the wrong type", "a table", value)
    return _coerce_plain(value, kind, name)


def _coerce_plain(value: Any, kind: Any, name: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str | Path):
        return str(value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is type(None) and value is None:
        return None
    raise invalid(f"{name} has the wrong type", describe(kind), value)


def _coerce_literal(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1, 0.5)
    expected = "one of " + ", ".join(map(str, choices))
    raise invalid(name, expected, value, f"did you mean {near[0]}?" if near else "choose one")


def _coerce_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    real = [kind for kind in kinds if kind is not type(None)]
    if len(real) == 1:
        return coerce(value, real[0], name)
    if any(isinstance(kind, type) and type(value) is kind for kind in real):
        return value
    for kind in real:
        try:
            return coerce(value, kind, name)
        except ValueError:
            continue
    raise invalid(f"{name} has the wrong type", " or ".join(map(describe, real)), value)


def _coerce_sequence(value: Any, arguments: tuple[Any, ...], name: str) -> Any:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise invalid(f"{name} has the wrong type", "a list", value)
    items = list(value)
    if not arguments:
        return tuple(items)
    if len(arguments) == 1 or arguments[-1] is Ellipsis:
        return tuple(coerce(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(items))
    if len(items) != len(arguments):
        raise invalid(name, f"{len(arguments)} values", value)
    pairs = zip(items, arguments, strict=True)
    return tuple(coerce(item, kind, f"{name}[{i}]") for i, (item, kind) in enumerate(pairs))


def describe(kind: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    words |= {Path: "a path", type(None): "nothing"}
    if kind in words:
        return words[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(part) for part in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (tuple, list, Sequence) or kind in (tuple, list):
        return "a list"
    return "a table"


# -- Building ----------------------------------------------------------------------------------


def build(cls: type[T], values: Any, where: str) -> T:
    """The dataclass made of a mapping; errors name the key by its full path."""
    if not isinstance(values, Mapping):
        raise invalid(f"{where} has the wrong type", "a table", values)
    check_names(values, cls, where)
    kinds = field_types(cls)
    arguments = {}
    for name, value in values.items():
        arguments[name] = coerce(value, kinds[name], f"{where}.{name}" if where else name)
    make: Any = getattr(cls, "from_settings", cls)
    for name, parameter in inspect.signature(make).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
        if required and name not in arguments:
            key = f"{where}.{name}" if where else name
            raise ValueError(f"{key} is missing (expected a value, got none); set {key}")
    try:
        made: T = make(**arguments)
        return made
    except ValueError as error:
        text = str(error)
        if not where or text.startswith(f"{where}.") or text.startswith(f"[{where}]"):
            raise
        raise ValueError(f"[{where}] {text}") from error


def build_sections(schema: Schema, values: Mapping[str, Any]) -> dict[str, Any]:
    """The dataclass of every section; sections that are left out have their defaults."""
    for section in values:
        if section not in schema:
            raise unknown("section", section, schema)
    return {name: build(cls, values.get(name, {}), name) for name, cls in schema.items()}


def check_values(config: Any) -> None:
    """For `__post_init__` of frozen dataclasses: gives every field the type it declares."""
    for name, kind in field_types(type(config)).items():
        object.__setattr__(config, name, coerce(getattr(config, name), kind, name))


# -- --set key=value ---------------------------------------------------------------------------


def apply_overrides(schema: Schema, values: Mapping[str, Any], items: Iterable[str]) -> Any:
    """A copy of the sections with `section.key=value` items set, in order."""
    result = _copy(values)
    for item in items:
        path, separator, text = item.partition("=")
        keys = path.strip().split(".")
        if not separator or len(keys) < 2 or not all(keys):
            raise invalid("--set", "section.key=value", item, "e.g. --set train.steps=100")
        if keys[0] not in schema:
            raise unknown("section", keys[0], schema)
        _set(result, keys, text.strip(), schema)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


def _set(values: dict[str, Any], keys: list[str], text: str, schema: Schema) -> None:
    target: Any = values.setdefault(keys[0], {})
    kind: Any = schema[keys[0]]
    for depth, key in enumerate(keys[1:], 1):
        where = ".".join(keys[:depth])
        last = depth == len(keys) - 1
        inner, index = _child(kind, key, where)
        if index is not None:
            if not isinstance(target, list) or not 0 <= index < len(target):
                count = len(target) if isinstance(target, list) else 0
                expected = f"an index below {count}" if count else "a list that has entries"
                raise invalid(f"--set {where}.{key}", expected, index, f"set {where} as a whole")
            if last:
                target[index] = parse(text, inner, f"{where}.{key}")
            else:
                target = target[index]
        elif last:
            target[key] = parse(text, inner, f"{where}.{key}")
        else:
            if not isinstance(target.get(key), dict | list):
                target[key] = [] if _is_sequence(inner) else {}
            target = target[key]
        kind = inner


def _child(kind: Any, key: str, where: str) -> tuple[Any, int | None]:
    """The type of a key or index below a type, and the index."""
    kind = _without_none(kind)
    if _is_sequence(kind):
        if not key.isdigit():
            raise invalid(f"--set {where}.{key}", "an index from 0", key, f"e.g. {where}.0")
        arguments = typing.get_args(kind)
        return (arguments[0] if arguments else Any), int(key)
    if _is_settings(kind):
        names = field_types(kind)
        if key not in names:
            raise unknown("key", f"{where}.{key}", _dotted(names, where))
        return names[key], None
    if kind in (dict, Mapping, Any) or typing.get_origin(kind) in (dict, Mapping):
        return Any, None
    raise invalid(f"--set {where}.{key}", f"{where} without anything below it", key)


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (Union, types.UnionType):
        real = [part for part in typing.get_args(kind) if part is not type(None)]
        if len(real) == 1:
            return real[0]
        for part in real:
            if _is_sequence(part) or _is_settings(part):
                return part
    return kind


def _is_settings(kind: Any) -> bool:
    return isinstance(kind, type) and (
        dataclasses.is_dataclass(kind) or hasattr(kind, "setting_types")
    )


def _is_sequence(kind: Any) -> bool:
    kind = _without_none(kind)
    return kind in (list, tuple) or typing.get_origin(kind) in (list, tuple, Sequence)


def parse(text: str, kind: Any, name: str) -> Any:
    """A value from the command line, read as the type wants it.

    Texts may stand without quotes, lists without brackets; everything else is written as in TOML.
    """
    inner = _without_none(kind)
    if text in ("none", "null") and inner is not kind:
        return None
    if inner is str and not text.startswith(('"', "'")):
        return text
    if _is_sequence(inner) and not text.startswith("["):
        arguments = typing.get_args(inner)
        element = arguments[0] if arguments else Any
        parts = [part.strip() for part in text.split(",")] if text else []
        return [parse(part, element, f"{name}[{i}]") for i, part in enumerate(parts)]
    value = _toml_value(text)
    if value is _NOTHING:
        value = text
    return coerce(value, inner, name) if _is_plain(inner) else value


_NOTHING = object()


def _is_plain(kind: Any) -> bool:
    return kind in (int, float, bool, str, Path) or typing.get_origin(kind) is Literal


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}\n")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        pass
    try:
        return float(text)
    except ValueError:
        return _NOTHING


# -- Writing -----------------------------------------------------------------------------------


def as_values(config: Any) -> Any:
    """A dataclass as plain nested values, fields in their order, None left out."""
    if hasattr(config, "to_settings"):
        return as_values(config.to_settings())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        pairs = ((field.name, getattr(config, field.name)) for field in _init_fields(config))
        return {name: as_values(value) for name, value in pairs if value is not None}
    if isinstance(config, Mapping):
        return {str(key): as_values(item) for key, item in config.items() if item is not None}
    if isinstance(config, list | tuple):
        return [as_values(item) for item in config]
    if isinstance(config, Path):
        return str(config)
    return config


def _init_fields(config: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(config) if field.init]


def dump_toml(values: Mapping[str, Any]) -> str:
    """TOML text of nested mappings; lists of mappings become arrays of tables."""
    lines: list[str] = []
    _dump_table(values, "", lines)
    return "\n".join(lines).strip() + "\n"


def _dump_table(values: Mapping[str, Any], path: str, lines: list[str]) -> None:
    tables = {key: value for key, value in values.items() if _is_table(value)}
    for key, value in values.items():
        if key not in tables:
            lines.append(f"{_key(key)} = {_value(value)}")
    for key, value in tables.items():
        name = f"{path}.{_key(key)}" if path else _key(key)
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]"]
            _dump_table(value, name, lines)
        else:
            for item in value:
                lines += ["", f"[[{name}]]"]
                _dump_table(item, name, lines)


def _is_table(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(item, Mapping) for item in value)
    )


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _quote(key)


def _quote(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    parts = []
    for character in text:
        if character in escapes:
            parts.append(escapes[character])
        elif ord(character) < 32 or ord(character) == 127:
            parts.append(f"\\u{ord(character):04x}")
        else:
            parts.append(character)
    return '"' + "".join(parts) + '"'


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value) or math.isinf(value):
            return str(value)
        text = repr(value)
        return text if any(mark in text for mark in ".en") else text + ".0"
    if isinstance(value, str | Path):
        return _quote(str(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + "}"
    raise TypeError(f"no TOML form of {type(value).__name__}")
