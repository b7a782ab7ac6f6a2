"""A symmetric accumulator that keeps its lower triangle only, in square tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from surgeon_kernels.gram.symmetric_layout import (
    PACKED_FROM,
    TILE,
    mirrored,
    storage_shape,
    tiles_per_side,
    unpack_reference,
)
from surgeon_kernels.runtime.checks import check_square
from surgeon_kernels.runtime.triton_support import has_kernels


class SymmetricAccumulator:
    """A symmetric matrix ``S`` ``[n, n]`` of which, from ``n = 2048`` on, only the lower tiles exist in memory.

    Only this class and the kernels that fill it know the format (:mod:`surgeon_kernels.gram.symmetric_layout`);
    everyone else reads :meth:`full` and :meth:`diagonal`.
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
        """``S = 0``; ``packed`` overrides the choice of the format by size.

        Raises:
            ValueError: ``n`` is negative.
        """
        if n < 0:
            raise ValueError(f"a matrix cannot have {n} rows")
        return cls(
            n, torch.zeros(storage_shape(n, n >= PACKED_FROM if packed is None else packed), dtype=dtype, device=device)
        )

    @classmethod
    def of(cls, matrix: Tensor) -> SymmetricAccumulator:
        """The symmetric ``matrix`` ``[n, n]``, in the format by its size.

        Raises:
            ValueError: it is not square; TypeError: not floating point.
        """
        check_square(matrix)
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
        return math.prod(storage_shape(n, n >= PACKED_FROM))

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
            return mirrored(self.storage)
        if self.storage.is_cuda and self.dtype == torch.float32 and has_kernels():
            from surgeon_kernels.gram.symmetric_triton import unpack

            return unpack(self.storage, self.n)
        return unpack_reference(self.storage, self.n)
