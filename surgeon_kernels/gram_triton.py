"""The Gram kernel: lower-triangular blocks of ``out += alpha xᵀ x``, in place, by persistent programs."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from surgeon_kernels.gram_plan import GramConfig, schedule
from surgeon_kernels.symmetric_triton import column_offsets, exists, row_offsets

# Rows of a block that one program of the reduction adds up.
_REDUCED_ROWS = 2


# Sizes are not specialised: a new number of tokens must not compile a new kernel.
@triton.jit(do_not_specialize=["unit_count", "tokens", "columns", "x_stride"])
def gram_kernel(
    left,  # x [tokens, columns] in blocks [BLOCK_K, BLOCK_M]: a tensor descriptor, or a pointer
    right,  # x in blocks [BLOCK_K, BLOCK_N]
    out,
    workspace,  # [slots, BLOCK_M, BLOCK_N]
    units,  # int32 [unit_count, 5]: row, column, first, last, slot
    alpha,
    unit_count,
    tokens,
    columns,
    x_stride,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    ALIGN: tl.constexpr = 4 if FLOAT32 else 8
    for unit in tl.range(tl.program_id(0), unit_count, tl.num_programs(0)):
        row = tl.load(units + unit * 5) * BLOCK_M
        column = tl.load(units + unit * 5 + 1) * BLOCK_N
        first = tl.load(units + unit * 5 + 2)
        last = tl.load(units + unit * 5 + 3)
        slot = tl.load(units + unit * 5 + 4)
        r = row + tl.arange(0, BLOCK_M)
        c = column + tl.arange(0, BLOCK_N)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(first, last):
            if DESCRIPTORS:
                x_left = left.load([step * BLOCK_K, row])  # [BLOCK_K, BLOCK_M], zero outside x
                x_right = right.load([step * BLOCK_K, column])  # [BLOCK_K, BLOCK_N]
            else:
                t = step * BLOCK_K + tl.arange(0, BLOCK_K)
                start = t.to(tl.int64)[:, None] * x_stride
                # Read in aligned pieces of 16 bytes: what follows the last column in its piece is read as well.
                at_left = tl.max_contiguous(tl.multiple_of(left + start + r[None, :], [1, 16]), [1, ALIGN])
                at_right = tl.max_contiguous(tl.multiple_of(right + start + c[None, :], [1, 16]), [1, ALIGN])
                in_left = tl.max_constancy((t < tokens)[:, None] & (r < columns)[None, :], [1, ALIGN])
                in_right = tl.max_constancy((t < tokens)[:, None] & (c < columns)[None, :], [1, ALIGN])
                x_left = tl.load(at_left, mask=in_left, other=0.0)
                x_right = tl.load(at_right, mask=in_right, other=0.0)
            if FLOAT32:
                # Tensor cores truncate their running sum; adding each step's own keeps float32's rounding.
                product += tl.dot(tl.trans(x_left), x_right, input_precision=PRECISION)
            else:
                product = tl.dot(tl.trans(x_left), x_right, product)
        product *= alpha
        if slot == -1:
            offsets = row_offsets(r, out_stride, PACKED)[:, None] + column_offsets(c, PACKED)[None, :]
            present = exists(r, c, columns, PACKED)
            tl.store(out + offsets, tl.load(out + offsets, mask=present, other=0.0) + product, mask=present)
        elif slot >= 0:
            part = workspace + slot.to(tl.int64) * (BLOCK_M * BLOCK_N)
            part += (r - row)[:, None] * BLOCK_N + (c - column)[None, :]
            tl.store(part, product)


@triton.jit(do_not_specialize=["splits", "columns"])
def reduce_kernel(
    workspace,
    out,
    reductions,  # int32 [blocks, 3]: row, column, first slot
    splits,
    columns,
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,  # power of two, at least splits
    PACKED: tl.constexpr,
):
    """``out += Σ_slots workspace[slot]`` for ``ROWS`` rows of one block, always added in the same order."""
    block = tl.program_id(0)
    row = tl.load(reductions + block * 3) * BLOCK_M
    column = tl.load(reductions + block * 3 + 1) * BLOCK_N
    first = tl.load(reductions + block * 3 + 2)
    part = tl.arange(0, PARTS)
    local_r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    local_c = tl.arange(0, BLOCK_N)
    slots = (first + part).to(tl.int64) * (BLOCK_M * BLOCK_N)
    offsets_in_block = local_r[:, None] * BLOCK_N + local_c[None, :]
    parts = tl.load(
        workspace + slots[:, None, None] + offsets_in_block[None, :, :], (part < splits)[:, None, None], other=0.0
    )
    total = tl.sum(parts, axis=0)
    r, c = row + local_r, column + local_c
    offsets = row_offsets(r, out_stride, PACKED)[:, None] + column_offsets(c, PACKED)[None, :]
    present = exists(r, c, columns, PACKED)
    tl.store(out + offsets, tl.load(out + offsets, mask=present, other=0.0) + total, mask=present)


@triton.jit
def gather_rows_kernel(
    x, mask, target, tokens, columns, row_stride, column_stride, target_stride, width,
    MASKED: tl.constexpr, ONES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``target[t, :] = [x[t, :], 1, 0...]``, or zeros where the mask is False, for every ``c < width``."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    real = t < tokens
    if MASKED:
        real = real & (tl.load(mask + t, mask=t < tokens, other=0) != 0)
    value = tl.load(x + t * row_stride + c * column_stride, mask=real & (c < columns), other=0.0)
    if ONES:
        value = tl.where(real & (c == columns), 1.0, value.to(tl.float32)).to(x.dtype.element_ty)
    tl.store(target + t * target_stride + c, value, mask=(t < tokens) & (c < width))


def gather_rows(rows: Tensor, mask: Tensor | None, ones_column: bool) -> Tensor:
    """A copy of ``rows`` ``[N, C]``, masked and with ones, in aligned rows: ``[N, >= C']``, zero past ``C'``."""
    tokens, columns = rows.shape
    align = 16 // rows.element_size()
    width = triton.cdiv(columns + ones_column, align) * align
    target = rows.new_empty(tokens, width)
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    block_t, block_c = 16, 256
    with torch.cuda.device_of(rows):
        gather_rows_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(width, block_c))](
            rows, mask, target, tokens, columns, rows.stride(0), rows.stride(1), width, width,
            MASKED=mask is not None, ONES=ones_column, BLOCK_T=block_t, BLOCK_C=block_c,
        )  # fmt: skip
    return target


def readable(rows: Tensor) -> bool:
    """Whether the kernel can read ``rows`` as they lie: unit last stride and rows aligned to 16 bytes."""
    size = rows.element_size()
    return rows.stride(1) == 1 and rows.stride(0) > 0 and rows.stride(0) * size % 16 == 0 and rows.data_ptr() % 16 == 0


def accumulate_(out: Tensor, n: int, rows: Tensor, alpha: float, config: GramConfig, *, packed: bool) -> None:
    """``out += alpha rowsᵀ rows`` on the lower blocks of a dense or packed ``out``; ``rows`` ``[N, n]`` readable."""
    tokens = rows.shape[0]
    programs = config.programs_per_sm * _processors(rows.device)
    units, reductions, splits = _tables(n, triton.cdiv(tokens, config.block_k), config, programs, rows.device)
    slots = len(reductions) * splits
    workspace = torch.empty(slots, config.block_m, config.block_n, device=rows.device) if slots else out
    left: Tensor | TensorDescriptor = rows
    right: Tensor | TensorDescriptor = rows
    if config.descriptors:
        shape, strides = list(rows.shape), list(rows.stride())
        left = TensorDescriptor(rows, shape, strides, [config.block_k, config.block_m])
        right = TensorDescriptor(rows, shape, strides, [config.block_k, config.block_n])
    stride = 0 if packed else out.stride(0)
    with torch.cuda.device_of(rows):
        gram_kernel[(min(len(units), programs),)](
            left, right, out, workspace, units, alpha, len(units), tokens, n, rows.stride(0), stride,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, DESCRIPTORS=config.descriptors,
            PACKED=packed, PRECISION=config.precision, FLOAT32=rows.dtype == torch.float32,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if slots:
            reduce_kernel[(len(reductions), config.block_m // _REDUCED_ROWS)](
                workspace, out, reductions, splits, n, stride,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, ROWS=_REDUCED_ROWS,
                PARTS=triton.next_power_of_2(splits), PACKED=packed, num_warps=4,
            )  # fmt: skip


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that programs take several units."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5


@functools.lru_cache(maxsize=256)
def _tables(n: int, steps: int, config: GramConfig, programs: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The schedule's units and reductions on ``device``, and the parts of a split block."""
    plan = schedule(n, steps, config, programs)
    units = torch.tensor(plan.units, dtype=torch.int32, device=device)
    return units, torch.tensor(plan.reductions, dtype=torch.int32, device=device), plan.splits
