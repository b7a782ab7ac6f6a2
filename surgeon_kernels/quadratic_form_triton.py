"""The kernel of ``diag(X S Xᵀ)``: tiles of ``X S`` below the diagonal, multiplied by X and summed where they are made.

With S in square blocks, ``x S xᵀ = Σ_J (2 Σ_{K > J} x_K S_KJ + x_J S_JJ) x_Jᵀ``: a program takes one block column J for
some rows, so that no block above the diagonal is read, and no tile of ``X S`` leaves it.
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


# Chosen by `bench/quadratic_form.py --tune` on an H200.
CONFIG = Config(128, 256, 32, 8, 4)
# Row blocks of programs that run at the same time: they share the blocks of S, which is read from L2.
_BAND = 8


# Sizes are not specialised: every model would compile its own kernels.
@triton.jit(do_not_specialize=["rows", "columns"])
def quadratic_form_kernel(
    x,  # tensor descriptor of X [rows, columns] in blocks [BLOCK_R, BLOCK_K]
    x_wide,  # the same in blocks of BLOCK_C columns
    s,  # tensor descriptor of S [columns, columns] in blocks [BLOCK_C, BLOCK_K]
    partial,  # [columns / BLOCK_C, rows]: the sums of every block column
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    row_blocks = tl.cdiv(rows, BLOCK_R)
    column_blocks = tl.cdiv(columns, BLOCK_C)
    # Bands of row blocks; in each the longest sums first, so that the last programs are short ones.
    per_band = BAND * column_blocks
    band = tl.program_id(0) // per_band
    height = min(row_blocks - band * BAND, BAND)
    place = tl.program_id(0) % per_band
    row = (band * BAND + place % height) * BLOCK_R
    block = place // height
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
    r = row + tl.arange(0, BLOCK_R)
    tl.store(partial + block.to(tl.int64) * rows + r, tl.sum(product * x_block, axis=1), mask=r < rows)


def launch(x: Tensor, S: Tensor, config: Config = CONFIG) -> Tensor:
    """``diag(X S Xᵀ)`` of float32 operands; what TMA cannot address, and X whose columns are adjacent, is copied."""
    R, C = x.shape
    x, S = _addressable(x), _addressable(S)
    column_blocks = triton.cdiv(C, config.block_c)
    partial = torch.empty(column_blocks, R, device=x.device)
    with torch.cuda.device_of(x):
        quadratic_form_kernel[(triton.cdiv(R, config.block_r) * column_blocks,)](
            _descriptor(x, config.block_r, config.block_k),
            _descriptor(x, config.block_r, config.block_c),
            _descriptor(S, config.block_c, config.block_k),
            partial, R, C,
            BLOCK_R=config.block_r, BLOCK_C=config.block_c, BLOCK_K=config.block_k, BAND=_BAND,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return partial.sum(dim=0)


def _addressable(matrix: Tensor) -> Tensor:
    """The matrix, or a copy: TMA needs unit last stride, and addresses and rows aligned to 16 bytes."""
    if matrix.stride(1) == 1 and matrix.stride(0) % 4 == 0 and matrix.stride(0) > 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    rows, columns = matrix.shape
    return matrix.new_empty(rows, triton.cdiv(columns, 4) * 4)[:, :columns].copy_(matrix)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
