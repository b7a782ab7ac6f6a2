"""Rotary position embedding in one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon_kernels.runtime.triton_support import HALF_OR_SINGLE, has_kernels


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs ``(x_d, x_(d + D/2))`` of every head by their token's angles (Su et al., 2021)::

        y = x ∘ cos + [-x₂, x₁] ∘ sin,    x = [x₁, x₂] in halves of the last dimension

    On CUDA devices a Triton kernel computes it and its gradient with respect to ``x``, where all have one dtype of at
    most 32 bits and the angles need no gradient. Everything else is the PyTorch reference, under torch.compile
    too: it fuses by itself.

    Args:
        x: ``[batch, heads, length, D]``.
        cos, sin: ``[batch or 1, length, D]``.

    Returns:
        As ``x``, in the dtype that its products with the angles have.

    Raises:
        ValueError: the shapes do not fit, or ``D`` is odd.
    """
    tail = x.shape[2:]
    if x.dim() != 4 or x.shape[3] % 2 or cos.shape != sin.shape or cos.dim() != 3 or cos.shape[1:] != tail:
        shapes = f"{list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        raise ValueError(
            f"x must be [batch, heads, length, D], D even, cos and sin [batch or 1, length, D], not {shapes}"
        )
    if (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and has_kernels()
        and x.dtype == cos.dtype == sin.dtype
        and x.dtype in HALF_OR_SINGLE
        and x.numel() > 0
        and not ((cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled())
    ):
        batch, _, length, dim = x.shape
        return _Rotary.apply(x, cos.expand(batch, length, dim), sin.expand(batch, length, dim))
    return rotary_reference(x, cos, sin)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from surgeon_kernels.block_ops import rotary_triton

        x, cos, sin = (_readable(t) for t in (x, cos, sin))
        ctx.save_for_backward(cos, sin)
        return rotary_triton.rotate(x, cos, sin, transposed=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        from surgeon_kernels.block_ops import rotary_triton

        return rotary_triton.rotate(_readable(gradient), *ctx.saved_tensors, transposed=True), None, None


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
