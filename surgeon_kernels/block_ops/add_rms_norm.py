"""A residual connection and the RMS norm after it, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.block_ops.rms_norm import MOST_COLUMNS, rms_norm_reference
from surgeon_kernels.runtime.triton_support import HALF_OR_SINGLE, has_kernels


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and scale every row of the sum as :func:`~surgeon_kernels.rms_norm` does::

        h = x + residual,   y = weight ∘ h / sqrt(mean(h²) + eps)

    A Triton kernel computes it on CUDA devices for one dtype of at most 32 bits and ``C <= 16384``; it has no gradient.
    Where one is wanted, and everywhere else, it is the PyTorch reference.

    Args:
        x, residual: ``[..., C]``; weight: ``[C]``.

    Returns:
        ``h`` and ``y``, as ``x``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if x.dim() == 0 or x.shape != residual.shape or weight.shape != x.shape[-1:]:
        shapes = f"{list(x.shape)}, {list(residual.shape)} and {list(weight.shape)}"
        raise ValueError(f"x and the residual must be [..., C] and the weight [C], not {shapes}")
    if (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and has_kernels()
        and x.dtype == residual.dtype == weight.dtype
        and x.dtype in HALF_OR_SINGLE
        and 0 < x.shape[-1] <= MOST_COLUMNS
        and x.numel() > 0
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, residual, weight)))
    ):
        from surgeon_kernels.block_ops import add_rms_norm_triton

        return add_rms_norm_triton.forward(x.contiguous(), residual.contiguous(), weight.contiguous(), eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = x + residual
    return h, rms_norm_reference(h, weight, eps)
