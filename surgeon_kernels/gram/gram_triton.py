"""The Gram kernel: lower-triangular blocks of ``out += alpha xᵀ x``, in place, by persistent programs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from surgeon_kernels.gram.plan import MAX_SPLITS, GramConfig, schedule
from surgeon_kernels.gram.symmetric_triton import column_offsets, exists, row_offsets
from surgeon_kernels.runtime.launch import launch, on_device

# Rows of a block that one program of the reduction adds up (an estimate): with more of them fewer programs share it.
_REDUCED_ROWS = 8


@triton.jit
def read_block(
    x: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    ALIGN: tl.constexpr,
) -> tl.tensor:
    """``x[row : row + STEPS, column : column + WIDTH]``, zero past the last row and column."""
    if DESCRIPTOR:
        block = x.load([row, column])
    else:
        t = row + tl.arange(0, STEPS)
        c = column + tl.arange(0, WIDTH)
        # Read in aligned pieces of 16 bytes: the rest of the last column's piece is read as well.
        at = tl.max_contiguous(tl.multiple_of(x + t.to(tl.int64)[:, None] * stride + c[None, :], [1, 16]), [1, ALIGN])
        inside = tl.max_constancy((t < tokens)[:, None] & (c < columns)[None, :], [1, ALIGN])
        block = tl.load(at, mask=inside, other=0.0)
    return block


@triton.jit
def add_block(
    out: tl.tensor,
    r: tl.tensor,
    c: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    product: tl.tensor,
    PACKED: tl.constexpr,
) -> None:
    """``out[r, c] += product``."""
    at = out + row_offsets(r, stride, PACKED)[:, None] + column_offsets(c, PACKED)[None, :]
    present = exists(r, c, n, PACKED)
    tl.store(at, tl.load(at, mask=present, other=0.0) + product, mask=present)


# Sizes are not specialised: a new number of tokens must not compile a new kernel.
@triton.jit(do_not_specialize=["unit_count", "tokens", "columns", "x_stride", "out_stride"])
def gram_kernel(
    left: tl.tensor,  # x [tokens, columns] in blocks [BLOCK_K, BLOCK_M]: a tensor descriptor, or a pointer
    right: tl.tensor,  # x in blocks [BLOCK_K, BLOCK_N]
    out: tl.tensor,
    workspace: tl.tensor,  # [slots, BLOCK_M, BLOCK_N]
    units: tl.tensor,  # int32 [unit_count, 5]: row, column, first, last, slot
    alpha: tl.tensor,
    unit_count: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLOAT32: tl.constexpr,
    RUN: tl.constexpr,  # steps whose sums are added up in registers; 0: all steps are one sum
) -> None:
    """Units of :class:`~surgeon_kernels.gram.plan.Schedule`, every ``num_programs``-th from this program's own on."""
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
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(first, last):  # the mainloop, pipelined
            t = step * BLOCK_K
            x_left = read_block(left, t, row, tokens, columns, x_stride, BLOCK_K, BLOCK_M, DESCRIPTORS, ALIGN)
            x_right = read_block(right, t, column, tokens, columns, x_stride, BLOCK_K, BLOCK_N, DESCRIPTORS, ALIGN)
            if FLOAT32:
                # Tensor cores truncate their running sum; adding each step's own keeps float32's rounding.
                product += tl.dot(tl.trans(x_left), x_right, input_precision=PRECISION)
            else:
                product = tl.dot(tl.trans(x_left), x_right, product)
            if RUN:  # noqa: SIM102 - known when it is compiled
                if (step - first) % RUN == RUN - 1:
                    total += product
                    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        product = (total + product) * alpha  # the epilogue: to the output, or a partial sum to the workspace
        if slot == -1:
            add_block(out, r, c, columns, out_stride, product, PACKED)
        elif slot >= 0:
            part = workspace + slot.to(tl.int64) * (BLOCK_M * BLOCK_N)
            part += (r - row)[:, None] * BLOCK_N + (c - column)[None, :]
            tl.store(part, product)


@triton.jit(do_not_specialize=["splits", "columns", "out_stride"])
def reduce_kernel(
    workspace: tl.tensor,
    out: tl.tensor,
    reductions: tl.tensor,  # int32 [blocks, 3]: row, column, first slot
    splits: tl.tensor,
    columns: tl.tensor,
    out_stride: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    PACKED: tl.constexpr,
) -> None:
    """``out += Σ_slots workspace[slot]`` for ``ROWS`` rows of one block, always added in the same order."""
    block = tl.program_id(0)
    row = tl.load(reductions + block * 3) * BLOCK_M
    column = tl.load(reductions + block * 3 + 1) * BLOCK_N
    first = tl.load(reductions + block * 3 + 2)
    local_r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    local_c = tl.arange(0, BLOCK_N)
    at = workspace + first.to(tl.int64) * (BLOCK_M * BLOCK_N) + local_r[:, None] * BLOCK_N + local_c[None, :]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for part in tl.static_range(MAX_PARTS):  # unrolled: the loads do not wait for each other
        present = local_c[None, :] * 0 + part < splits  # a block: the interpreter takes no scalar for a mask
        total += tl.load(at + part * (BLOCK_M * BLOCK_N), mask=present, other=0.0)
    add_block(out, row + local_r, column + local_c, columns, out_stride, total, PACKED)


