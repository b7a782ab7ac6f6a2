"""Conditions for Triton kernels."""

from __future__ import annotations

import functools
import importlib.util

import torch

# Dtypes of the pointwise kernels, which compute in float32.
HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def has_kernels() -> bool:
    """True if Triton is installed."""
    return importlib.util.find_spec("triton") is not None
