"""The state of a checkpoint's recovery on disk: what was begun, and how far it came."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from llm_surgeon.checkpoint.begun import write_text
from llm_surgeon.errors import InputError, first_line
from llm_surgeon.interrupts import signals_held

_logger = logging.getLogger(__name__)

_REPORT = "report.json"
_KEPT = 2  # states of a training: the newer one may turn out to be damaged


def note_report(state: Path, report: str) -> None:
    """Keep the report of a finished training, of which only the model is still to be written."""
    write_text(state / _REPORT, report)


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
    # torch's writer, which C++ calls, turns an interrupt into an error of its own, or aborts the process.
    with signals_held():
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
