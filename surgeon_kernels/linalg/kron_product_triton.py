"""Triton kernels of :mod:`surgeon_kernels.linalg.kron_product`: scaling, and splitting into parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a row that a program takes (an estimate): with four warps, a thread has 8.
_BLOCK = 1024


@triton.jit
def scaled_parts_kernel(
    x: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    parts: tl.tensor,
    width: tl.tensor,
    stride_row: tl.tensor,
    stride_column: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Part of one row of ``x ∘ (rows columnsᵀ)``, in one float16 part or two: ``first``, and ``2¹¹`` times the rest."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    value = tl.load(x + row * stride_row + c.to(tl.int64) * stride_column, mask=inside, other=0.0)
    value *= tl.load(rows + row) * tl.load(columns + c, mask=inside, other=0.0)
    first = value.to(tl.float16)
    out = parts + row * width + c
    tl.store(out, first, mask=inside)
    if PARTS == 2:
        tl.store(out + size, ((value - first.to(tl.float32)) * 2048.0).to(tl.float16), mask=inside)


@triton.jit
def scaled_kernel(
    x: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    stride_row: tl.tensor,
    stride_column: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Part of one row: ``out = x ∘ (rows columnsᵀ)``."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    value = tl.load(x + row * stride_row + c.to(tl.int64) * stride_column, mask=inside, other=0.0)
    value *= tl.load(rows + row) * tl.load(columns + c, mask=inside, other=0.0)
    tl.store(out + row * width + c, value, mask=inside)


def scaled_rows(x: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """``out = x ∘ (rows columnsᵀ)`` of float32 matrices, ``out`` row-major; it may be ``x`` itself."""
    height, width = x.shape
    if x.numel():
        with torch.cuda.device_of(x):
            scaled_kernel[(height, triton.cdiv(width, _BLOCK))](
                x, rows.contiguous(), columns.contiguous(), out, width, x.stride(0), x.stride(1),
                BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
    return out


def scaled_parts_rows(x: Tensor, rows: Tensor, columns: Tensor, parts: int) -> Tensor:
    """The parts ``[parts, m, n]`` of a float32 ``x`` ``[m, n]``, row-major."""
    height, width = x.shape
    out = torch.empty(parts, height, width, dtype=torch.float16, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            scaled_parts_kernel[(height, triton.cdiv(width, _BLOCK))](
                x, rows.contiguous(), columns.contiguous(), out, width, x.stride(0), x.stride(1), x.numel(),
                PARTS=parts, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
    return out
