"""Triton kernels of SwiGLU, forward and backward.

Operands are read once and results written once, in the dtype of the model; in between all is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from surgeon_kernels.runtime.triton_support import DEPENDENT_ROWS, has_dependent_launch

# Elements of a program (an estimate): with four warps, a thread has 8.
_BLOCK = 1024


@triton.jit
def swiglu_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
    gate_row: tl.tensor,
    up_row: tl.tensor,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A part of one row: ``y = silu(gate) up``; ``DEPENDENT`` as in ``rms_norm_kernel``."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    parts = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // parts).to(tl.int64)
    c = (tl.program_id(0) % parts).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    g = tl.load(gate + row * gate_row + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + c, mask=inside, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * columns + c, silu * u, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gradient: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    elements: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """``d_up = gradient silu(gate)``, ``d_gate = gradient up silu'(gate)``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    dy = tl.load(gradient + i, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_up + i, dy * g * s, mask=inside)
    tl.store(d_gate + i, dy * u * s * (1.0 + g * (1.0 - s)), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """``y`` of ``gate`` and ``up`` ``[rows, columns]``, last strides 1: they may be halves of one tensor."""
    rows, columns = gate.shape
    y = gate.new_empty(rows, columns)
    dependent = rows <= DEPENDENT_ROWS and has_dependent_launch(gate.device)
    with torch.cuda.device_of(gate):
        swiglu_kernel[(rows * triton.cdiv(columns, _BLOCK),)](
            gate,
            up,
            y,
            columns,
            gate.stride(0),
            up.stride(0),
            BLOCK=_BLOCK,
            DEPENDENT=dependent,
            **({"launch_pdl": True} if dependent else {}),
        )
    return y


def backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``d_gate`` and ``d_up``; all contiguous."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        swiglu_backward_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](
            gradient, gate, up, d_gate, d_up, gate.numel(), BLOCK=_BLOCK
        )
    return d_gate, d_up
