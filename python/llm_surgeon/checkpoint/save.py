"""Write a checkpoint whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.checkpoint.load import first_line, read_json
from llm_surgeon.errors import InputError
from llm_surgeon.resources import nearest_existing


def check_output(out: str | Path, source: str | Path | None, overwrite: bool) -> None:
    """Raise :class:`InputError` where a checkpoint cannot or must not be written to ``out``.

    ``out`` must not be the folder ``source``, inside it or around it, nor a file, nor a mount point; with
    ``overwrite`` it may hold another model, and nothing else; and its parent must be writable.
    """
    target = Path(out).resolve()
    if source is not None and Path(source).exists():
        origin = Path(source).resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise InputError(f"output {str(out)!r} overlaps the model {str(source)!r}: choose another folder")
    if target.exists() and not target.is_dir():
        raise InputError(f"output {str(out)!r} is a file: choose a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise InputError(f"output {str(out)!r} is not empty: choose another folder or pass --overwrite")
        if not (target / "config.json").is_file():
            raise InputError(f"output {str(out)!r} holds something other than a model: choose another folder")
    if target.is_mount():
        raise InputError(f"output {str(out)!r} is a mount point: choose a folder inside it")
    parent = nearest_existing(target.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {str(out)!r} cannot be written: {str(parent)!r} is not a writable folder")


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    dtype: torch.dtype,
    extra_files: Mapping[str, str],
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write a folder that plain ``AutoModelForCausalLM`` and ``AutoTokenizer`` load: all of it, or nothing.

    Everything goes into a hidden folder beside ``out`` that is renamed when it is complete; a folder that it replaces
    is deleted last. Numbers are cast to ``dtype`` in copies in main memory (the model is left as it is), and every
    zero is written as +0.0. Tied weights are stored once.

    Args:
        extra_files: texts by file name, such as ``README.md``.
        overwrite: replace the model that ``out`` holds.

    Raises:
        InputError: see :func:`check_output`; also where writing fails (a full disk, say). ``out`` is as before then.
    """
    check_output(out, None, overwrite)
    target = Path(out).resolve()
    partial = _sibling(target, "partial")
    try:
        partial.mkdir(parents=True)
        _write(model, tokenizer, partial, dtype, max_shard_size)
        for name, text in extra_files.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in partial.iterdir():
            shutil.copymode(partial / "config.json", path)  # safetensors makes files that only their owner can read
        previous = _move_into_place(partial, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"output {str(out)!r} cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # not there any more after success
    if previous is not None:
        shutil.rmtree(previous)


def pruning_records(source: str | Path) -> dict[str, str]:
    """What a pruned checkpoint's folder says of its pruning, texts by file name: true of all that is made from it."""
    paths = [Path(source) / name for name in ("surgeon_report.json", "report.html")]
    return {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype, max_shard_size: str
) -> None:
    # Some published generation configs do not pass the validation that some versions of transformers do when saving.
    generation = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=_cast_state(model, dtype), max_shard_size=max_shard_size)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
    # save_pretrained notes the dtype that the model has in memory.
    path = folder / "config.json"
    config = _with_dtype(read_json(path), str(dtype).removeprefix("torch."))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _cast_state(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of all weights in main memory, floating point ones in ``dtype``; what is tied stays tied."""
    copies: dict[tuple[object, ...], Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if identity not in copies:
            floating = tensor.is_floating_point()
            # Adding zero turns -0.0 (a tiny weight rounded, for one) into +0.0 and changes nothing else.
            copies[identity] = tensor.to("cpu", dtype) + 0.0 if floating else tensor.to("cpu", copy=True)
        state[name] = copies[identity]
    return state


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """``config`` with ``dtype`` at its top and wherever a part of it states one."""
    parts = {
        key: _with_dtype(part, dtype) for key, part in config.items() if isinstance(part, dict) and "dtype" in part
    }
    return {**config, **parts, "dtype": dtype}


def _move_into_place(partial: Path, target: Path) -> Path | None:
    """Rename ``partial`` to ``target``; where a former ``target`` has gone, to be deleted."""
    if not target.exists():
        os.rename(partial, target)
        return None
    previous = _sibling(target, "previous")
    os.rename(target, previous)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(previous, target)
        raise
    return previous


def _sibling(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{purpose}-{secrets.token_hex(4)}")
