"""The Triton kernel of :func:`surgeon_kernels.linalg.split_matmul.split`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a row that a program takes (an estimate): with four warps, a thread has 8.
_BLOCK = 1024


@triton.jit
def split_kernel(
    x: tl.tensor,
    parts: tl.tensor,
    columns: tl.tensor,
    stride_row: tl.tensor,
    stride_column: tl.tensor,
    part_row: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Part of one row of ``x``, as the bfloat16 parts of three matrices, ``size`` elements apart."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < columns
    rest = tl.load(x + row * stride_row + c.to(tl.int64) * stride_column, mask=inside)
    out = parts + row * part_row + c
    for _ in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        tl.store(out, part, mask=inside)
        rest -= part.to(tl.float32)
        out += size


def split_rows(x: Tensor) -> Tensor:
    """The parts ``[3, m, n]`` of a float32 ``x`` ``[m, n]``, row-major."""
    return split_into(torch.empty(3, *x.shape, dtype=torch.bfloat16, device=x.device), x)


def split_into(parts: Tensor, x: Tensor) -> Tensor:
    """The parts of a float32 ``x`` ``[m, n]`` in ``parts`` ``[3, m, n]``, whose last stride is 1."""
    rows, columns = x.shape
    if x.numel():
        with torch.cuda.device_of(x):
            split_kernel[(rows, triton.cdiv(columns, _BLOCK))](
                x, parts, columns, *x.stride(), parts.stride(1), parts.stride(0), BLOCK=_BLOCK, num_warps=4
            )
    return parts
