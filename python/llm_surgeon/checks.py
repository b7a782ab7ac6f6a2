"""Checks of options that several parts share: each raises an :class:`InputError` that names the option."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable

from llm_surgeon.errors import InputError

# Of a count that has no limit of its own: what sizes and offsets in 32 bits can hold.
LARGEST_COUNT = 2**31 - 1


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {shown(value)}{meant(value, choices)}: choose one of {', '.join(choices)}")


def require_known(names: Iterable[object], known: Iterable[str]) -> None:
    """Refuse the first of the options ``names`` that is not ``known``."""
    known = sorted(known)
    for name in sorted(map(str, set(names) - set(known))):
        nearest = _nearest(name, known)
        advice = f"choose among {', '.join(known)}" if nearest is None else f"do you mean {nearest!r}?"
        raise InputError(f"unknown option {shown(name)}: {advice}")


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, not {shown(value)}")


def require_positive_int(name: str, value: object, most: int = LARGEST_COUNT) -> None:
    require_int(name, value, 1, most)


def require_int(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, not {shown(value)}")
    if value > most:
        raise InputError(f"{name} must be at most {most}, not {shown(value)}")


def require_number(name: str, value: object, low: float, high: float, *, low_allowed: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low < value < high or (low_allowed and value == low)):  # type: ignore[operator]
        opening, words = ("[", "of at least") if low_allowed else ("(", "greater than")
        bound = f"in {opening}{low:g}, {high:g})" if high != math.inf else f"{words} {low:g}"
        raise InputError(f"{name} must be a number {bound}, not {shown(value)}")
    if isinstance(value, int) and abs(value) > LARGEST_COUNT:  # more than a float can hold, maybe
        raise InputError(f"{name} must be at most {LARGEST_COUNT}, not {shown(value)}")


def parse_bytes(text: str | int) -> int:
    """Bytes of ``"24GB"``, ``"22.5 GiB"`` or a plain number; raises :class:`InputError` for anything else."""
    match = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,19})?)\s*([kMGT]i?)?B?", str(text).strip())
    if match is None:
        raise InputError(f"{text!r} is no amount of memory: write 24GB or 22.5GiB")
    prefix = match[2] or ""
    power = "kMGT".find(prefix[:1]) + 1 if prefix else 0
    return round(float(match[1]) * (1024 if prefix.endswith("i") else 1000) ** power)


def shown(value: object, most: int = 100) -> str:
    """``repr(value)``, of which an error message can hold the beginning."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= most else text[: most - 1] + "…"


def meant(value: object, choices: Iterable[str]) -> str:
    """The question whether the choice nearest to ``value`` was meant, if one is near, in brackets for a sentence."""
    nearest = _nearest(value, choices)
    return "" if nearest is None else f" (do you mean {nearest!r}?)"


def _nearest(value: object, choices: Iterable[str]) -> str | None:
    # Matching costs the product of the lengths.
    text = value if isinstance(value, str) and len(value) <= 100 else ""
    return next(iter(difflib.get_close_matches(text, list(choices), n=1)), None)
