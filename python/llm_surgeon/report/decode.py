"""Plain data as dataclasses again, checked all the way down."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, NoReturn

from llm_surgeon.errors import InputError

# Numbers beyond these are no counts and no losses: nothing that can be drawn or computed with.
_LARGEST_INT, _LARGEST_FLOAT = 2**63, 1e30
_DEEPEST = 20  # lists in lists, in an option


def decode(hint: Any, value: Any, where: str) -> Any:
    """``value`` of JSON as the annotated type ``hint``; :class:`InputError` names the field ``where`` it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        _check_plain(value, where)
        return value
    if origin in (typing.Union, types.UnionType):  # every union here is "T | None"
        return None if value is None else decode(arguments[0], value, where)
    expected = origin or (dict if dataclasses.is_dataclass(hint) else hint)
    if expected is float and isinstance(value, int) and abs(value) < _LARGEST_INT and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise InputError(f"{where} must be of type {expected.__name__}, not {type(value).__name__}")
    if isinstance(value, int) and expected is int and not 0 <= value < _LARGEST_INT:
        raise InputError(f"{where} must lie between 0 and 2^63")
    if isinstance(value, float):
        _check_float(value, where)
    if origin is list:
        return [decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, value, where)
    return value


def _decode_dataclass(cls: Any, data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise InputError(f"{where} has an unknown field {unknown[0]!r}")
    for f in dataclasses.fields(cls):
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if f.name not in data and not optional:
            raise InputError(f"{where} lacks the field {f.name!r}")
    return cls(**{name: decode(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise :class:`InputError` where plain data hold what cannot be shown."""
    if depth > _DEEPEST:
        raise InputError("the report is nested too deeply")
    if isinstance(value, (int, float)):
        _check_float(value, where)
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        _check_plain(part, f"{where}.{key}", depth + 1)


def _check_float(value: float, where: str) -> None:
    if not abs(value) <= _LARGEST_FLOAT:  # infinity, too, which JSON can say as 1e999
        raise InputError(f"{where} must lie within ±{_LARGEST_FLOAT:g}")


def floats(value: object, where: str) -> Iterator[tuple[str, float]]:
    """Every float inside plain data, with the path that leads to it."""
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from floats(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from floats(item, f"{where}[{index}]")


def reject_constant(name: str) -> NoReturn:
    """Refuse NaN and infinity, which JSON does not have."""
    raise InputError(f"the report holds {name}, which is not a number")
