"""Folders that a checkpoint may be written to: what is refused, so that nothing that is not ours is deleted."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from llm_surgeon.checks import require_bool
from llm_surgeon.errors import InputError
from llm_surgeon.resources import nearest_existing

# What transformers and this package put into a model folder, LICENSE and .gitattributes of a published one included.
_OWN_FILES = re.compile(
    r"""
    .+\.safetensors(\.index\.json)?
    | (config|generation_config)\.json
    | (tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken|normalizer)\.json
    | (preprocessor|processor|image_processor|video_preprocessor|feature_extractor|audio_tokenizer)(_config)?\.json
    | (vocab|merges|special_tokens)\.txt | .+\.tiktoken
    | (tokenizer|spiece|spm|sentencepiece|sentencepiece\.bpe)\.model(\.v\d+)?
    | chat_template\.jinja
    | (README|USE_POLICY)\.md | (LICENSE|LICENCE|NOTICE)(\.\w+)? | \.gitattributes
    | surgeon_\w+\.json | report\.html | modeling_pruned\.py
    """,
    re.VERBOSE,
)
_OWN_FOLDERS = {"additional_chat_templates": re.compile(r".+\.jinja")}
# One of these says that a folder with a config.json is a model, and not some other project's.
_MARKS = re.compile(r".+\.safetensors|surgeon_report\.json")
_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")

# The longest name beside OUT is ".OUT.previous-xxxxxxxx", the longest inside a sharded weight's.
_LONGEST_NAME_BESIDE, _LONGEST_NAME_INSIDE = len(".") + len(".previous-") + 8, 64


def output_path(out: str | Path) -> Path:
    """The absolute path that ``out`` means: ``~`` expanded, links followed; :class:`InputError` where it means none."""
    text = os.fspath(out)
    try:
        named = Path(os.path.abspath(os.path.expanduser(text)))
        path = Path(os.path.realpath(named))
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"output {text!r} cannot be written: its path is not valid UTF-8") from error
    except (OSError, ValueError) as error:  # no current folder; a null character
        raise InputError(f"output {text!r} cannot be written: {error}") from error
    for candidate in (named, *named.parents):
        if os.path.islink(candidate) and not os.path.exists(candidate):
            raise InputError(f"output {text!r} cannot be written: {str(candidate)!r} is a link that leads nowhere")
    return path


def check_output(out: str | Path, overwrite: bool, **inputs: str | Path | None) -> None:
    """Raise :class:`InputError` where a checkpoint cannot or must not be written to ``out``.

    ``out`` must not be one of the ``inputs``, inside it or around it, nor a file, a mount point or the current folder;
    its name and its parent must allow it to be written; and with ``overwrite`` it may hold another model and nothing
    else: files that neither transformers nor this package writes are never deleted.

    Args:
        inputs: what is read, by what it is (``model``, ``teacher``, ``config_file`` …); no path, no matter.
    """
    require_bool("overwrite", overwrite)
    target = output_path(out)
    check_place(out, target, inputs)
    check_replaceable(out, target, overwrite)


def check_place(out: str | Path, target: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse what :func:`check_output` does whatever ``target`` holds."""
    for kind, given in inputs.items():
        if given is not None:
            _check_apart(out, target, kind.replace("_", " "), os.fspath(given))
    if os.path.exists(target) and not os.path.isdir(target):
        raise InputError(f"output {str(out)!r} is a file: choose a folder")
    if os.path.ismount(target):
        raise InputError(f"output {str(out)!r} is a mount point: choose a folder inside it")
    with contextlib.suppress(FileNotFoundError):  # a current folder that was deleted
        current = Path.cwd()
        if target == current or target in current.parents:
            raise InputError(f"output {str(out)!r} is or holds the current folder: choose another one")
    parent = nearest_existing(target.parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {str(out)!r} cannot be written: {str(parent)!r} is not a writable folder")
    if os.path.isdir(target) and not os.access(target, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"output {str(out)!r} cannot be replaced: it is not a writable folder")
    if not hasattr(os, "pathconf"):
        return
    names = [len(os.fsencode(name)) for name in target.relative_to(parent).parts]
    names[-1] += _LONGEST_NAME_BESIDE
    too_long = max(names) > os.pathconf(parent, "PC_NAME_MAX")
    length = len(os.fsencode(target)) + _LONGEST_NAME_BESIDE + _LONGEST_NAME_INSIDE
    if too_long or length > os.pathconf(parent, "PC_PATH_MAX"):
        raise InputError(f"output {str(out)!r} cannot be written: its name is too long")


def _check_apart(out: str | Path, target: Path, kind: str, given: str) -> None:
    """Raise :class:`InputError` where ``target`` is an input, inside it or around it, a link in its folder followed."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{kind} {given!r} cannot be used: its path is not valid UTF-8") from error
    try:
        path = Path(os.path.expanduser(given))
        if not os.path.exists(path):
            return
        origin = Path(os.path.realpath(path))
        inside = [Path(os.path.realpath(entry)) for entry in (path.iterdir() if path.is_dir() else ())]
    except (OSError, ValueError):  # whoever reads it will say so
        return
    ours = left_of(target)
    for place in (origin, *origin.parents):
        if place.parent == target.parent and ours.fullmatch(place.name):
            raise InputError(f"the {kind} {given!r} is what an interrupted run left of {str(out)!r}: rename it first")
    if target == origin or origin in target.parents or any(target in place.parents for place in (origin, *inside)):
        raise InputError(f"output {str(out)!r} overlaps the {kind} {given!r}: choose another folder")


def check_replaceable(out: str | Path, target: Path, overwrite: bool) -> None:
    """Raise :class:`InputError` unless ``target`` is missing, empty or, with ``overwrite``, a model and no more."""
    try:
        names = sorted(os.listdir(target)) if os.path.isdir(target) else []
    except OSError as error:
        raise InputError(f"output {str(out)!r} cannot be read: {error}") from error
    if not names:
        return
    if not overwrite:
        raise InputError(f"output {str(out)!r} is not empty: choose another folder or pass --overwrite")
    if not (target / "config.json").is_file() or not any(map(_MARKS.fullmatch, names)):
        raise InputError(f"output {str(out)!r} holds something other than a model: choose another folder")
    foreign = _foreign(target, names)
    if foreign:
        named = ", ".join(map(repr, foreign[:3])) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InputError(
            f"output {str(out)!r} holds what is no part of a model and would be deleted: {named}; choose another folder"
        )


def _foreign(folder: Path, names: list[str]) -> list[str]:
    """Names in a model folder that neither transformers nor this package puts there."""
    code = _code_of(folder)
    foreign = []
    for name in names:
        path = folder / name
        if is_folder(path):
            own = _OWN_FOLDERS.get(name)
            if own is None:
                foreign.append(name)
            else:
                foreign += [
                    f"{name}/{p.name}" for p in sorted(path.iterdir()) if p.is_dir() or not own.fullmatch(p.name)
                ]
        elif not _OWN_FILES.fullmatch(name) and name not in code:
            foreign.append(name)
    return foreign


def _code_of(folder: Path) -> set[str]:
    """Names of the model code in a folder: what its configurations name by ``auto_map``, and what that imports."""
    files: set[Path] = set()
    for name in _CODE:
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8"))["auto_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # names no code
            continue
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in value if isinstance(value, list) else [value]:
                path = folder / f"{str(reference).split('.')[0]}.py"
                if path.is_file() and path.parent == folder:
                    files.add(path)
                    with contextlib.suppress(OSError, ValueError):  # what it imports is not there, or it is no text
                        files.update(map(Path, get_relative_import_files(str(path))))
    return {path.name for path in files if path.parent == folder}


def left_of(target: Path) -> re.Pattern[str]:
    """The names that :func:`_sibling` makes, and their purposes."""
    return re.compile(rf"\.{re.escape(target.name)}\.(partial|previous)-[0-9a-f]{{8}}")


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
