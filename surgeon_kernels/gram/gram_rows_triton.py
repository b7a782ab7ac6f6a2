"""What the Gram kernel leaves to others: rows that it cannot read as they lie, and products with a column of ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon_kernels.gram.symmetric_triton import column_offsets, row_offsets
from surgeon_kernels.runtime.launch import kind, launch, on_device

# Tiles that are copied and summed, and programs that share the rows of a sum: enough to keep a GPU's memory busy (an
# estimate).
_COPIED_ROWS, _COPIED_COLUMNS = 16, 256
_SUMMED_ROWS, _SUMMED_COLUMNS = 32, 128
_SUM_PROGRAMS = 1024
_MAX_SHARES = 64


@triton.jit(do_not_specialize=["tokens", "columns"])
def gather_rows_kernel(
    x: tl.tensor,
    mask: tl.tensor,
    target: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    target_stride: tl.tensor,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """``target[t, :] = [x[t, :], 0...]``; all zeros where the mask is False."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    real = t < tokens
    if MASKED:
        real = real & (tl.load(mask + t, mask=t < tokens, other=0) != 0)
    value = tl.load(x + t * row_stride + c * column_stride, mask=real & (c < columns), other=0.0)
    tl.store(target + t * target_stride + c, value, mask=(t < tokens) & (c < target_stride))


@triton.jit(do_not_specialize=["tokens", "columns", "tokens_each"])
def column_sums_kernel(
    x: tl.tensor,
    mask: tl.tensor,
    partial: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    tokens_each: tl.tensor,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """``partial[p, c] = Σ_t x[t, c]`` over the p-th share of the rows; of column ``columns``, the number of rows.

    Rows where the mask is False are not counted; they are zero.
    """
    share = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    at_column = x + c.to(tl.int64)[None, :]
    end = tl.minimum((share + 1) * tokens_each, tokens)
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in tl.range(share * tokens_each, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        at = at_column + t.to(tl.int64)[:, None] * row_stride
        value = tl.load(at, mask=(t < end)[:, None] & (c < columns)[None, :], other=0.0).to(tl.float32)
        real = t < end
        if MASKED:
            real = real & (tl.load(mask + t, mask=real, other=0) != 0)
        sums += value + (real[:, None] & (c == columns)[None, :]).to(tl.float32)
    tl.store(partial + share * (columns + 1) + c, tl.sum(sums, axis=0), mask=c <= columns)


@triton.jit(do_not_specialize=["columns", "shares", "out_stride"])
def add_sums_kernel(
    partial: tl.tensor,
    out: tl.tensor,
    columns: tl.tensor,
    shares: tl.tensor,
    out_stride: tl.tensor,
    alpha: tl.tensor,
    PACKED: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Add ``alpha Σ_p partial[p, :]`` to row ``columns`` of ``out``."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, SHARES)
    inside = c <= columns
    parts = tl.load(
        partial + p[:, None] * (columns + 1) + c[None, :], mask=(p < shares)[:, None] & inside[None, :], other=0.0
    )
    at = out + row_offsets(columns, out_stride, PACKED) + column_offsets(c, PACKED)
    total = tl.load(at, mask=inside, other=0.0) + alpha * tl.sum(parts, axis=0)
    tl.store(at, total, mask=inside)


def gather_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """A copy of ``rows`` ``[N, C]``, zero where the mask is False, whose rows are aligned to 16 bytes."""
    tokens, columns = rows.shape
    align = 16 // rows.element_size()
    width = -(-columns // align) * align
    target = rows.new_empty(tokens, width)
    row_stride, column_stride = rows.stride()
    real = None if mask is None else mask.contiguous().view(torch.uint8)
    device = rows.get_device()
    key = (
        rows.dtype, device, real if real is None else kind(real), kind(rows),
        kind(row_stride), kind(column_stride), kind(width),
    )  # fmt: skip
    with on_device(device):
        launch(
            gather_rows_kernel, key, (-(-tokens // _COPIED_ROWS), -(-width // _COPIED_COLUMNS), 1),
            rows, real, target, tokens, columns, row_stride, column_stride, width,
            mask is not None, _COPIED_ROWS, _COPIED_COLUMNS,
        )  # fmt: skip
    return target[:, :columns]


def add_column_sums_(out: Tensor, rows: Tensor, mask: Tensor | None, alpha: float, packed: bool) -> None:
    """Add ``alpha Σ_n [x_n, m_n]`` to row ``C`` of ``out``: the products with a column of ones, ``m`` the mask.

    ``rows`` ``[N, C]`` have unit last stride and are zero where the mask is False. Always added in the same order.
    """
    tokens, columns = rows.shape
    blocks = -(-(columns + 1) // _SUMMED_COLUMNS)
    shares = min(_MAX_SHARES, -(-tokens // 64), -(-_SUM_PROGRAMS // blocks))
    partial = torch.empty(shares, columns + 1, device=rows.device)
    row_stride, device = rows.stride(0), rows.get_device()
    real = None if mask is None else mask.contiguous().view(torch.uint8)
    key = (rows.dtype, device, real if real is None else kind(real), kind(rows), kind(row_stride))
    with on_device(device):
        launch(
            column_sums_kernel, key, (blocks, shares, 1),
            rows, real, partial, tokens, columns, row_stride, -(-tokens // shares), mask is not None,
            _SUMMED_ROWS, _SUMMED_COLUMNS,
        )  # fmt: skip
        launch(
            add_sums_kernel, (device, kind(out), packed), (blocks, 1, 1),
            partial, out, columns, shares, 0 if packed else out.stride(0), alpha, packed, _MAX_SHARES, _SUMMED_COLUMNS,
        )  # fmt: skip
