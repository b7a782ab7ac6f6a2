"""What goes with a Gram product: rows copied to where it can read them, and the products with a column of ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon_kernels.symmetric_triton import column_offsets, row_offsets
from surgeon_kernels.triton_launch import on_device

# Columns of a program that sums them, and programs that share the rows: enough to keep a GPU's memory busy.
_SUMMED_COLUMNS = 128
_SUM_PROGRAMS = 1024


@triton.jit
def gather_rows_kernel(
    x, mask, target, tokens, columns, row_stride, column_stride, target_stride,
    MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``target[t, :] = [x[t, :], 0...]``, or zeros where the mask is False."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    real = t < tokens
    if MASKED:
        real = real & (tl.load(mask + t, mask=t < tokens, other=0) != 0)
    value = tl.load(x + t * row_stride + c * column_stride, mask=real & (c < columns), other=0.0)
    tl.store(target + t * target_stride + c, value, mask=(t < tokens) & (c < target_stride))


@triton.jit(do_not_specialize=["tokens", "tokens_each"])
def column_sums_kernel(
    x, mask, partial, tokens, columns, row_stride, column_stride, tokens_each,
    MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``partial[p, c] = Σ_t x[t, c]`` over the p-th share of the rows; of column ``columns``, the number of rows."""
    share = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    at_column = x + c.to(tl.int64)[None, :] * column_stride
    end = tl.minimum((share + 1) * tokens_each, tokens)
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in tl.range(share * tokens_each, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        real = t < end
        if MASKED:
            real = real & (tl.load(mask + t, mask=real, other=0) != 0)
        at = at_column + t.to(tl.int64)[:, None] * row_stride
        value = tl.load(at, mask=real[:, None] & (c < columns)[None, :], other=0.0).to(tl.float32)
        sums += value + (real[:, None] & (c == columns)[None, :]).to(tl.float32)
    tl.store(partial + share * (columns + 1) + c, tl.sum(sums, axis=0), mask=c <= columns)


@triton.jit(do_not_specialize=["columns", "shares"])
def add_sums_kernel(
    partial, out, columns, shares, out_stride, alpha, PACKED: tl.constexpr, SHARES: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Add ``alpha Σ_p partial[p, :]`` to the last row of ``out``, and of a dense one to the last column."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, SHARES)
    inside = c <= columns
    parts = tl.load(
        partial + p[:, None] * (columns + 1) + c[None, :], mask=(p < shares)[:, None] & inside[None, :], other=0.0
    )
    at = out + row_offsets(columns, out_stride, PACKED) + column_offsets(c, PACKED)
    total = tl.load(at, mask=inside, other=0.0) + alpha * tl.sum(parts, axis=0)
    tl.store(at, total, mask=inside)
    if not PACKED:
        tl.store(out + row_offsets(c, out_stride, PACKED) + columns, total, mask=inside)


def gather_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """A copy of ``rows`` ``[N, C]``, zero where the mask is False, in aligned rows: ``[N, >= C]``, zero past ``C``."""
    tokens, columns = rows.shape
    align = 16 // rows.element_size()
    target = rows.new_empty(tokens, triton.cdiv(columns, align) * align)
    block_t, block_c = 16, 256
    with on_device(rows.get_device()):
        gather_rows_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(columns, block_c))](
            rows, _bytes(mask), target, tokens, columns, *rows.stride(), target.stride(0),
            MASKED=mask is not None, BLOCK_T=block_t, BLOCK_C=block_c,
        )  # fmt: skip
    return target


def add_column_sums_(out: Tensor, rows: Tensor, mask: Tensor | None, alpha: float, *, packed: bool) -> None:
    """Add ``alpha Σ_n mask_n [x_n, 1]`` to row ``C`` of ``out``, packed or dense: the products with a column of ones.

    Always added in the same order.
    """
    tokens, columns = rows.shape
    blocks = triton.cdiv(columns + 1, _SUMMED_COLUMNS)
    shares = min(64, triton.cdiv(tokens, 64), triton.cdiv(_SUM_PROGRAMS, blocks))
    partial = torch.empty(shares, columns + 1, device=rows.device)
    with on_device(rows.get_device()):
        column_sums_kernel[(blocks, shares)](
            rows, _bytes(mask), partial, tokens, columns, *rows.stride(), triton.cdiv(tokens, shares),
            MASKED=mask is not None, BLOCK_T=32, BLOCK_C=_SUMMED_COLUMNS,
        )  # fmt: skip
        add_sums_kernel[(blocks,)](
            partial, out, columns, shares, 0 if packed else out.stride(0), alpha,
            PACKED=packed, SHARES=triton.next_power_of_2(shares), BLOCK_C=_SUMMED_COLUMNS,
        )  # fmt: skip


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
