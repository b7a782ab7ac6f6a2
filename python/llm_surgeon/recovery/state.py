"""The state of a checkpoint's recovery on disk: what was begun, and how far it came."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from llm_surgeon.checks import shown
from llm_surgeon.errors import InputError, first_line
from llm_surgeon.formats.safetensors_headers import read_headers

_logger = logging.getLogger(__name__)

_NOTE = "run.json"
_REPORT = "report.json"
_CHECKSUMS = "checksums.json"
# What torch.save writes has checksums of its own.
_ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


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


def seal(checkpoint: Path) -> None:
    """Write checksums beside the files of a checkpoint of Trainer's, once all are there."""
    _write(checkpoint / _CHECKSUMS, json.dumps(_sha256(checkpoint), indent=2) + "\n")


def _sha256(checkpoint: Path) -> dict[str, str]:
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name not in (_CHECKSUMS, *_ARCHIVES))
    found = {}
    for path in sorted(files):
        with path.open("rb") as file:
            whole = hashlib.sha256()
            while piece := file.read(2**20):
                whole.update(piece)
        found[str(path.relative_to(checkpoint))] = whole.hexdigest()
    return found


def latest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of Trainer's in ``folder``, or ``None``: then the training begins anew.

    One that a kill left half-written, or that a disk did not keep, is removed and named in the log; the one before it
    is taken. Where the best state so far went that way, the best one is looked for from here on.
    """
    for path in _newest_first(folder):
        if reason := _damage(path):
            _logger.warning("the training state %r is damaged (%s) and not gone on from", str(path), reason)
            shutil.rmtree(path)
    for path in _newest_first(folder):
        file = path / "trainer_state.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        best = state.get("best_model_checkpoint")
        if best is not None and not Path(best).is_dir():
            state |= {"best_model_checkpoint": None, "best_metric": None, "best_global_step": None}
            _write(file, json.dumps(state, indent=2) + "\n")
            seal(path)
        return str(path)
    return None


def _newest_first(folder: Path) -> list[Path]:
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _damage(checkpoint: Path) -> str | None:
    """Name what is wrong with the files of a checkpoint, if anything is; their checksums are written last."""
    try:
        TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        weights = list(checkpoint.glob("*.safetensors"))
        if not weights:
            return "no weights"
        read_headers(weights)
        if json.loads((checkpoint / _CHECKSUMS).read_text(encoding="utf-8")) != _sha256(checkpoint):
            return "files differ from their checksums"
        for name in _ARCHIVES:
            with zipfile.ZipFile(checkpoint / name) as archive:  # its directory is at the end, with checksums
                if archive.testzip() is not None:
                    return f"{name} is damaged"
            with safe_globals():  # nothing but tensors, arrays and plain values is ever unpickled, by Trainer neither
                torch.load(checkpoint / name, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    # Whatever readers of damaged files raise; a RecursionError is a RuntimeError.
    except (
        InputError, OSError, ValueError, TypeError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile
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
