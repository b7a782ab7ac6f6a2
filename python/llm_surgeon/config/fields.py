"""Options written once: a dataclass field carries its help text, the section of it, its check, choices and old names.

Checks, the YAML reader, the parameters of commands and the list in a class's docstring are made from the fields.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llm_surgeon.checks import (
    LARGEST_COUNT,
    require_bool,
    require_choice,
    require_int,
    require_known,
    require_number,
    shown,
)
from llm_surgeon.errors import InputError

_logger = logging.getLogger(__name__)
_Config = TypeVar("_Config")
Check = Callable[[str, Any], object]


@dataclass(frozen=True)
class Option:
    """An option, from the field of a class that is one of :func:`options`.

    Attributes:
        name, default: of the field; ``None``: left out, the class fills it in, or it stays ``None``.
        type: ``str``, ``bool``, ``int`` or ``float``.
        help, panel: text and section of ``--help``; no section: the first.
        check: called with the name and a value, raises an :class:`InputError` that names both.
        choices: the values it can have, of some options only.
        aliases: names that it had before.
    """

    name: str
    default: Any
    type: type
    help: str
    panel: str | None
    check: Check
    choices: Callable[[], Collection[str]] | None
    aliases: tuple[str, ...]


def option(
    default: Any,
    help: str,
    check: Check | None = None,
    *,
    panel: str | None = None,
    choices: Callable[[], Collection[str]] | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """Field of an option, see :class:`Option`.

    Its type gives the check of a ``bool``, a ``str`` or a ``Literal``, whose values are its choices. A field that the
    class fills in where it was left out is annotated without ``None``, which is its default.
    """
    about = {"help": help, "check": check, "panel": panel, "choices": choices, "aliases": aliases}
    return field(default=default, metadata=about)


def count(least: int = 1, most: int = LARGEST_COUNT) -> Check:
    """Check of a whole number in ``[least, most]``."""
    return functools.partial(require_int, least=least, most=most)


def number(low: float = 0.0, high: float = math.inf, *, low_allowed: bool = False) -> Check:
    """Check of a number in ``(low, high)``, or in ``[low, high)``."""
    return functools.partial(require_number, low=low, high=high, low_allowed=low_allowed)


def options(cls: type[_Config]) -> type[_Config]:
    """Decorator of a dataclass whose fields are options.

    It takes old names of options, too, and an :class:`InputError` names one that it does not have. Its docstring lists
    the fields.
    """
    build = cls.__init__

    @functools.wraps(build)
    def __init__(self: Any, *values: Any, **given: Any) -> None:
        build(self, *values, **present_names(cls, given))

    hints = typing.get_type_hints(cls)
    found = [_option(each, hints[each.name]) for each in dataclasses.fields(cls)]  # type: ignore[arg-type]
    cls.__options__ = tuple(found)  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]
    lines = "".join(f"\n    {each.name}: {each.help}" for each in found)
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nAttributes:{lines}\n"
    return cls


def options_of(cls: type) -> tuple[Option, ...]:
    """The options that are the fields of ``cls``, one of :func:`options`."""
    found: tuple[Option, ...] = vars(cls)["__options__"]
    return found


def _option(each: dataclasses.Field[Any], hint: Any) -> Option:
    about = dict(each.metadata)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    hint = next(kind for kind in typing.get_args(hint) if kind is not type(None)) if union else hint
    if typing.get_origin(hint) is typing.Literal:
        names, hint = typing.get_args(hint), str
        about["choices"] = lambda: names
    if about["check"] is None:
        about["check"] = require_bool if hint is bool else _check_text
        if choices := about["choices"]:
            about["check"] = lambda name, value: require_choice(name, value, choices())
    return Option(each.name, each.default, hint, **about)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, not {shown(value)}")


def check_options(config: object) -> None:
    """Check every option of ``config``, one that is left out excepted.

    Raises:
        InputError: a value is none that its option can have.
    """
    for each in options_of(type(config)):
        value = getattr(config, each.name)
        if value is not None or each.default is not None:
            each.check(each.name, value)


def present_names(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options ``given`` by the names that they have now; a line says so of an old one.

    Raises:
        InputError: ``cls`` has no such option, or one is given by two names.
    """
    new = {alias: each.name for each in options_of(cls) for alias in each.aliases}
    require_known([name for name in given if name not in new], [each.name for each in options_of(cls)])
    for name in given:
        if name in new and new[name] in given:
            raise InputError(f"{name} is the old name of {new[name]}: give one of them")
        if name in new:
            _logger.warning("the option %r is called %r now: its old name will go", name, new[name])
    return {new.get(name, name): value for name, value in given.items()}


def described(each: Option) -> str:
    """Help text of an option: what it is, its choices and its default."""
    choices = "" if each.choices is None else f": {' | '.join(each.choices())}"
    plain = each.default is None or each.default is False or each.default == ""
    return f"{each.help}{choices}" + ("" if plain else f" (default: {each.default})")
