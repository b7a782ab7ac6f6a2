"""States of a run in files: each whole or not at all, with its checksum in its name."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_surgeon.checkpoint.output import to_disk

_SUFFIX = ".safetensors"
_CHUNK = 2**24
# As safetensors call them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class State:
    """What a run has come to: tensors by name, wherever they lie, and plain values, as JSON has them."""

    tensors: Mapping[str, Tensor]
    note: Mapping[str, Any]

    def part(self, kind: str) -> dict[str, Tensor]:
        """The tensors of a :func:`part`, by the names that they have there."""
        head = f"{kind}:"
        return {name.removeprefix(head): tensor for name, tensor in self.tensors.items() if name.startswith(head)}


def part(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with ``kind`` before their names."""
    return {f"{kind}:{name}": tensor for name, tensor in tensors.items()}


class Abandoned(Exception):
    """A state is not wanted any more."""


def write_state(folder: Path, name: str, state: State, abandoned: threading.Event | None = None) -> Path:
    """Write ``NAME.SHA256.safetensors``, on disk before it has its name; ``state`` lies in main memory.

    Raises:
        OSError: it cannot be written. Abandoned: so it was asked for meanwhile.
    """
    partial, sha256 = folder / f"{name}.partial", hashlib.sha256()
    try:
        with partial.open("wb") as file:
            for piece in _pieces(state):
                if abandoned is not None and abandoned.is_set():
                    raise Abandoned
                file.write(piece)
                sha256.update(piece)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"{name}.{sha256.hexdigest()}{_SUFFIX}"
        partial.replace(path)
        to_disk(folder)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _pieces(state: State) -> Iterator[bytes | memoryview]:
    """The file, piece by piece: its header, and tensors, those of wide numbers first, so that all are aligned."""
    tensors = dict(sorted(state.tensors.items(), key=lambda item: -item[1].itemsize))
    header: dict[str, Any] = {"__metadata__": {"note": json.dumps(state.note)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        for begin in range(0, len(content), _CHUNK):
            yield content[begin : begin + _CHUNK]


def find_states(folder: Path) -> dict[str, list[Path]]:
    """The files that :func:`write_state` wrote, by the names that they were given, the newest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*.*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        found.setdefault(path.name.split(".")[0], []).append(path)
    return found


def read_state(path: Path) -> State | None:
    """The state in a file, its tensors in main memory; ``None`` where it is not what its checksum says."""
    sha256 = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while content := file.read(_CHUNK):
                sha256.update(content)
        if path.name.split(".")[1] != sha256.hexdigest():
            return None
        with safe_open(path, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
            return State(tensors, json.loads(opened.metadata()["note"]))
    except (OSError, SafetensorError):
        return None
