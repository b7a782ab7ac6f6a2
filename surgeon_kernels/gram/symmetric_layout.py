"""Memory layout of :class:`surgeon_kernels.gram.symmetric.SymmetricAccumulator`: its lower tiles, one after the other.

Tile ``(i, j)``, ``j <= i``, is the ``TILE x TILE`` block of ``S`` at ``(i TILE, j TILE)``; it is stored whole and
row-major at position ``i (i + 1) / 2 + j`` of the storage ``[tiles, TILE, TILE]``. A smaller ``S`` is stored as
``[n, n]``. In either format values above the diagonal of ``S`` and past ``n`` mean nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Side of a tile. The kernels' blocks are multiples of it, so that a block never splits a tile.
TILE = 128
# Smaller matrices are stored whole (an estimate): half of a few megabytes is not worth a slower update.
PACKED_FROM = 2048


def tiles_per_side(n: int) -> int:
    return -(-n // TILE)


def storage_shape(n: int, packed: bool) -> tuple[int, ...]:
    """Shape of the storage of an ``n x n`` matrix: ``[tiles, TILE, TILE]``, or ``[n, n]``."""
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
