"""Inverses from a Cholesky factor, in place and by products of large blocks.

The library's ``cholesky_inverse`` solves two triangular systems against the identity. Here the triangular inverse is
merged from blocks of doubling size and its Gram matrix is taken block by block; both skip known zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.linalg.split_matmul import SPLIT_FROM, mm

# Diagonal blocks that the library inverts, and below the side of the blocks that products are taken in, which bounds
# the workspace and fills a GPU: estimates; `python -m bench.kernels.spd_inverse --tune` times others.
_BASE = 64
_PANEL = 2048


def cholesky_inverse_(L: Tensor, *, base: int = _BASE, panel: int = _PANEL) -> Tensor:
    """``(L Lᵀ)⁻¹``, exactly symmetric, in place of the lower triangular ``L`` ``[n, n]`` (zeros above the diagonal).

    The workspace is at most ``n²`` numbers. The same ``L`` gives the same bits.
    """
    return triangular_gram_(triangular_inverse_(L, base=base, panel=panel), base=base, panel=panel)


def triangular_gram_(X: Tensor, *, base: int = _BASE, panel: int = _PANEL) -> Tensor:
    """``Xᵀ X``, exactly symmetric, in place of the lower triangular ``X`` ``[n, n]`` (zeros above the diagonal)."""
    panel = min(panel, max(base, len(X) // 2 // base * base))  # of half the size, a block and its parts take n²
    # (XᵀX)_ij = Σ_{k >= i} X_kiᵀ X_kj for i >= j: from left to right and downwards, all that is read is still X.
    for j in range(0, len(X), panel):
        for i in range(j, len(X), panel):
            _gram_block_(X, i, j, panel)
    return X


def _gram_block_(X: Tensor, i: int, j: int, panel: int) -> None:
    """Put ``(XᵀX)_ij`` and its transpose in place."""
    block = mm(X[i:, i : i + panel].T, X[i:, j : j + panel])
    if i == j:
        block = block.tril() + block.tril(-1).T
    X[i : i + panel, j : j + panel] = block
    X[j : j + panel, i : i + panel] = block.T


def triangular_inverse_(L: Tensor, *, base: int = _BASE, panel: int = _PANEL) -> Tensor:
    """``L⁻¹`` in place of the lower triangular ``L`` ``[n, n]`` (zeros above the diagonal).

    The inverse of ``[[L₁₁, 0], [L₂₁, L₂₂]]`` is ``[[X₁₁, 0], [-X₂₂ L₂₁ X₁₁, X₂₂]]``, with ``X`` the blocks' inverses.
    """
    n = len(L)
    whole = n // base
    for block in (_blocks(L, base, whole, 0, 0, step=1), L[None, whole * base :, whole * base :]):
        if block.numel():
            eye = torch.eye(block.shape[-1], dtype=L.dtype, device=L.device)
            block.copy_(torch.linalg.solve_triangular(block, eye.expand_as(block), upper=False))
    size = base
    while size < n:
        pairs, end = n // (2 * size), n - n % (2 * size)
        if size < SPLIT_FROM and pairs:
            X11, L21, X22 = (_blocks(L, size, pairs, i, j, step=2) for i, j in ((0, 0), (1, 0), (1, 1)))
            L21.copy_(torch.bmm(X22, torch.bmm(L21, X11)).neg_())
        else:
            for start in range(0, end, 2 * size):
                _merge_(L[start : start + 2 * size, start : start + 2 * size], size, panel)
        if n - end > size:
            _merge_(L[end:, end:], size, panel)
        size *= 2
    return L


def _blocks(L: Tensor, size: int, count: int, i: int, j: int, *, step: int) -> Tensor:
    """Blocks ``(i + step t, j + step t)`` of side ``size``, ``t < count``: a view ``[count, size, size]``."""
    rows, columns = L.stride()
    offset = L.storage_offset() + size * (i * rows + j * columns)
    return L.as_strided((count, size, size), (step * size * (rows + columns), rows, columns), offset)


def _merge_(M: Tensor, size: int, panel: int) -> None:
    """``L₂₁ ← -X₂₂ L₂₁ X₁₁`` within ``M = [[X₁₁, 0], [L₂₁, X₂₂]]``, ``X₁₁`` of side ``size``."""
    X11, L21, X22 = M[:size, :size], M[size:, :size], M[size:, size:]
    T = torch.empty_like(L21)
    for j in range(0, size, panel):
        mm(L21[:, j:], X11[j:, j : j + panel], out=T[:, j : j + panel])
    for i in range(0, len(L21), panel):
        mm(X22[i : i + panel, : i + panel], T[: i + panel], out=L21[i : i + panel], alpha=-1)
