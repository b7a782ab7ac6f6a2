"""Launches of Triton kernels with little work on the host.

This relies on an internal of Triton: a compiled kernel, indexed by a grid, takes all of the kernel's arguments as they
are. That holds for the versions of :data:`_KNOWN`; with any other, every launch goes the documented, slower way.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

# From the first to before the second, major and minor.
_KNOWN = (3, 6), (3, 10)


def known(version: str) -> bool:
    """True if compiled kernels of this version of Triton can be launched directly."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return _KNOWN[0] <= (major, minor) < _KNOWN[1]


_direct = known(triton.__version__)
if not _direct:
    versions = " to before ".join("{}.{}".format(*version) for version in _KNOWN)
    warnings.warn(
        f"Triton {triton.__version__} is not among the versions known here, {versions}: its kernels are launched "
        "without the short cut, at some cost for small products"
    )

# By the kernel's identity (the entry keeps it alive) and the key of :func:`launch`.
_compiled: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def launch(kernel: Any, key: tuple[Any, ...], grid: tuple[int, int, int], *args: Any, **options: int) -> None:
    """``kernel[grid](*args, **options)``, from the second launch with a key on without Triton's search.

    Triton searches for the compiled kernel by every argument's type, value and alignment, which takes longer than a
    small product. The key must tell apart all of these that may differ (:func:`kind`), and the device; of different
    kernels it may be the same.

    Args:
        args: all of the kernel's parameters in order, constants included.

    Raises:
        TypeError: not all of them.
    """
    key = (id(kernel), *key)
    found = _compiled.get(key)
    if found is not None:
        found[1][grid](*args)
        return
    if len(args) != len(kernel.arg_names):
        raise TypeError(f"the kernel takes {len(kernel.arg_names)} arguments, not {len(args)}")
    compiled = kernel[grid](*args, **options)
    if _direct and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
        _compiled[key] = kernel, compiled


def kind(argument: Tensor | int) -> tuple[bool, ...]:
    """Properties that Triton compiles anew for: alignment; of an integer also its being 1, and its width."""
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, argument < 1 << 31
    return (argument.data_ptr() % 16 == 0,)


def on_device(index: int) -> contextlib.AbstractContextManager[object]:
    """Context manager that makes a CUDA device current, restored on exit; free where it is, and for the CPU (-1)."""
    if index < 0 or index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(index)
