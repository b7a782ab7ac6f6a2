"""The kernel of many small Gram matrices: the blocks of all of them are programs of one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon_kernels.runtime.launch import launch, on_device

# Products of one launch, whose pointers are the kernel's arguments: a table of them would have to be copied to the
# device. With fewer, the rest stand for the first.
CAPACITY = 16
# Side of a block, steps of tokens, warps and stages, chosen by hand (`python -m bench.kernels.gram --tune` times
# others): several programs share a multiprocessor, so that some multiply while others add to their output.
CONFIG = (64, 64, 4, 3)
# Steps that the tensor cores sum by themselves, see surgeon_kernels/gram/plan.py: so few that even cuBLAS's sums of
# unaligned rows are no more exact. Those of narrower matrices than the least are: their sums are split.
RUN, LEAST_COLUMNS = 4, 192


@triton.jit
def pick(pointers: tl.tuple, index: tl.tensor) -> tl.tensor:
    """``pointers[index]``."""
    picked = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        picked = tl.where(index == i, pointers[i], picked)
    return tl.multiple_of(picked, 16)


@triton.jit(do_not_specialize=["tokens"])
def gram_group_kernel(
    xs: tl.tuple,  # of every product x [tokens, columns], rows aligned to 16 bytes
    outs: tl.tuple,  # [columns (+ 1), columns (+ 1)], float32, of which the lower blocks are added to
    one: tl.tensor,  # [1, 0, ...], BLOCK numbers of x's dtype
    units: tl.tensor,  # int32 [programs, 6]: product, row or -1 for the ones, column, columns, strides of x and out
    alpha: tl.tensor,
    tokens: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
) -> None:
    """One block of one product: ``out += alpha xᵀ x``, or a piece of the last row ``alpha Σ_t [x_t, 1]``."""
    unit = units + tl.program_id(0) * 6
    index, row, column = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2)
    columns, x_stride, out_stride = tl.load(unit + 3), tl.load(unit + 4) * 8, tl.load(unit + 5)
    x, out = pick(xs, index), pick(outs, index)
    c = column * BLOCK + tl.arange(0, BLOCK)
    of_ones = row < 0
    r = tl.where(of_ones, 0, row * BLOCK) + tl.arange(0, BLOCK)
    # The ones multiply as a matrix whose first column they are: one row of memory, read again and again.
    left = tl.multiple_of(tl.where(of_ones, one, x), 16)
    left_stride = tl.multiple_of(tl.where(of_ones, 0, x_stride), 8)
    left_columns = tl.where(of_ones, 1, columns)
    t = tl.arange(0, BLOCK_K)
    # Read in aligned pieces of 16 bytes: the rest of the last column's piece is read as well.
    at_left = left + t.to(tl.int64)[:, None] * left_stride + r[None, :]
    at_right = x + t.to(tl.int64)[:, None] * x_stride + c[None, :]
    at_left = tl.max_contiguous(tl.multiple_of(at_left, [1, 16]), [1, 8])
    at_right = tl.max_contiguous(tl.multiple_of(at_right, [1, 16]), [1, 8])
    in_left, in_right = (r < left_columns)[None, :], (c < columns)[None, :]
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in tl.range(0, tl.cdiv(tokens, BLOCK_K)):
        real = (t < tokens - step * BLOCK_K)[:, None]
        x_left = tl.load(at_left, mask=tl.max_constancy(real & in_left, [1, 8]), other=0.0)
        x_right = tl.load(at_right, mask=tl.max_constancy(real & in_right, [1, 8]), other=0.0)
        product = tl.dot(tl.trans(x_left), x_right, product)
        at_left += BLOCK_K * left_stride
        at_right += BLOCK_K * x_stride
        if step % RUN == RUN - 1:
            total += product
            product = tl.zeros((BLOCK, BLOCK), tl.float32)
    total += product
    if of_ones:
        r += columns
        total += tl.where(c == columns, tokens.to(tl.float32), 0.0)[None, :]
    at = out + (r[:, None] * out_stride + c[None, :])
    n = columns + of_ones.to(tl.int32)
    present = (r < n)[:, None] & (c < n)[None, :]
    tl.store(at, tl.load(at, mask=present, other=0.0) + alpha * total, mask=present)


def fits(out: Tensor, rows: Tensor) -> bool:
    """True if the kernel takes ``rows`` ``[N, C]``, which begin at multiples of 16 bytes, and a dense ``out``."""
    if rows.shape[1] < LEAST_COLUMNS:
        return False
    small = out.stride(0) * out.shape[0] < 1 << 31 and rows.stride(0) < 1 << 31
    return small and out.dtype == torch.float32 and out.stride(-1) == 1 and out.data_ptr() % 16 == 0


def accumulate_(
    outs: Sequence[Tensor],
    xs: Sequence[Tensor],
    ones_columns: Sequence[bool],
    alpha: float,
    config: tuple[int, int, int, int] = CONFIG,
) -> None:
    """``out += alpha x̃ᵀ x̃`` on the lower blocks of every ``out``, at most :data:`CAPACITY` of them.

    ``x̃`` is ``x`` ``[N, C]``, or that with a column of ones; all of one dtype of 16 bits, with as many rows.
    """
    block, block_k, warps, stages = config
    tokens, device = len(xs[0]), xs[0].get_device()
    sizes = tuple(
        (x.shape[1], x.stride(0), out.stride(0), ones) for x, out, ones in zip(xs, outs, ones_columns, strict=True)
    )
    units = _planned(sizes, block, xs[0].device)
    rest = CAPACITY - len(xs)
    with on_device(device):
        launch(
            gram_group_kernel, (xs[0].dtype, device, config), (len(units), 1, 1),
            (*xs, *[xs[0]] * rest), (*outs, *[outs[0]] * rest), _one(block, xs[0].dtype, xs[0].device), units, alpha,
            tokens, block, block_k, RUN, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _planned(sizes: tuple[tuple[int, int, int, bool], ...], block: int, device: torch.device) -> Tensor:
    units = _units(sizes, block, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[id(units)] = units  # the graph reads it as long as it is replayed
    return units


_captured: dict[int, Tensor] = {}


@functools.lru_cache(maxsize=1024)
def _units(sizes: tuple[tuple[int, int, int, bool], ...], block: int, device: torch.device) -> Tensor:
    """What every program computes; ``sizes``: columns, strides of ``x`` and of ``out``, and if there are ones."""
    units = []
    for index, (columns, x_stride, out_stride, ones) in enumerate(sizes):
        side = -(-columns // block)
        blocks = [(row, column) for row in range(side) for column in range(row + 1)]
        blocks += [(-1, column) for column in range(-(-(columns + 1) // block))] if ones else []
        units += [(index, row, column, columns, x_stride // 8, out_stride) for row, column in blocks]
    return torch.tensor(units, dtype=torch.int32, device=device)


@functools.cache
def _one(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    one = torch.zeros(size, dtype=dtype, device=device)
    one[0] = 1.0
    return one
