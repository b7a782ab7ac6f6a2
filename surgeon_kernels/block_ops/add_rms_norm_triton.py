"""The Triton kernel of a residual connection and the RMS norm after it: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from surgeon_kernels.block_ops.rms_norm_triton import warps
from surgeon_kernels.runtime.triton_support import DEPENDENT_ROWS, has_dependent_launch


@triton.jit
def add_rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    h: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """One row: ``h = x + residual``, ``y = weight h / sqrt(mean(h²) + eps)``; ``DEPENDENT`` as in ``rms_norm_kernel``.

    The weight is constant, and so read before the wait.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < columns
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    total = tl.load(x + row * columns + c, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual + row * columns + c, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(h.dtype.element_ty)
    tl.store(h + row * columns + c, rounded, mask=inside)
    value = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / columns + eps)
    # Rounded before the weight is multiplied, as transformers does.
    normalized = (value * r).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * columns + c, normalized * w, mask=inside)


def forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``h`` and ``y``; all contiguous."""
    columns = x.shape[-1]
    h, y = torch.empty_like(x), torch.empty_like(x)
    rows = x.numel() // columns
    dependent = rows <= DEPENDENT_ROWS and has_dependent_launch(x.device)
    with torch.cuda.device_of(x):
        add_rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            h,
            y,
            columns,
            eps,
            BLOCK=triton.next_power_of_2(columns),
            DEPENDENT=dependent,
            num_warps=warps(columns),
            **({"launch_pdl": True} if dependent else {}),
        )
    return h, y
