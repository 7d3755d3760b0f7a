"""Frozen dataclasses that check themselves, and how they are built from plain mappings."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import sys
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar


class ConfigError(ValueError):
    """A configuration is malformed; the message names the file or setting and what is accepted."""


class SettingError(ConfigError):
    """One setting is wrong.

    Attributes:
      name: the setting's dotted name, relative to the object that was built.
      problem: what follows the name in the message.
    """

    def __init__(self, name: str, problem: str):
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


def wrong(name: str, value: Any, accepted: str) -> SettingError:
    """The error of a value that is not `accepted`."""
    return SettingError(name, f"= {reprlib.repr(value)}: {accepted}")


class Settings:
    """Base of the configuration dataclasses: their fields have the annotated types, however they are made."""

    def __post_init__(self) -> None:
        for name, annotation in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _coerce(name, getattr(self, name), annotation))

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                raise wrong(name, getattr(self, name), "must be positive")

    def _require_multiple(self, name: str, other: str, factor: int = 1) -> None:
        if getattr(self, name) % (factor * getattr(self, other)):
            divisor = f"{other} {getattr(self, other)}" if factor == 1 else f"{factor} x {other} {getattr(self, other)}"
            raise wrong(name, getattr(self, name), f"must be a multiple of {divisor}")


S = TypeVar("S", bound=Settings)


def build(cls: type[S], values: Mapping[str, Any]) -> S:
    """Builds `cls` from nested plain values.

    Raises:
      SettingError: a setting is unknown (the message names the nearest valid one), missing, or has a bad value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid settings: {', '.join(fields)}"
            raise SettingError(key, f"is an unknown setting; {hint}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise SettingError(name, "is missing")
    return cls(**values)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` with the values of `changes` in place of its own, table by table."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def _coerce(name: str, value: Any, annotation: Any) -> Any:
    """Returns `value` as `annotation`: a dataclass, a tuple of one type, a literal, str, bool, int or float."""
    if dataclasses.is_dataclass(annotation):
        return _coerce_table(name, value, annotation)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        if value not in arguments:
            raise wrong(name, value, f"expected one of {', '.join(map(repr, arguments))}")
        return value
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong(name, value, "expected a list")
        return tuple(_coerce(f"{name}[{i}]", item, arguments[0]) for i, item in enumerate(value))
    fits = isinstance(value, str if annotation is str else (int, annotation))
    if isinstance(value, bool) != (annotation is bool) or not fits:
        raise wrong(name, value, f"expected {annotation.__name__}")
    if annotation in (str, bool):
        return value
    if annotation is int:
        if abs(value) >= 2**31:
            raise wrong(name, value, "expected an integer of 32 bits")
        return value
    if not abs(value) <= sys.float_info.max:  # NaN too
        raise wrong(name, value, "expected a finite number")
    return float(value)


def _coerce_table(name: str, value: Any, cls: type[S]) -> S:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise wrong(name, value, "expected a table of settings")
    try:
        return build(cls, value)
    except SettingError as error:
        raise SettingError(f"{name}.{error.name}", error.problem) from None
