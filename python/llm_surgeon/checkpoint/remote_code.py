"""Code that comes with a checkpoint: none of it runs unless the user says so; our own classes are the package's."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.checkpoint.folder import json_values, read_json
from llm_surgeon.errors import InputError
from llm_surgeon.formats import modeling_pruned

_logger = logging.getLogger(__name__)

_OWN = re.compile(r"modeling_pruned\.(Pruned\w+)")
_AUTO_CLASS = "AutoModelForCausalLM"


def own_class(name: str, folder: Path, config: dict[str, Any]) -> type[PreTrainedModel] | None:
    """The class of :mod:`modeling_pruned` that the model of configuration ``config`` is of; ``None``: of another.

    It is this package's, whatever the file of that name in ``folder`` holds; a file that differs is said.

    Raises:
        InputError: there is no such class, or it is not for this type of model; the entry ``auto_map`` is no object.
    """
    auto_map = config.get("auto_map", {})
    if not isinstance(auto_map, dict):
        raise InputError(f"auto_map in the configuration of model {name!r} is not a JSON object")
    match = _OWN.fullmatch(str(auto_map.get(_AUTO_CLASS)))
    if match is None:
        return None
    cls: Any = getattr(modeling_pruned, match[1], None)
    is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
    if not is_model or cls.config_class is None:
        raise InputError(f"model {name!r} is a {match[1]}, and transformers has no model class of that name")
    if cls.config_class.model_type != config.get("model_type"):
        raise InputError(f"model {name!r} is a {match[1]}, and its configuration is of a {config.get('model_type')!r}")
    shipped = folder / f"{modeling_pruned.__name__.rpartition('.')[2]}.py"
    if shipped.is_file() and shipped.read_bytes() != Path(modeling_pruned.__file__).read_bytes():
        _logger.warning("model %r: %s differs from this package's, which is used", name, shipped.name)
    cls.register_for_auto_class(_AUTO_CLASS)  # a copy of the class travels with what is saved
    return cls


def refuse_code(name: str, folder: Path, config: dict[str, Any]) -> None:
    """Raise :class:`InputError` where loading the model or tokenizer asks for code from ``folder``, or from the hub.

    Where there is a stock class, too, transformers would take that without a word: it may compute something else.
    """
    tokenizer = _tokenizer_config(folder)
    wanted = [reference for reference in _references(config.get("auto_map")) if not _OWN.fullmatch(reference)]
    wanted += _references(tokenizer.get("auto_map"))
    # "attn_implementation": "owner/repository" fetches a kernel from the hub.
    wanted += [
        value
        for _, key, value in json_values(config)
        if "implementation" in key and isinstance(value, str) and "/" in value
    ]
    if wanted:
        raise InputError(
            f"model {name!r} needs code that comes with it ({wanted[0]!r}): read that code, then pass "
            "--trust-remote-code"
        )


def check_tokenizer_class(name: str, folder: Path, config: dict[str, Any]) -> None:
    """Raise :class:`InputError` where the tokenizer's class is one of transformers' that is no tokenizer.

    Any class would be called to load the folder, in its own way and with its own answer to code in it.
    """
    for content in (_tokenizer_config(folder), config):
        tokenizer = content.get("tokenizer_class")
        if tokenizer is None:
            continue
        found = getattr(transformers, tokenizer, None) if isinstance(tokenizer, str) else ()
        is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
        if found is not None and not is_tokenizer and not hasattr(found, "_backends"):  # a class that lacks a library
            raise InputError(f"model {name!r} names {tokenizer!r} as its tokenizer's class, which is none")


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _references(auto_map: Any) -> list[str]:
    """All that an ``auto_map`` of any form names."""
    return [str(value) for _, _, value in json_values(auto_map) if not isinstance(value, dict | list | None)]
