"""The kernel of ``diag(X S Xᵀ)``: tiles of ``X S`` above the diagonal, multiplied by X and summed where they are made.

With S in square blocks, ``x S xᵀ = Σ_J (2 Σ_{K > J} x_K S_KJ + x_J S_JJ) x_Jᵀ``: a program takes one block column J for
some rows, so that half of S is not read, and no tile of ``X S`` leaves it.

Tensor cores cut float32 operands to the 10 bits of mantissa of TF32, which alone would make all sums too small. So S is
rounded to TF32 in a copy, and of ``x = cut(x) + ε`` the left factor ``cut(x)`` meets ``x + ε`` on the right: what the
one lacks the other has too much. On the diagonal, S being symmetric, it is ``(x - ε) S (x + ε)ᵀ = x S xᵀ - ε S εᵀ``;
in the others ``x_K S_KJ ε_Jᵀ - ε_K S_KJ x_Jᵀ`` is left, whose parts are equal in the mean: errors have no common sign.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Config(NamedTuple):
    """Launch configuration: ``[block_r, block_k] x [block_k, block_c]`` at a time."""

    block_r: int
    block_c: int
    block_k: int
    warps: int
    stages: int


# The fastest of `python -m bench.kernels.quadratic_form --tune` on an H200.
CONFIG = Config(128, 256, 32, 8, 4)
# Row blocks of programs that run at the same time (an estimate): they share the blocks of S, which is read from L2.
_BAND = 8
# X that TMA cannot address is copied in strips of so many bytes, or of one band of rows: some waves of programs each
# (estimates, as is the side of the tile that one program copies).
_STRIP_BYTES = 64 << 20
_COPIED_BLOCK = 64


# Sizes are not specialised: every model would compile its own kernels.
@triton.jit(do_not_specialize=["rows", "columns"])
def quadratic_form_kernel(
    x: tl.tensor_descriptor,  # X [rows, columns] in blocks [BLOCK_R, BLOCK_K]
    x_wide: tl.tensor_descriptor,  # the same in blocks of BLOCK_C columns
    s: tl.tensor_descriptor,  # S [columns, columns] in blocks [BLOCK_C, BLOCK_K]; read from the diagonal blocks on
    partial: tl.tensor,  # [columns / BLOCK_C, partial_stride]: the sums of every block column
    partial_stride: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """Part of a block column of S in the sums of ``BLOCK_R`` rows, to a row of ``partial``."""
    row_blocks = tl.cdiv(rows, BLOCK_R)
    column_blocks = tl.cdiv(columns, BLOCK_C)
    # Bands of row blocks; in each the longest sums first, so that the last programs are short ones.
    per_band = BAND * column_blocks
    band = tl.program_id(0) // per_band
    height = min(row_blocks - band * BAND, BAND)
    in_band = tl.program_id(0) % per_band
    row = (band * BAND + in_band % height) * BLOCK_R
    block = in_band // height
    column = block * BLOCK_C

    product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for k in tl.range(column + BLOCK_C, columns, BLOCK_K):
        x_k = x.load([row, k])
        product = tl.dot(x_k, tl.trans(s.load([column, k])), product, input_precision="tf32")
    product *= 2.0
    for k in tl.range(column, min(column + BLOCK_C, columns), BLOCK_K):
        x_k = x.load([row, k])
        product = tl.dot(x_k, tl.trans(s.load([column, k])), product, input_precision="tf32")
    x_block = x_wide.load([row, column])
    cut = (x_block.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    r = row + tl.arange(0, BLOCK_R)
    sums = tl.sum(product * (2.0 * x_block - cut), axis=1)
    tl.store(partial + block.to(tl.int64) * partial_stride + r, sums, mask=r < rows)


@triton.jit
def copy_kernel(
    source: tl.tensor,
    target: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    target_stride: tl.tensor,
    BLOCK: tl.constexpr,
    DIAGONAL: tl.constexpr,  # None, or only blocks of so many rows and columns on and above the diagonal, to TF32
) -> None:
    """One tile of ``target = source``; with DIAGONAL rounded to TF32, where it lies on or above the diagonal blocks."""
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    first = 0 if DIAGONAL is None else row // DIAGONAL * DIAGONAL
    if column + BLOCK > first:
        r = (row + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
        c = (column + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
        inside = (r < rows) & (c < columns)
        value = tl.load(source + r * row_stride + c * column_stride, mask=inside)
        if DIAGONAL is not None:
            nearest = ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            value = tl.where(value == value, nearest, value)
        tl.store(target + r * target_stride + c, value, mask=inside)


def launch(x: Tensor, S: Tensor, config: Config = CONFIG) -> Tensor:
    """``diag(X S Xᵀ)`` of float32 operands. Half of S is copied, and X in strips where TMA cannot address it."""
    R, C = x.shape
    column_blocks = triton.cdiv(C, config.block_c)
    partial = torch.empty(column_blocks, R, device=x.device)
    strip = R if _addressable(x) else config.block_r * _BAND * max(1, _STRIP_BYTES // (4 * C * config.block_r * _BAND))
    with torch.cuda.device_of(x):
        rounded = _copy(S, diagonal=config.block_c)
        for start in range(0, R, strip):
            part = x[start : start + strip]
            part = part if _addressable(x) else _copy(part)
            quadratic_form_kernel[(triton.cdiv(len(part), config.block_r) * column_blocks,)](
                _descriptor(part, config.block_r, config.block_k),
                _descriptor(part, config.block_r, config.block_c),
                _descriptor(rounded, config.block_c, config.block_k),
                partial[:, start:], R, len(part), C,
                BLOCK_R=config.block_r, BLOCK_C=config.block_c, BLOCK_K=config.block_k, BAND=_BAND,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
    return partial.sum(dim=0)


def _addressable(matrix: Tensor) -> bool:
    """TMA needs unit last stride, and addresses and rows aligned to 16 bytes."""
    return matrix.stride(1) == 1 and matrix.stride(0) % 4 == 0 and matrix.stride(0) > 0 and matrix.data_ptr() % 16 == 0


def _copy(matrix: Tensor, diagonal: int | None = None) -> Tensor:
    """An addressable copy; with ``diagonal``, rounded to TF32, of the blocks of that size on and above the diagonal."""
    rows, columns = matrix.shape
    target = matrix.new_empty(rows, triton.cdiv(columns, 4) * 4)[:, :columns]
    copy_kernel[(triton.cdiv(rows, _COPIED_BLOCK), triton.cdiv(columns, _COPIED_BLOCK))](
        matrix, target, rows, columns, *matrix.stride(), target.stride(0), BLOCK=_COPIED_BLOCK, DIAGONAL=diagonal
    )
    return target


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
