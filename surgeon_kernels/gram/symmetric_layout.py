"""How :class:`surgeon_kernels.gram.symmetric.SymmetricAccumulator` lies in memory: the lower tiles, one after the
other.

Tile ``(i, j)``, ``j <= i``, is the ``TILE x TILE`` block of ``S`` at ``(i TILE, j TILE)``; it is stored whole and
row-major at position ``i (i + 1) / 2 + j`` of the storage ``[tiles, TILE, TILE]``. A smaller ``S`` is stored as
``[n, n]``. In either format values above the diagonal of ``S`` and past ``n`` mean nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from surgeon_kernels.linalg.half_products import addmm_half_

# Side of a tile. The kernels' blocks are multiples of it, so that a block never splits a tile.
TILE = 128
# Smaller matrices are stored whole: half of a few megabytes is not worth a slower update.
PACKED_FROM = 2048
# Rows of tiles that PyTorch multiplies at once on a GPU: a single one is too little for it, and what a panel computes
# above the diagonal is for nothing.
_PANEL = 8


def tiles_per_side(n: int) -> int:
    return -(-n // TILE)


def storage_shape(n: int, packed: bool) -> tuple[int, ...]:
    side = tiles_per_side(n)
    return (side * (side + 1) // 2, TILE, TILE) if packed else (n, n)


def unpack_reference(storage: Tensor, n: int) -> Tensor:
    """The full matrix ``[n, n]`` of a packed storage."""
    side = tiles_per_side(n)
    padded = storage.new_zeros(side, TILE, side, TILE)
    i, j = torch.tril_indices(side, side, device=storage.device)
    padded[i, :, j, :] = storage
    return mirrored(padded.view(side * TILE, side * TILE)[:n, :n])


def mirrored(matrix: Tensor) -> Tensor:
    """A new symmetric matrix with the lower triangle of ``matrix``."""
    lower = matrix.tril()
    return lower + lower.tril(-1).T


def add_gram_reference_(storage: Tensor, rows: Tensor, alpha: float, *, panel: int | None = None) -> None:
    """``S += alpha rowsᵀ rows`` in the packed format, ``panel`` rows of tiles at a time; ``rows`` ``[N, n]``.

    In the storage's dtype; on CUDA devices 16-bit rows are multiplied as they are and summed in float32. Panels are of
    one row on the CPU and of :data:`_PANEL` on a GPU unless said otherwise.
    """
    n = rows.shape[1]
    side = tiles_per_side(n)
    half = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and storage.dtype == torch.float32
    if not half:
        rows = rows.to(storage.dtype)
    if n < side * TILE:
        rows = functional.pad(rows, (0, side * TILE - n))
    panel = panel or (_PANEL if rows.is_cuda else 1)
    for start in range(0, side, panel):
        end = min(start + panel, side)
        left, right = rows[:, start * TILE : end * TILE].T, rows[:, : end * TILE]
        product = storage.new_empty(left.shape[0], right.shape[1])  # [(end - start) TILE, end TILE]
        if half:
            addmm_half_(product, left, right, beta=0.0)
        else:
            torch.mm(left, right, out=product)
        for i, tiles in enumerate(product.split(TILE), start):
            first = i * (i + 1) // 2
            lower = tiles[:, : (i + 1) * TILE].unflatten(1, (i + 1, TILE))
            storage[first : first + i + 1].add_(lower.transpose(0, 1), alpha=alpha)
