"""What a run was begun with, noted in its folder: options, and fingerprints of what it reads."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.checks import shown
from llm_surgeon.errors import InputError
from llm_surgeon.models.offload import copies_in_main_memory

_NOTE = "run.json"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors, their names, dtypes and shapes, whatever files they lie in and whichever device.

    Every byte is read once: some seconds for a model of several billion weights.
    """

    def digest(tensor: Tensor) -> bytes:
        content = copies_in_main_memory([tensor])[0] if tensor.is_cuda else tensor
        return hashlib.sha256(content.contiguous().flatten().view(torch.uint8).numpy().data).digest()

    whole = hashlib.sha256()
    # Hashing lets go of the GIL; buffers for copies from a GPU are pinned for every thread, which keeps others waiting.
    threads = 2 if any(tensor.is_cuda for tensor in tensors.values()) else min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        for (name, tensor), part in zip(tensors.items(), executor.map(digest, tensors.values()), strict=True):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + part)
    return whole.hexdigest()


def contents(**parts: nn.Module | Tensor | None) -> dict[str, str | None]:
    """Fingerprints of models and of token ids, by name."""
    return {
        name: None if part is None else fingerprint(tensors_of(part) if isinstance(part, nn.Module) else {"": part})
        for name, part in parts.items()
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by their names, where they are now."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def claim(folder: Path, run: dict[str, Any], content: dict[str, str | None], kind: str) -> None:
    """Note in ``folder`` what a run of a ``kind`` is begun with; an interrupted one goes on only as it was begun.

    Args:
        run, content: see :func:`write_note`.

    Raises:
        InputError: see :func:`read_note` and :func:`require_same`.
    """
    begun = read_note(folder)
    if begun is None:
        write_note(folder, run, content)
    else:
        require_same(folder, begun, run, content, kind)


def write_note(folder: Path, run: dict[str, Any], content: dict[str, str | None], **more: Any) -> None:
    """Note what is begun in ``folder``.

    Args:
        run: options by name, and names of files.
        content: fingerprints of what they hold, see :func:`contents`.
        more: what else is to be known when it goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _NOTE, json.dumps({"run": run, "content": content, **more}, indent=2) + "\n")


def read_note(folder: Path) -> dict[str, Any] | None:
    """What :func:`write_note` wrote; ``None`` where nothing was begun.

    Raises:
        InputError: the note cannot be read, or something lies there without one.
    """
    note = folder / _NOTE
    if not note.exists() and all(path.name.endswith(".partial") for path in own_paths(folder)):
        return None
    try:
        begun = dict(json.loads(note.read_text(encoding="utf-8")))
        return {**begun, "run": dict(begun["run"]), "content": dict(begun["content"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{str(note)!r}, which says what was begun, is damaged: {_start_over(folder)}") from error


def require_same(
    folder: Path, begun: Mapping[str, Any], run: dict[str, Any], content: dict[str, str | None], kind: str
) -> None:
    """Raise :class:`InputError`, which names the first difference, where ``begun`` are another run and content."""
    for name, value in run.items():
        if begun["run"].get(name) != value:
            before = shown(begun["run"].get(name))
            raise InputError(
                f"the interrupted {kind} has {name} {before}, not {shown(value)}: give that, or {_start_over(folder)}"
            )
    for name, value in content.items():
        if begun["content"].get(name) != value:
            raise InputError(
                f"the {name} changed since the interrupted {kind} began: put back what was there, or "
                f"{_start_over(folder)}"
            )


def own_paths(folder: Path) -> list[Path]:
    """What lies in ``folder``, but for what file systems and desktops put there, whose names begin with a dot."""
    return [path for path in folder.glob("*") if not path.name.startswith(".")]


def _start_over(folder: Path) -> str:
    return f"delete the folder {str(folder)!r} to start over"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
