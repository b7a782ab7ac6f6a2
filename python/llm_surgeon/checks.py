"""Checks of options that several parts share: each raises an :class:`InputError` that names the option."""

from __future__ import annotations

import math

from llm_surgeon.errors import InputError


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, not {value!r}")


def require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")


def require_number(name: str, value: object, low: float, high: float, *, low_allowed: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low < value < high or (low_allowed and value == low)):  # type: ignore[operator]
        opening, words = ("[", "of at least") if low_allowed else ("(", "greater than")
        bound = f"in {opening}{low:g}, {high:g})" if high != math.inf else f"{words} {low:g}"
        raise InputError(f"{name} must be a number {bound}, not {value!r}")
