"""RMS norm in one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon_kernels.runtime.triton_support import HALF_OR_SINGLE, has_kernels

# A row is held in registers (an estimate: 1024 values a warp).
MOST_COLUMNS = 16384


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Scale every row to root mean square 1, then by the weight (Zhang & Sennrich, 2019)::

        y = weight ∘ x / sqrt(mean(x²) + eps)

    On CUDA devices a Triton kernel computes it, and another the gradient with respect to ``x``, where ``x`` and
    ``weight`` have one dtype of at most 32 bits, ``C <= 16384`` and the weight needs no gradient. Everything
    else is the PyTorch reference, under torch.compile too: it fuses by itself.

    Args:
        x: ``[..., C]``.
        weight: ``[C]``.
        dtype: of the result: where left out that of ``x``, or what it and the weight's promote to.

    Returns:
        ``[..., C]``.

    Raises:
        ValueError: the shapes do not fit; TypeError: ``x`` is not floating point.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"an RMS norm needs x [..., C] and weight [C], not {list(x.shape)} and {list(weight.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and has_kernels()
        and x.dtype == weight.dtype
        and x.dtype in HALF_OR_SINGLE
        and 0 < x.shape[-1] <= MOST_COLUMNS
        and x.numel() > 0
        and not (weight.requires_grad and torch.is_grad_enabled())
    ):
        return _RmsNorm.apply(x, weight, eps, dtype or x.dtype)
    return rms_norm_reference(x, weight, eps, dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """In float32 (float64 for a float64 ``x``), rounded to ``x``'s dtype before the weight is multiplied."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = weight * wide.to(x.dtype)
    return y if dtype is None else y.to(dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        from surgeon_kernels.block_ops import rms_norm_triton

        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = rms_norm_triton.forward(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        from surgeon_kernels.block_ops import rms_norm_triton

        return rms_norm_triton.backward(gradient.contiguous(), *ctx.saved_tensors), None, None, None
