"""Whether Triton kernels can be launched here."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def has_kernels() -> bool:
    """Triton is installed. (Kernels for a device's architecture are chosen in :mod:`surgeon_kernels.gram_plan`.)"""
    return importlib.util.find_spec("triton") is not None
