"""Headers of safetensors files, and checksums of their tensors."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from llm_surgeon.errors import InputError


class StoredTensor(NamedTuple):
    """``dtype`` as safetensors call it: F32, BF16, U8 …"""

    dtype: str
    shape: list[int]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Every tensor in some safetensors files by name.

    Raises:
        InputError: a file is damaged or cut short, or a tensor lies in two files.
    """
    stored: dict[str, StoredTensor] = {}
    holder: dict[str, str | Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:  # compares the header with the file's length
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    if key in holder:
                        both = f"{Path(holder[key]).name!r} and {Path(path).name!r}"
                        raise InputError(f"the weights files {both} both hold {key}: delete the one that is wrong")
                    tensor = file.get_slice(key)
                    stored[key] = StoredTensor(tensor.get_dtype(), list(tensor.get_shape()))
                    holder[key] = path
        except (SafetensorError, OSError) as error:
            raise InputError(f"weights file {str(path)!r} is damaged or cut short: {error}") from error
    return stored


def tensor_sha256(files: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of every tensor in some safetensors files by name, over ``"BF16 [2, 3] "`` and its bytes as stored.

    Reads every byte, a tensor to a thread: about 1 GB per second and core.
    """
    found: dict[str, str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for path in files:
            with safe_open(path, framework="pt") as file:

                def digest(key: str, file: Any = file) -> str:
                    stored = file.get_slice(key)
                    sha256 = hashlib.sha256(f"{stored.get_dtype()} {list(stored.get_shape())} ".encode())
                    sha256.update(file.get_tensor(key).reshape(-1).view(torch.uint8).numpy())
                    return sha256.hexdigest()

                keys = list(file.keys())
                found.update(zip(keys, threads.map(digest, keys), strict=True))
    return found
