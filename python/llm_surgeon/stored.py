"""What safetensors files say they hold, read from their headers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

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
    """Every tensor in some safetensors files by name; an :class:`InputError` where one is damaged or cut short."""
    stored = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:  # compares the header with the file's length
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    tensor = file.get_slice(key)
                    stored[key] = StoredTensor(tensor.get_dtype(), list(tensor.get_shape()))
        except (SafetensorError, OSError) as error:
            raise InputError(f"weights file {str(path)!r} is damaged or cut short: {error}") from error
    return stored
