"""Functions and classes that records name as text, so that records are light."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from llm_surgeon.errors import InputError, one_line


def resolve(value: str | Callable[..., Any], of: str) -> Callable[..., Any]:
    """``value`` itself, or what it names as ``"module:attribute"``, imported.

    Raises:
        InputError: it cannot be imported or called; the message says whose it is, ``of``.
    """
    if not isinstance(value, str):
        return value
    try:
        found = pkgutil.resolve_name(value)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{value!r} of {of} cannot be imported: {one_line(error)}") from error
    if not callable(found):
        raise InputError(f"{value!r} of {of} is neither function nor class: it is written module:attribute")
    return found
