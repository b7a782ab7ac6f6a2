"""A symmetric accumulator that keeps its lower triangle only, in square tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from surgeon_kernels.triton_support import has_kernels

# Side of a tile. The kernels' blocks are multiples of it, so that a block never splits a tile.
TILE = 128
# Smaller matrices are stored whole: half of a few megabytes is not worth a slower update.
PACKED_FROM = 2048


class SymmetricAccumulator:
    """A symmetric matrix ``S`` ``[n, n]`` of which, from ``n = 2048`` on, only the lower tiles exist in memory.

    Tile ``(i, j)``, ``j <= i``, is the ``TILE x TILE`` block of ``S`` at ``(i TILE, j TILE)``; it is stored whole and
    row-major at position ``i (i + 1) / 2 + j`` of the storage ``[tiles, TILE, TILE]``. A smaller ``S`` is stored as
    ``[n, n]``. In either format values above the diagonal of ``S`` and past ``n`` mean nothing. Only this class and
    the kernels that fill it know the format; everyone else reads :meth:`full` and :meth:`diagonal`.
    """

    def __init__(self, n: int, storage: Tensor) -> None:
        self.n = n
        self.storage = storage
        i = torch.arange(tiles_per_side(n), device=storage.device)
        self._diagonal_tiles = i * (i + 3) // 2

    @classmethod
    def zeros(
        cls,
        n: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        packed: bool | None = None,
    ) -> SymmetricAccumulator:
        """``S = 0``; ``packed`` overrides the choice of the format by size."""
        return cls(
            n, torch.zeros(_shape(n, n >= PACKED_FROM if packed is None else packed), dtype=dtype, device=device)
        )

    @classmethod
    def of(cls, matrix: Tensor) -> SymmetricAccumulator:
        """The symmetric ``matrix`` ``[n, n]``, in the format by its size."""
        n = len(matrix)
        if n < PACKED_FROM:
            return cls(n, matrix.clone(memory_format=torch.contiguous_format))
        side = tiles_per_side(n)
        rest = side * TILE - n
        padded = functional.pad(matrix, (0, rest, 0, rest)) if rest else matrix
        i, j = torch.tril_indices(side, side, device=matrix.device)
        # On a GPU the result of indexing need not lie in memory as it is indexed.
        return cls(n, padded.reshape(side, TILE, side, TILE)[i, :, j, :].contiguous())

    @staticmethod
    def elements(n: int) -> int:
        """Numbers stored for an ``n x n`` matrix."""
        return math.prod(_shape(n, n >= PACKED_FROM))

    @property
    def packed(self) -> bool:
        return self.storage.dim() == 3

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
        return f"SymmetricAccumulator(n={self.n}, dtype={self.dtype}, device={self.device}, packed={self.packed})"

    def diagonal(self) -> Tensor:
        """``diag(S)``, a new tensor ``[n]``."""
        if not self.packed:
            return self.storage.diagonal().clone()
        return self.storage.diagonal(dim1=1, dim2=2)[self._diagonal_tiles].flatten()[: self.n]

    def full(self) -> Tensor:
        """``S`` as a new tensor ``[n, n]``, exactly symmetric."""
        if not self.packed:
            return _mirrored(self.storage)
        if self.storage.is_cuda and self.dtype == torch.float32 and has_kernels():
            from surgeon_kernels.symmetric_triton import unpack

            return unpack(self.storage, self.n)
        return unpack_reference(self.storage, self.n)


def tiles_per_side(n: int) -> int:
    return -(-n // TILE)


def _shape(n: int, packed: bool) -> tuple[int, ...]:
    side = tiles_per_side(n)
    return (side * (side + 1) // 2, TILE, TILE) if packed else (n, n)


def unpack_reference(storage: Tensor, n: int) -> Tensor:
    side = tiles_per_side(n)
    padded = storage.new_zeros(side, TILE, side, TILE)
    i, j = torch.tril_indices(side, side, device=storage.device)
    padded[i, :, j, :] = storage
    return _mirrored(padded.view(side * TILE, side * TILE)[:n, :n])


def _mirrored(matrix: Tensor) -> Tensor:
    """A new symmetric matrix with the lower triangle of ``matrix``."""
    lower = matrix.tril()
    return lower + lower.tril(-1).T


def add_gram_reference_(storage: Tensor, rows: Tensor, alpha: float) -> None:
    """``S += alpha rowsᵀ rows`` in the packed format and its dtype, a row of tiles at a time; ``rows`` ``[N, n]``."""
    side = tiles_per_side(rows.shape[1])
    rows = functional.pad(rows.to(storage.dtype), (0, side * TILE - rows.shape[1]))
    first = 0
    for i in range(side):
        end = (i + 1) * TILE
        product = rows[:, i * TILE : end].T @ rows[:, :end]  # [TILE, (i + 1) TILE]
        storage[first : first + i + 1].add_(product.view(TILE, i + 1, TILE).transpose(0, 1), alpha=alpha)
        first += i + 1
