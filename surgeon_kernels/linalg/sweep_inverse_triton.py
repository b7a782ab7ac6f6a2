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
    run: int  # steps that the tensor cores sum by themselves


# That of the Gram kernel's square blocks, but for the run.
CONFIG = SweepConfig(128, 64, 8, 4, 2)


# W's size is specialised: rows that begin at multiples of 16 bytes are read and written so.
@triton.jit(do_not_specialize=["start", "end", "part", "first", "width", "tiles"])
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
    RUN: tl.constexpr,
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
    # The products of parts one after the other, as of six matrices side by side, the smallest first; tensor cores cut
    # what they add, so that sums of the largest are added up in registers.
    steps: tl.constexpr = COLUMNS // STEP
    product = tl.zeros((SIDE, SIDE), tl.float32)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for step in tl.range(0, 6 * steps):
        pair = step // steps  # (2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)
        left = tl.where(pair == 0, 2, ((pair == 1) | (pair == 3)).to(tl.int32))
        right = tl.where(pair == 2, 2, ((pair == 1) | (pair == 4)).to(tl.int32))
        k = step % steps * STEP
        u_left = parts.load([left * part + row, k])
        u_right = parts.load([right * part + column, k])
        product = tl.dot(u_left, tl.trans(u_right), product)
        if (pair == 5) & (step % RUN == RUN - 1):
            total += product
            product = tl.zeros((SIDE, SIDE), tl.float32)
    total += product
    r, c = tl.arange(0, SIDE), tl.arange(0, SIDE)
    at = W + row.to(tl.int64) * stride + column + (r[:, None] * stride + c[None, :])
    present = (r < n - row)[:, None] & (c < n - column)[None, :]
    in_K = ((row >= start) & (row < end)) | ((column >= start) & (column < end))
    kept = tl.load(at, mask=present & (r[:, None] * 0 + in_K.to(tl.int32) == 0), other=0.0)
    tl.store(at, kept + tl.where(column >= end, -1.0, 1.0) * total, mask=present)


@triton.jit(do_not_specialize=["n", "stride", "start", "end", "x_stride", "part"])
def panel_kernel(
    W: tl.tensor,
    X: tl.tensor,  # [end - start, end - start], zero above the diagonal
    parts: tl.tensor,  # [3, part, COLUMNS]
    n: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    x_stride: tl.tensor,
    part: tl.tensor,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """One tile of the bfloat16 parts of ``U``: ``W_>K Xᵀ``, ``-W_K<ᵀ Xᵀ`` or ``Xᵀ``; zero past ``n`` and ``end``."""
    row, column = tl.program_id(0) * SIDE, tl.program_id(1) * SIDE
    r, c = row + tl.arange(0, SIDE), column + tl.arange(0, SIDE)
    size = end - start
    U = tl.zeros((SIDE, SIDE), tl.float32)
    if (row >= start) & (row < end):
        at = c[None, :] * x_stride + (r - start)[:, None]
        U = tl.load(X + at, mask=(c < size)[None, :] & (r < end)[:, None], other=0.0)
    else:
        before = row < start
        for first in tl.range(0, tl.minimum(column + SIDE, size), STEP):
            k = first + tl.arange(0, STEP)
            high = tl.where(before, start + k[None, :], r[:, None]).to(tl.int64)
            low = tl.where(before, r[:, None], start + k[None, :])
            V = tl.load(W + high * stride + low, mask=(r < n)[:, None] & (k < size)[None, :], other=0.0)
            of_X = tl.load(
                X + c[None, :] * x_stride + k[:, None], mask=(c < size)[None, :] & (k < size)[:, None], other=0.0
            )
            U += tl.dot(V, of_X, input_precision="tf32x3")
        U = tl.where(before, -U, U)
    at = parts + r.to(tl.int64)[:, None] * COLUMNS + c[None, :]
    for _ in tl.static_range(3):
        piece = U.to(tl.bfloat16)
        tl.store(at, piece)
        U -= piece.to(tl.float32)
        at += part.to(tl.int64) * COLUMNS


# Tile of U and columns of X that a program multiplies at a time (estimates).
_PANEL, _PANEL_STEP = 64, 32


def panel_parts_(parts: Tensor, W: Tensor, X: Tensor, block: tuple[int, int]) -> None:
    """The parts of ``U`` of a block ``start..end``, ``start`` a multiple of 64, of which ``X = L⁻¹``, in ``parts``."""
    _, rows, columns = parts.shape
    launch(
        panel_kernel, (W.get_device(), kind(W), kind(X), columns), (rows // _PANEL, columns // _PANEL, 1),
        W, X, parts, len(W), W.stride(0), *block, X.stride(0), rows, columns, _PANEL, _PANEL_STEP,
        num_warps=4, num_stages=3,
    )  # fmt: skip


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
    kinds = kind(W), kind(len(W)), kind(W.stride(0))
    launch(
        sweep_kernel, (W.get_device(), *kinds, config, of_next, parts.shape[2]), (programs, 1, 1),
        descriptor, W, len(W), W.stride(0), *swept, rows, first, width, tiles, of_next, parts.shape[2],
        config.side, config.step, config.run, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
