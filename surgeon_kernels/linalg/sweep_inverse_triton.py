"""The sweep of :mod:`surgeon_kernels.linalg.sweep_inverse` on a GPU: a Triton kernel, and two streams."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from surgeon_kernels.runtime.launch import kind, launch


class SweepConfig(NamedTuple):
    """Launch configuration: a program multiplies ``[side, step] x [step, side]`` parts at a time."""

    side: int
    step: int
    warps: int
    stages: int


# Chosen by hand: three parts of two blocks, twice, are 192 KiB of shared memory.
CONFIG = SweepConfig(128, 64, 8, 2)


@triton.jit(do_not_specialize=["n", "stride", "start", "end", "part", "first", "width", "tiles"])
def sweep_kernel(
    parts: tl.tensor,  # tensor descriptor of U's bfloat16 parts [3 part, COLUMNS] in blocks [SIDE, STEP]
    W: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,  # the swept block
    end: tl.tensor,
    part: tl.tensor,  # rows of one part
    first: tl.tensor,  # tile and number of tiles of the next block
    width: tl.tensor,
    tiles: tl.tensor,  # of a side of W
    NEXT: tl.constexpr,  # update the next block's tiles alone, or all others
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """One tile of ``W_ij ← [i, j not in K] W_ij ± U_i U_jᵀ``."""
    unit = tl.program_id(0)
    if NEXT:
        across, along = unit % width + first, unit // width
        i, j = tl.maximum(across, along), tl.minimum(across, along)
        if (along < first + width) & (along >= first) & (along < across):
            return  # of the next block's own tiles, those above the diagonal are others over again
    else:
        i = ((tl.sqrt(8.0 * unit.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > unit, i - 1, i)
        i = tl.where((i + 1) * (i + 2) // 2 <= unit, i + 1, i)
        j = unit - i * (i + 1) // 2
        i = tl.where(i >= first, i + width, i)
        j = tl.where(j >= first, j + width, j)
    row, column = i * SIDE, j * SIDE
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for step in tl.range(0, COLUMNS // STEP):
        k = step * STEP
        a0, b0 = parts.load([row, k]), parts.load([column, k])
        a1, b1 = parts.load([part + row, k]), parts.load([part + column, k])
        a2, b2 = parts.load([2 * part + row, k]), parts.load([2 * part + column, k])
        # Tensor cores cut what they add: the smallest first, and every step's sum added by itself.
        product = tl.dot(a2, tl.trans(b0))
        product = tl.dot(a1, tl.trans(b1), product)
        product = tl.dot(a0, tl.trans(b2), product)
        product = tl.dot(a1, tl.trans(b0), product)
        product = tl.dot(a0, tl.trans(b1), product)
        total += tl.dot(a0, tl.trans(b0), product)
    r, c = tl.arange(0, SIDE), tl.arange(0, SIDE)
    at = W + row.to(tl.int64) * stride + column + (r[:, None] * stride + c[None, :])
    present = (r < n - row)[:, None] & (c < n - column)[None, :]
    in_K = ((row >= start) & (row < end)) | ((column >= start) & (column < end))
    kept = tl.load(at, mask=present & (r[:, None] * 0 + in_K.to(tl.int32) == 0), other=0.0)
    tl.store(at, kept + tl.where(column >= end, -1.0, 1.0) * total, mask=present)


def sweep_(
    parts: Tensor,
    W: Tensor,
    swept: tuple[int, int],
    following: tuple[int, int],
    config: SweepConfig,
    *,
    of_next: bool,
) -> None:
    """Sweep the block ``swept`` of ``W``: tiles of the next block, in the rows or columns of ``following`` (its first
    tile and the number of its tiles), or all others. ``parts`` ``[3, rows, columns]``: of ``U``, zero past ``n``.
    """
    (first, width), rows = following, parts.shape[1]
    tiles = rows // config.side
    others = tiles - width
    programs = tiles * width if of_next else others * (others + 1) // 2
    if programs == 0:
        return
    descriptor = TensorDescriptor.from_tensor(parts.view(3 * rows, -1), [config.side, config.step])
    launch(
        sweep_kernel, (W.get_device(), kind(W), config, of_next, parts.shape[2]), (programs, 1, 1),
        descriptor, W, len(W), W.stride(0), *swept, rows, first, width, tiles, of_next, parts.shape[2],
        config.side, config.step, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
