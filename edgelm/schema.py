"""Frozen dataclasses from plain data (TOML, JSON), strictly.

A key that the dataclass does not have, a key that is missing, or a value of another type is an error that names
the place. Recipes, targets and manifests are read through this one door; a model's own files are read as they are.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgelm.errors import ModelError

T = TypeVar("T")
Fail = Callable[[str], Exception]


def build(cls: type[T], data: Any, where: str, fail: Fail, *, extra: bool = False) -> T:
    """Make a dataclass from a mapping.

    Args:
        cls: A dataclass. Its fields may be str, int, float, bool, Literal, Optional,
            dataclasses, tuples or mappings of these.
        data: What a parser gave.
        where: How to name the place in an error, for example ``"recipe.toml, step 2"``.
        fail: Makes the exception to raise from a sentence.
        extra: Ignore unknown keys instead of refusing them.

    Returns:
        The dataclass; its own ``__post_init__`` has validated the values.
    """
    if not isinstance(data, Mapping):
        raise fail(f"{where} must be a table. Got {data!r} instead.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [key for key in data if key not in fields]
    if unknown and not extra:
        known = ", ".join(sorted(fields))
        raise fail(f"{where} has the unknown key '{unknown[0]}'. Known keys: {known}.")
    missing = [
        name
        for name, field in fields.items()
        if name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise fail(f"{where} lacks the key '{missing[0]}'.")
    values = {
        name: _convert(hints[name], data[name], f"{where}: '{name}'", fail, extra)
        for name in fields
        if name in data
    }
    return cls(**values)


def plain(value: Any) -> Any:
    """The reverse of `build`: dataclasses and tuples to dicts and lists, None left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: plain(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _convert(hint: Any, value: Any, where: str, fail: Fail, extra: bool) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in args if option is not type(None)]
        if value is None:
            return None
        for option in options[:-1]:
            if _matches(option, value):
                return _convert(option, value, where, fail, extra)
        return _convert(options[-1], value, where, fail, extra)
    if origin is typing.Literal:
        if value not in args:
            choices = ", ".join(map(str, args))
            raise fail(f"{where} must be one of {choices}. Got {value!r} instead.")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise fail(f"{where} must be a list. Got {value!r} instead.")
        return tuple(
            _convert(args[0], item, f"{where}[{i}]", fail, extra)
            for i, item in enumerate(value)
        )
    if origin in (dict, Mapping) or (
        isinstance(origin, type) and issubclass(origin, Mapping)
    ):
        if not isinstance(value, Mapping):
            raise fail(f"{where} must be a table. Got {value!r} instead.")
        return {
            str(key): _convert(args[1], item, f"{where}['{key}']", fail, extra)
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, fail, extra=extra)
    if hint is Any:
        return value
    if not _matches(hint, value):
        raise fail(f"{where} must be of type {hint.__name__}. Got {value!r} instead.")
    return float(value) if hint is float else value


def _matches(hint: Any, value: Any) -> bool:
    """Whether a plain value is of a plain type; a bool is no number, a whole number is a float."""
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(hint, type) and isinstance(value, hint)


def read_json(path: Path) -> Any:
    """A JSON file's content; an empty dict where there is none.

    Raises:
        ModelError: It is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}).") from error
