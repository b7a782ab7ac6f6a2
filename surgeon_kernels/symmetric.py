"""A symmetric accumulator that keeps its lower triangle only, in square tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.triton_support import has_kernels

# Side of a tile. The kernels' blocks are multiples of it, so that a block never splits a tile.
TILE = 128


class SymmetricAccumulator:
    """A symmetric matrix ``S`` ``[n, n]`` of which only the lower tiles exist in memory.

    Tile ``(i, j)``, ``j <= i``, is the ``TILE x TILE`` block of ``S`` at ``(i TILE, j TILE)``; it is stored whole and
    row-major at position ``i (i + 1) / 2 + j`` of the storage ``[tiles, TILE, TILE]``. Values past ``n`` and those
    above the diagonal of a diagonal tile mean nothing. Only this class and the kernels that fill it know the format;
    everyone else reads :meth:`full` and :meth:`diagonal`.
    """

    def __init__(self, n: int, storage: Tensor) -> None:
        self.n = n
        self.storage = storage
        i = torch.arange(tiles_per_side(n), device=storage.device)
        self._diagonal_tiles = i * (i + 3) // 2

    @classmethod
    def zeros(
        cls, n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> SymmetricAccumulator:
        side = tiles_per_side(n)
        return cls(n, torch.zeros(side * (side + 1) // 2, TILE, TILE, dtype=dtype, device=device))

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def __repr__(self) -> str:
        return f"SymmetricAccumulator(n={self.n}, dtype={self.dtype}, device={self.device})"

    def diagonal(self) -> Tensor:
        """``diag(S)``, a new tensor ``[n]``."""
        return self.storage.diagonal(dim1=1, dim2=2)[self._diagonal_tiles].flatten()[: self.n]

    def full(self) -> Tensor:
        """``S`` as a new, exactly symmetric tensor ``[n, n]``."""
        if self.storage.is_cuda and self.dtype == torch.float32 and has_kernels():
            from surgeon_kernels.symmetric_triton import unpack

            return unpack(self.storage, self.n)
        return unpack_reference(self.storage, self.n)

    def add_gram_reference_(self, rows: Tensor, alpha: float) -> None:
        """``S += alpha rowsᵀ rows``, lower tiles only, in ``S``'s dtype; ``rows`` is ``[N, n]``."""
        rows = rows.to(self.dtype)
        first = 0
        for i, start in enumerate(range(0, self.n, TILE)):
            end = min(start + TILE, self.n)
            product = rows[:, start:end].T @ rows[:, :end]  # [<= TILE, end]
            for j in range(i + 1):
                block = product[:, j * TILE : (j + 1) * TILE]
                self.storage[first + j, : block.shape[0], : block.shape[1]].add_(block, alpha=alpha)
            first += i + 1


def tiles_per_side(n: int) -> int:
    return -(-n // TILE)


def unpack_reference(storage: Tensor, n: int) -> Tensor:
    side = tiles_per_side(n)
    padded = storage.new_zeros(side, TILE, side, TILE)
    i, j = torch.tril_indices(side, side, device=storage.device)
    padded[i, :, j, :] = storage
    lower = padded.view(side * TILE, side * TILE)[:n, :n].tril()
    return lower + lower.tril(-1).T
