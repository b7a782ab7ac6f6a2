"""The gated activation of a feed-forward layer in one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgeon_kernels.runtime.triton_support import HALF_OR_SINGLE, has_kernels


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``y = silu(gate) ∘ up``, ``silu(z) = z / (1 + exp(-z))`` (Shazeer, 2020).

    On CUDA devices Triton kernels compute it and its gradients, where both have one shape and one dtype of at most 32
    bits; the activation is computed again in the backward pass instead of being kept. Everything else is the PyTorch
    reference, under torch.compile too: it fuses by itself.

    Args:
        gate, up: ``[..., C]`` of one shape, or of shapes that PyTorch broadcasts (RuntimeError otherwise); floating
            point.

    Returns:
        The broadcast shape, in the dtype that PyTorch promotes both to.
    """
    if (
        gate.is_cuda
        and not torch.compiler.is_compiling()
        and has_kernels()
        and gate.shape == up.shape
        and gate.dtype == up.dtype
        and gate.dtype in HALF_OR_SINGLE
        and gate.dim() > 0
        and gate.numel() > 0
    ):
        return _SwiGLU.apply(gate, up)
    return swiglu_reference(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from surgeon_kernels.block_ops import swiglu_triton

        ctx.save_for_backward(gate, up)
        return swiglu_triton.forward(_rows(gate), _rows(up)).view(gate.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        from surgeon_kernels.block_ops import swiglu_triton

        gate, up = ctx.saved_tensors
        return swiglu_triton.backward(gradient.contiguous(), gate.contiguous(), up.contiguous())


def _rows(x: Tensor) -> Tensor:
    """``[rows, columns]`` with neighbours in memory along a row."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])
