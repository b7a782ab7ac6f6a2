"""Triton kernels of RMS norm, forward and backward: one program a row.

Operands are read once and results written once, each in its own dtype; in between all is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from surgeon_kernels.runtime.triton_support import DEPENDENT_ROWS, has_dependent_launch


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
    columns: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """One row: ``y = weight x r``, ``r = 1 / sqrt(mean(x²) + eps)``.

    ``DEPENDENT``: it may start while the kernel before it runs, and waits for its end; the kernel after it may start,
    too, if it is launched so, and waits for the end of this one.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < columns
    value = tl.load(x + row * columns + c, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / columns + eps)
    w = tl.load(weight + c, mask=inside, other=0.0)
    # Rounded before the weight is multiplied, as transformers does.
    normalized = (value * r).to(x.dtype.element_ty).to(tl.float32)
    tl.store(y + row * columns + c, normalized * w.to(tl.float32), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def rms_norm_backward_kernel(
    gradient: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    dx: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One row: ``dx = r w g - r³ mean(w g x) x``."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < columns
    value = tl.load(x + row * columns + c, mask=inside, other=0.0).to(tl.float32)
    wg = tl.load(gradient + row * columns + c, mask=inside, other=0.0).to(tl.float32)
    wg *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    mean = tl.sum(wg * value, axis=0) / columns
    tl.store(dx + row * columns + c, r * wg - r * r * r * mean * value, mask=inside)


def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``y`` in ``dtype`` and the reciprocal root mean squares of the rows; ``x`` contiguous."""
    columns = x.shape[-1]
    y = torch.empty_like(x, dtype=dtype)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    dependent = rstd.numel() <= DEPENDENT_ROWS and has_dependent_launch(x.device)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(rstd.numel(),)](
            x,
            weight,
            y,
            rstd,
            columns,
            eps,
            BLOCK=triton.next_power_of_2(columns),
            DEPENDENT=dependent,
            num_warps=warps(columns),
            **({"launch_pdl": True} if dependent else {}),
        )
    return y, rstd


def backward(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """``dx``; all contiguous."""
    columns = x.shape[-1]
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(rstd.numel(),)](
            gradient, x, weight, rstd, dx, columns, BLOCK=triton.next_power_of_2(columns), num_warps=warps(columns)
        )
    return dx


def warps(columns: int) -> int:
    return max(1, min(16, triton.next_power_of_2(columns) // 512))