class Plan(NamedTuple):
    """Everything about a launch that follows from sizes, its schedule already on the device."""

    config: GramConfig
    packed: bool
    float32: bool
    programs: int
    units: Tensor
    unit_count: int
    reductions: Tensor
    reduction_count: int
    splits: int
    workspace: int


def plan(columns: int, tokens: int, dtype: torch.dtype, packed: bool, config: GramConfig, device: torch.device) -> Plan:
    """The plan of a product: one for all numbers of tokens of as many steps.

    Making it takes host time and copies its schedule to the device. Plans are kept, the least recently used dropped,
    except for those that a CUDA graph was captured with: it reads their schedules as long as it is replayed.
    """
    made = _plan(columns, -(-tokens // config.block_k), dtype, packed, config, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[id(made)] = made
    return made


_captured: dict[int, Plan] = {}


@functools.lru_cache(maxsize=1024)
def _plan(columns: int, steps: int, dtype: torch.dtype, packed: bool, config: GramConfig, device: torch.device) -> Plan:
    programs = config.programs_per_sm * _processors(device)
    work = schedule(columns, steps, config, programs)
    return Plan(
        config,
        packed,
        dtype == torch.float32,
        min(len(work.units), programs),
        torch.tensor(work.units, dtype=torch.int32, device=device),
        len(work.units),
        torch.tensor(work.reductions, dtype=torch.int32, device=device),
        len(work.reductions),
        work.splits,
        len(work.reductions) * work.splits * config.block_m * config.block_n,
    )


def readable(rows: Tensor) -> bool:
    """True if the kernel can read ``rows`` as they lie: unit last stride and rows aligned to 16 bytes."""
    stride, one = rows.stride()
    return one == 1 and 0 < stride < 1 << 31 and stride * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0


def accumulate_(out: Tensor, rows: Tensor, alpha: float, plan: Plan) -> None:
    """``out += alpha rowsᵀ rows`` on the lower blocks of ``out``, dense or packed; ``rows`` ``[N, C]`` readable."""
    config = plan.config
    tokens, columns = rows.shape
    row_stride = rows.stride(0)
    out_stride = 0 if plan.packed else out.stride(0)
    device = rows.get_device()
    with on_device(device):
        workspace = torch.empty(plan.workspace, device=rows.device) if plan.workspace else out
        left: Tensor | TensorDescriptor = rows
        right: Tensor | TensorDescriptor = rows
        if config.descriptors:
            shape, strides = [tokens, columns], [row_stride, 1]
            left = right = _descriptor(rows, shape, strides, [config.block_k, config.block_m])
            if config.block_n != config.block_m:
                right = _descriptor(rows, shape, strides, [config.block_k, config.block_n])
        aligned = out.data_ptr() % 16
        launch(
            gram_kernel, (config, plan.packed, rows.dtype, device, aligned), (plan.programs, 1, 1),
            left, right, out, workspace, plan.units, alpha, plan.unit_count, tokens, columns, row_stride, out_stride,
            config.block_m, config.block_n, config.block_k, config.descriptors, plan.packed, config.precision,
            plan.float32, config.run if config.in_registers else 0,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if plan.workspace:
            launch(
                reduce_kernel, (config.block_m, config.block_n, plan.packed, device, aligned),
                (plan.reduction_count, config.block_m // _REDUCED_ROWS, 1),
                workspace, out, plan.reductions, plan.splits, columns, out_stride,
                config.block_m, config.block_n, _REDUCED_ROWS, MAX_SPLITS, plan.packed, num_warps=4,
            )  # fmt: skip


def _is_plain(descriptor: Any) -> bool:
    """True if a descriptor is a dataclass of base, shape, strides and block shape, and of others that have defaults."""
    if not dataclasses.is_dataclass(descriptor) or hasattr(descriptor, "__slots__"):
        return False
    names, rest = [field.name for field in dataclasses.fields(descriptor)], dataclasses.fields(descriptor)[4:]
    return names[:4] == ["base", "shape", "strides", "block_shape"] and all(hasattr(descriptor, f.name) for f in rest)


_PLAIN = _is_plain(TensorDescriptor)


def _descriptor(base: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> TensorDescriptor:
    """A descriptor of readable rows.

    The checks of Triton's class take longer than a small product: they are left out where its fields are those known.
    """
    if not _PLAIN:
        return TensorDescriptor(base, shape, strides, block_shape)
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = base, shape, strides, block_shape
    return made


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that programs take several units."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 5
