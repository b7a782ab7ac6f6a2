"""Quadratic forms of many vectors at once: the sums that costs of rows and columns are made of."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from surgeon_kernels.runtime.triton_support import has_kernels

# Smaller products take less time than the kernel's launch and reduction. By rows of `python -m
# bench.kernels.quadratic_form` the kernel is faster than TF32 from 2048 on, than float32 from 1024 on.
_LEAST_SIDE = 1024


def quadratic_form(x: Tensor, S: Tensor) -> Tensor:
    """``q_r = x_r S x_rᵀ`` for every row: ``diag(X S Xᵀ)``.

    On CUDA devices of capability 9.x, float32 operands with sides of at least 1024 are multiplied by a Triton kernel in
    TF32. It takes half of the products, ``S`` being symmetric, and never stores ``X S``; the same inputs give the same
    bits. Errors are those of PyTorch's TF32 product: S is rounded to TF32 in a copy, and what the tensor cores cut from
    X is made up for. Everything else is PyTorch's product in the operands' dtype.

    Args:
        x: ``[R, C]``, or a transposed view; unless its rows are dense and aligned to 16 bytes the kernel copies it, in
            strips of 64 MiB or 1024 rows.
        S: symmetric ``[C, C]``.

    Returns:
        ``[R]``.

    Raises:
        ValueError: shapes or devices do not fit.
    """
    if x.dim() != 2 or S.shape != (x.shape[1], x.shape[1]):
        raise ValueError(f"a quadratic form needs x [R, C] and S [C, C], not {list(x.shape)} and {list(S.shape)}")
    if x.device != S.device:
        raise ValueError(f"x is on {x.device}, S on {S.device}")
    if fits_kernel(x, S):
        return torch.ops.surgeon_kernels.quadratic_form(x, S)
    return quadratic_form_reference(x, S)


def quadratic_form_reference(x: Tensor, S: Tensor) -> Tensor:
    return ((x @ S) * x).sum(dim=1)


def fits_kernel(x: Tensor, S: Tensor) -> bool:
    """The dispatch rule, see :func:`quadratic_form`."""
    return (
        x.is_cuda
        and has_kernels()
        and x.dtype == S.dtype == torch.float32
        and min(x.shape) >= _LEAST_SIDE
        and _capability(x.device) == 9
    )


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@torch.library.custom_op("surgeon_kernels::quadratic_form", mutates_args=(), device_types="cuda")
def _kernel(x: Tensor, S: Tensor) -> Tensor:
    from surgeon_kernels.linalg.quadratic_form_triton import launch

    return launch(x, S)


_kernel.register_fake(lambda x, S: x.new_empty(x.shape[0]))
