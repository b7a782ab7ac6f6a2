"""Conditions for Triton kernels."""

from __future__ import annotations

import functools
import importlib.util

import torch

# Dtypes of the pointwise kernels, which compute in float32.
HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
# Up to so many rows a pointwise kernel starts while the one before it runs, and lets the next one start. Estimated: of
# norms and 2:4 products by turns on an H200, seven numbers of rows at four sizes, all gained up to 100 rows, and some
# lost up to 11 % from 333 on.
DEPENDENT_ROWS = 128


@functools.cache
def has_kernels() -> bool:
    """True if Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def has_dependent_launch(device: torch.device) -> bool:
    """True if a kernel may start while the one before it runs, on NVIDIA devices of capability 9.0 and newer.

    It is launched with the option ``launch_pdl`` then (programmatic dependent launch, CUDA C++ Programming Guide), and
    waits for the one before itself (``gdc_wait``), before it touches anything that may change.
    """
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
