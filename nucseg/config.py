"""Strict configuration: frozen dataclasses built from plain mappings, where a typo is an error and not a default."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting has an unknown name or a value of the wrong type."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Say which valid name was probably meant, or list them all when none is close."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(valid)}"


def check_name(what: str, name: str, valid: Iterable[str]) -> None:
    """Raise a ValueError that names the nearest valid name, unless `name` is one of them."""
    valid = list(valid)
    if name not in valid:
        raise ValueError(f"{what}: unknown name {name!r}; {nearest(str(name), valid)}")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a frozen dataclass from a mapping, recursively.

    Parameters
    ----------
    cls
        The dataclass to build. Fields that the mapping leaves out keep their defaults.
    values
        Names and plain values, as YAML gives them.
    where
        How to call this place in an error message, for example ``"profile sample: csingan"``.

    Raises
    ------
    ConfigError
        For an unknown name (with the nearest valid one), a missing one without default, or an ill-typed value.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected settings by name, got {type(values).__name__} {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where}: unknown setting {name!r}; {nearest(str(name), fields)}")
    built = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in built and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing setting(s) {', '.join(missing)}")
    try:
        return cls(**built)
    except ConfigError:
        raise
    except ValueError as error:  # a range check in __post_init__
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return None if option is type(None) and value is None else _convert(option, value, where)
            except ConfigError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
    elif origin is tuple and isinstance(value, list | tuple):
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        if inner is None and len(args) != len(value):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}")
        kinds = [inner] * len(value) if inner is not None else args
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is dict and isinstance(value, Mapping):
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    hint_for_yaml = " (YAML reads it as text: write 0.001 or 1.0e-3)" if hint is float and _is_number(value) else ""
    raise ConfigError(f"{where}: expected {_name(hint)}, got {type(value).__name__} {value!r}{hint_for_yaml}")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def to_plain(value: Any) -> Any:
    """Turn nested dataclasses, tuples and mappings into what JSON and YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value
