"""Inverses of the Cholesky factors of blocks of a few hundred rows on a GPU, a launch for every 32 of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon_kernels.runtime.launch import kind, launch, on_device

# Side of a tile, which one program eliminates in registers, and its warps (estimates).
TILE, _WARPS = 32, 4


@triton.jit
def read_tile(source: tl.tensor, r: tl.tensor, c: tl.tensor, n: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """``source[r, c]``; past ``n`` a unit matrix."""
    r, c = r[:, None], c[None, :]
    unit = (r == c).to(tl.float32)
    return tl.load(source + r * stride + c, mask=(r < n) & (c < n), other=unit)


@triton.jit
def inverse_factor(D: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """``L⁻¹`` of the symmetric ``D = L Lᵀ``, eliminated column by column; NaN or infinite where it has no ``L``."""
    at = tl.arange(0, TILE)
    r, c = at[:, None], at[None, :]
    for k in range(TILE):
        column = tl.sum(tl.where(c == k, D, 0.0), axis=1)
        row = tl.sum(tl.where(r == k, D, 0.0), axis=0)
        scale = 1.0 / tl.sqrt_rn(tl.sum(tl.where(at == k, row, 0.0), axis=0))
        below = tl.where(at > k, column * scale, 0.0)
        across = tl.where(at == k, scale, -row * scale)
        D = tl.where(r == k, across[None, :], tl.where(c == k, 0.0, D) + below[:, None] * across[None, :])
    return tl.where(r >= c, D, 0.0)


@triton.jit(do_not_specialize=["n", "step"])
def eliminate_kernel(
    source: tl.tensor,
    target: tl.tensor,
    n: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    step: tl.tensor,  # the tile that is eliminated
    TILE: tl.constexpr,
) -> None:
    """One lower tile of ``target``: rows of ``L⁻¹`` up to ``step``, below them what is left to be eliminated.

    As in :mod:`surgeon_kernels.linalg.sweep_inverse`, but that rows up to ``step`` are left as they are. Every program
    eliminates the tile of ``step`` for itself.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    if j > i:
        return
    at = tl.arange(0, TILE)
    r, c, k = i * TILE + at, j * TILE + at, step * TILE + at
    W = read_tile(source, r, c, n, source_stride)
    if i >= step:
        high, low = tl.maximum(k[:, None], k[None, :]), tl.minimum(k[:, None], k[None, :])
        unit = (high == low).to(tl.float32)
        D = tl.load(source + high * source_stride + low, mask=high < n, other=unit)
        X = inverse_factor(D, TILE)
        # T_kj before step, W_jkᵀ after it.
        before = j < step
        high, low = tl.where(before, k[:, None], c[None, :]), tl.where(before, c[None, :], k[:, None])
        S = tl.load(source + high * source_stride + low, mask=(k[:, None] < n) & (c[None, :] < n), other=0.0)
        Q = tl.where(j == step, X, -tl.dot(X, S, input_precision="ieee"))
        if i == step:
            W = Q
        else:
            P = tl.dot(read_tile(source, r, k, n, source_stride), tl.trans(X), input_precision="ieee")
            W = tl.where(j == step, 0.0, W) + tl.dot(P, Q, input_precision="ieee")
    tl.store(target + r[:, None] * target_stride + c[None, :], W)


def factor_inverse(M: Tensor) -> Tensor:
    """``L⁻¹`` ``[n, n]``, zeros above the diagonal, of a float32 ``M = L Lᵀ`` on a GPU, read below the diagonal.

    Where ``M`` is not positive definite its diagonal holds NaN or infinity.
    """
    n, device = len(M), M.get_device()
    tiles = -(-n // TILE)
    side = tiles * TILE
    sources, targets = [M], torch.zeros(2, side, side, device=M.device)
    with on_device(device):
        for step in range(tiles):
            source, target = sources[-1], targets[step % 2]
            launch(
                eliminate_kernel, (device, kind(source), kind(source.stride(0)), kind(side)), (tiles, tiles, 1),
                source, target, n, source.stride(0), side, step, TILE, num_warps=_WARPS,
            )  # fmt: skip
            sources.append(target)
    return sources[-1][:n, :n]
