"""Parameters of a command, made from the fields of options, and examples of its use."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from inspect import Parameter
from typing import Annotated, Any, TypeVar

import typer

from llm_surgeon.config.fields import Option, described, options_of

_Command = TypeVar("_Command", bound=Callable[..., None])


def with_options(config: type) -> Callable[[_Command], _Command]:
    """Decorator: ``**options`` of a command become a parameter for every option of ``config``, ``None`` if left out.

    Old names are hidden ones. Sections of the help are in the order of the fields; in each the command's own parameters
    come first, but in the first section, that of arguments and what has none.
    """

    def decorate(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        made = [_parameter(each, name) for each in options_of(config) for name in (each.name, *each.aliases)]
        own = [each for each in signature.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
        panels: list[str | None] = [None, *(each.panel for each in options_of(config) if each.panel is not None)]
        first = [each for each in made if _panel(each) is None]
        rest = [each for each in made if _panel(each) is not None]
        ordered = sorted([*first, *own, *rest], key=lambda each: panels.index(_panel(each)))
        parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in ordered]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def file_options(command: Callable[..., None], besides: Iterable[str]) -> dict[str, bool]:
    """Options of a command that a file may hold, all ``besides``, and whether each wants text."""
    parameters = inspect.signature(command).parameters
    return {name: str in _types(each.annotation) for name, each in parameters.items() if name not in set(besides)}


def completion(choices: Callable[[], Collection[str]]) -> Callable[[str], Iterator[str]]:
    """Completions of the beginning of a choice."""

    def complete(incomplete: str) -> Iterator[str]:
        return (choice for choice in choices() if choice.startswith(incomplete))

    return complete


def examples(first: str, second: str) -> str:
    """Two examples of a command, below its help."""
    return "\n\n".join(("Examples:", first, second))


def _parameter(each: Option, name: str) -> Parameter:
    switch = each.type is bool and each.default is False
    info = typer.Option(
        *((f"--{name.replace('_', '-')}",) if switch else ()),
        help=described(each),
        rich_help_panel=each.panel,
        hidden=name != each.name,
        autocompletion=None if each.choices is None else completion(each.choices),
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[each.type | None, info])


def _panel(parameter: Parameter) -> Any:
    about = getattr(parameter.annotation, "__metadata__", (None,))[0]
    return getattr(about, "rich_help_panel", None)


def _types(annotation: Any) -> tuple[Any, ...]:
    """The types in ``Annotated[A | B, ...]``."""
    return typing.get_args(typing.get_args(annotation)[0])
