"""The state of a checkpoint's recovery on disk: what was begun, and how far it came."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.checks import shown
from llm_surgeon.errors import InputError, first_line

_logger = logging.getLogger(__name__)

_NOTE = "run.json"
_REPORT = "report.json"
_KEPT = 2  # states of a training: the newer one may turn out to be damaged


def fingerprint(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors, their names, dtypes and shapes, whatever files they lie in and whichever device.

    Every byte is read once: some seconds for a model of several billion weights.
    """

    def digest(tensor: Tensor) -> bytes:
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        return hashlib.sha256(content.numpy().data).digest()

    whole = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:  # hashing lets go of the GIL
        named = list(tensors)
        for (name, tensor), part in zip(named, executor.map(lambda pair: digest(pair[1]), named), strict=True):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + part)
    return whole.hexdigest()


def contents(**parts: nn.Module | Tensor | None) -> dict[str, str | None]:
    """Fingerprints of models and of token ids, by name."""
    return {
        name: None
        if part is None
        else fingerprint(_tensors(part) if isinstance(part, nn.Module) else iter([("", part)]))
        for name, part in parts.items()
    }


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def claim(state: Path, run: dict[str, Any], content: dict[str, str | None]) -> None:
    """Note in the folder ``state`` what is trained; an interrupted run goes on only as it was begun.

    Args:
        run: options by name, and names of files; content: fingerprints of what they hold, see :func:`contents`.

    Raises:
        InputError: what was begun there is another run, or the note cannot be read.
    """
    note = state / _NOTE
    start_over = f"delete the folder {str(state)!r} to start over"
    if note.exists() or _newest_first(state):
        try:
            begun = json.loads(note.read_text(encoding="utf-8"))
            options, before = dict(begun["run"]), dict(begun["content"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{str(note)!r}, which says what was begun, is damaged: {start_over}") from error
        for name, value in run.items():
            if options.get(name) != value:
                raise InputError(
                    f"the interrupted recovery has {name} {shown(options.get(name))}, not {shown(value)}: "
                    f"give that, or {start_over}"
                )
        for name, value in content.items():
            if before.get(name) != value:
                raise InputError(
                    f"the {name} changed since the interrupted recovery began: put back what was there, or {start_over}"
                )
        return
    state.mkdir(parents=True, exist_ok=True)
    _write(note, json.dumps({"run": run, "content": content}, indent=2) + "\n")


def note_report(state: Path, report: str) -> None:
    """Keep the report of a finished training, of which only the model is still to be written."""
    _write(state / _REPORT, report)


def finished(state: Path, out: Path) -> str | None:
    """The report of the recovery that ``state`` is of, where ``out`` is the whole model that it made."""
    try:
        report = (state / _REPORT).read_text(encoding="utf-8")
        written = (out / "surgeon_recovery.json").read_text(encoding="utf-8")
    except (OSError, ValueError):  # not there, or damaged: not finished
        return None
    return report if report == written else None


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state of a training after ``step``, whole or not at all; the two newest ones stay.

    Args:
        state: tensors, numbers and texts, in lists and dictionaries.

    Raises:
        InputError: it cannot be written.
    """
    path = folder / f"checkpoint-{step}.pt"
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        raise InputError(f"the training state cannot be written to {str(folder)!r}: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    for old in _newest_first(folder)[_KEPT:]:
        old.unlink()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole state of a training in ``folder``, or ``None``: then it begins anew.

    One that a disk did not keep is removed and named in the log; the one before it is taken.
    """
    for path in _newest_first(folder):
        if (reason := _damage(path)) is None:
            return path
        _logger.warning("the training state %r is damaged (%s) and not gone on from", str(path), reason)
        path.unlink()
    return None


def _newest_first(folder: Path) -> list[Path]:
    numbered = [path for path in folder.glob("checkpoint-*.pt") if path.stem.rpartition("-")[2].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.stem.rpartition("-")[2]), reverse=True)


def _damage(checkpoint: Path) -> str | None:
    """Name what is wrong with a file that torch.save wrote, if anything is."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:  # its directory is at the end, with checksums
            if (name := archive.testzip()) is not None:
                return f"{name} differs from its checksum"
        # Nothing but tensors and plain values is ever unpickled.
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    # Whatever readers of damaged files raise; a RecursionError is a RuntimeError.
    except (
        OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile
    ) as error:  # fmt: skip
        return first_line(error)
    return None


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
