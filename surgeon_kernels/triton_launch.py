"""Launches of Triton kernels with little work on the host."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, key: tuple[Any, ...], grid: tuple[int, int, int], *args: Any, **options: int) -> None:
    """``kernel[grid](*args, **options)``, from the second launch with a key on without looking for what to run.

    Triton searches for the compiled kernel by every argument's type, value and alignment, which takes longer than a
    small product. The key must tell apart all of these that may differ (:func:`kind`), and the device.

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


def kind(argument: Tensor | int) -> tuple[bool, ...]:
    """What Triton compiles anew for: a pointer's alignment; an integer's too, its being 1, and its width."""
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, argument < 1 << 31
    return (argument.data_ptr() % 16 == 0,)


def on_device(index: int) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA device the current one for a while; free of charge if it is already, or for the CPU (-1)."""
    if index < 0 or index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(index)
