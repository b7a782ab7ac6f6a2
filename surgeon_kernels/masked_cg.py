"""Conjugate gradients on the entries of a matrix that a mask leaves free, for a sum of Kronecker products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from surgeon_kernels.split_matmul import mm
from surgeon_kernels.triton_support import has_kernels

Terms = Sequence[tuple[Tensor, Tensor]]  # symmetric (L_i [R, R], M_i [C, C]) of the operator Σ_i L_i X M_i


class MaskedCG:
    """Solves ``free ∘ Σ_i L_i X M_i = B`` for ``X`` ``[R, C]``, zero off ``free``, by conjugate gradients.

    The operator, symmetric positive definite, is the principal submatrix of ``Σ_i L_i ⊗ M_i`` on the free entries.
    The preconditioner is its diagonal (Jacobi). One iteration is the product ``Q = Σ_i L_i D M_i`` and::

        c = Σ D∘Q      l = e / c      R ← free ∘ (R - l Q)      e' = Σ S∘R²      X ← X + l D      D ← S∘R + (e'/e) D

    with ``S = 1 / Σ_i diag(L_i) diag(M_i)ᵀ`` (Hestenes and Stiefel, 1952). It lowers ``½⟨X, KX⟩ - ⟨B, X⟩`` by
    ``½ l e``. Inner products are summed in float64, and all scalars stay on the device: iterations follow each other
    without the host. On CUDA, in float32, products are in TF32 and the rest of an iteration is three kernels (see
    :mod:`surgeon_kernels.masked_cg_triton`); everything else is done by PyTorch. The same inputs give the same bits.

    Attributes:
        x: the iterate; residual: ``B - free ∘ K(x)`` as the recursion has it. They belong to this object.
    """

    def __init__(self, terms: Terms, free: Tensor, residual: Tensor) -> None:
        """Begin at ``x = 0``. ``residual`` is ``B``, contiguous and zero off ``free``; it is taken over and changed."""
        self.terms, self.free, self.residual = terms, free.contiguous(), residual
        self.x = torch.zeros_like(residual)
        self.image, self.half = torch.empty_like(residual), torch.empty_like(residual)
        self.row_scales = torch.stack([L.diagonal() for L, _ in terms])  # [terms, R]
        self.column_scales = torch.stack([M.diagonal() for _, M in terms])  # [terms, C]
        self.direction = self._precondition(residual)
        self._energy = _dot(residual, self.direction)
        self._passes = None
        if residual.is_cuda and residual.dtype == torch.float32 and residual.numel() and has_kernels():
            from surgeon_kernels.masked_cg_triton import Passes

            self._passes = Passes(self)

    def run(self, iterations: int) -> list[float]:
        """Iterate; what each iteration lowered the quadratic function by (0 once the residual has vanished)."""
        with tf32():
            if self._passes is None:
                decreases = [self._step() for _ in range(iterations)]
                return torch.stack(decreases).tolist() if decreases else []
            self._passes.begin(iterations, self._energy)
            for k in range(iterations):
                product(self.terms, self.direction, out=self.image, half=self.half)
                self._passes.finish(k)
            self._energy = self._passes.energies[-1]
            return self._passes.decreases.tolist()

    def _step(self) -> Tensor:
        product(self.terms, self.direction, out=self.image, half=self.half)
        curvature = _dot(self.direction, self.image)
        before, usable = self._energy, (self._energy > 0.0) & (curvature > 0.0)
        length = torch.where(usable, before / curvature, 0.0)
        self.residual.addcmul_(length.to(self.x.dtype), self.image, value=-1.0).masked_fill_(~self.free, 0.0)
        self.x.addcmul_(length.to(self.x.dtype), self.direction)
        z = self._precondition(self.residual)
        self._energy = _dot(self.residual, z)
        ratio = torch.where(usable, self._energy / before, 0.0)
        self.direction = z.addcmul_(ratio.to(z.dtype), self.direction)
        return 0.5 * length * before

    def _precondition(self, residual: Tensor) -> Tensor:
        return residual / (self.row_scales.T @ self.column_scales)


def product(terms: Terms, X: Tensor, *, out: Tensor | None = None, half: Tensor | None = None) -> Tensor:
    """``Σ_i L_i X M_i``; ``out`` and ``half`` are room of the shape of ``X``."""
    (L, M), *others = terms
    half = mm(L, X, out=half)
    out = mm(half, M, out=out)
    for L, M in others:
        out.addmm_(torch.mm(L, X, out=half), M)
    return out


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """For a while, products of float32 matrices on CUDA round their operands to TF32 (and sum in float32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dtype=torch.float64)
