"""The YAML file of options: one ``option: value`` a line."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from llm_surgeon.checks import require_known, shown
from llm_surgeon.errors import InputError, one_line

_LARGEST_FILE = 2**20
_LONGEST_NUMBER = 4000  # Python reads integers of at most 4300 digits
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("", "~", "null")


def read_options(path: Path, known: Collection[str], text: Collection[str]) -> dict[str, Any]:
    """The options in a YAML file; names may be written with hyphens.

    A value is one plain or quoted scalar, and its option says how it is read: text stays as it is written (``2:4``,
    ``no``, ``2020-01-01``); for others ``true``, ``yes``, ``on`` and their opposites are truth values, and numbers are
    decimal. What is quoted is always text. Nothing, ``~`` or ``null`` is ``None``. Anchors, aliases, tags and nesting,
    which no option needs, are refused.

    Args:
        known: the options that the file may hold; text: those of them that want text.

    Raises:
        InputError: the file cannot be read, or holds anything else; the message names the line.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise InputError(f"config file {str(path)!r} cannot be read: there is no such file")
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise InputError(
                f"config file {str(path)!r} is larger than the {_LARGEST_FILE} bytes that options can take"
            )
        entries = _entries(path, content.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config file {str(path)!r} cannot be read: {one_line(error)}") from error
    options: dict[str, Any] = {}
    for line, key, value in entries:
        name = key.value.replace("-", "_")
        where = f"config file {str(path)!r}, line {line}"
        try:
            require_known([name], known)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if name in options:
            raise InputError(f"{where}: the option {name!r} is given twice")
        options[name] = _value(value, wants_text=name in text)
    return options


def _entries(path: Path, content: str) -> list[tuple[int, yaml.ScalarEvent, yaml.ScalarEvent]]:
    """Line, key and value of every entry of the one mapping in ``content``.

    Parser events are read, of which there are only as many as characters: no structure is built, however deep.
    """

    def refuse(event: yaml.Event, what: str) -> InputError:
        return InputError(f"config file {str(path)!r}, line {_line(event)}: {what}")

    events = (event for event in yaml.parse(content) if not isinstance(event, yaml.StreamStartEvent))
    found: list[yaml.ScalarEvent] = []
    inside = ended = False
    for event in events:
        if isinstance(event, (yaml.DocumentStartEvent, yaml.DocumentEndEvent)):
            ended = ended or isinstance(event, yaml.DocumentEndEvent)
            continue
        if isinstance(event, yaml.StreamEndEvent):
            break
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise refuse(event, "anchors and aliases are not read, write the value out")
        if isinstance(event, yaml.MappingEndEvent):
            inside = False
        elif isinstance(event, yaml.MappingStartEvent) and not inside and not ended and not found:
            inside = True
        elif isinstance(event, yaml.ScalarEvent) and inside:
            if event.tag is not None:
                raise refuse(event, f"the tag {shown(event.tag)} is not read, write the value alone")
            found.append(event)
        elif inside:
            raise refuse(event, "an option is one value, not a list or a mapping")
        else:
            raise InputError(f"config file {str(path)!r} must hold option: value lines")
    if not ended or not found:
        raise InputError(f"config file {str(path)!r} must hold option: value lines")
    return [(_line(key), key, value) for key, value in zip(found[::2], found[1::2], strict=True)]


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1


def _value(event: yaml.ScalarEvent, wants_text: bool) -> Any:
    text: str = event.value
    if not event.implicit[0]:  # quoted
        return text
    if text.lower() in _NULLS:
        return None
    if wants_text or len(text) > _LONGEST_NUMBER:
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.fullmatch(r"[-+]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if match := re.fullmatch(r"([-+]?)\.?(inf|nan)", text.lower()):
        return float(match[1] + match[2])
    return text
