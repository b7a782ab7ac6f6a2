"""Launches of Triton kernels with little work on the host."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, key: tuple[Any, ...], grid: tuple[int, int, int], *args: Any, **options: int) -> None:
    """``kernel[grid](*args, **options)``, from the second launch with a key on without looking for what to run.

    Triton searches for the compiled kernel by every argument's type, value and alignment, which takes longer than a
    small product. The key must tell apart all of these that may differ, and the device.

    Args:
        args: all of the kernel's parameters in order, constants included.
    """
    key = (kernel.fn.__name__, *key)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*args)
        return
    compiled = kernel[grid](*args, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled


def on_device(index: int) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA device the current one for a while; free of charge if it is already, or for the CPU (-1)."""
    if index < 0 or index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(index)
