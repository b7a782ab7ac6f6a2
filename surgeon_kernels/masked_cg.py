"""Conjugate gradients on the entries of a matrix that a mask leaves free, for a sum of Kronecker products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from surgeon_kernels.kron_product import LARGEST, kron_product
from surgeon_kernels.low_rank import LowRankCorrection
from surgeon_kernels.triton_support import has_kernels

Terms = Sequence[tuple[Tensor, Tensor]]  # symmetric (L_i [R, R], M_i [C, C]) of the operator Σ_i L_i X M_i


def masked_cg(terms: Terms, free: Tensor, residual: Tensor, correction: LowRankCorrection | None = None) -> MaskedCG:
    """The solver for these operands: on CUDA, in float32, :class:`~surgeon_kernels.masked_cg_triton.FusedCG`."""
    on_gpu = residual.is_cuda and residual.dtype == torch.float32 and has_kernels()
    if on_gpu and residual.numel() and max(residual.shape) <= LARGEST:
        from surgeon_kernels.masked_cg_triton import FusedCG

        return FusedCG(terms, free, residual, correction)
    return MaskedCG(terms, free, residual, correction)


class MaskedCG:
    """Solves ``free ∘ Σ_i L_i X M_i = B`` for ``X`` ``[R, C]``, zero off ``free``, by conjugate gradients.

    The operator, symmetric positive definite, is the principal submatrix of ``Σ_i L_i ⊗ M_i`` on the free entries.
    One iteration is the product ``Q = Σ_i L_i D M_i`` and (Hestenes and Stiefel, 1952)::

        c = Σ D∘Q     l = e / c     R ← free ∘ (R - l Q)     Z = S∘R     e' = Σ R∘Z     X ← X + l D     D ← Z + (e'/e) D

    ``S = 1 / Σ_i diag(L_i) diag(M_i)ᵀ``, the preconditioner, is the operator's diagonal (Jacobi). With a
    ``correction`` of an operator of one term, which is that of ``√S∘R``, ``Z`` is ``√S ∘ (√S∘R + correction)``.
    An iteration lowers ``½⟨X, KX⟩ - ⟨B, X⟩`` by ``½ l e``. Inner products are summed in float64, and all scalars stay
    on the device: iterations follow each other without the host. This class calls PyTorch for all of it;
    :func:`masked_cg` chooses what is faster.
    """

    def __init__(
        self, terms: Terms, free: Tensor, residual: Tensor, correction: LowRankCorrection | None = None
    ) -> None:
        """Begin at ``x = 0``. ``residual`` is ``B``, contiguous and zero off ``free``; it is taken over and changed."""
        self._terms, self._free, self._residual, self._correction = terms, free, residual, correction
        self._x = torch.zeros_like(residual)
        row_scales = torch.stack([L.diagonal() for L, _ in terms])  # [terms, R]
        self._diagonal = row_scales.T @ torch.stack([M.diagonal() for _, M in terms])  # 1 / S
        self._direction = self._precondition(residual)
        self._energy = _dot(residual, self._direction)

    @property
    def x(self) -> Tensor:
        """The iterate."""
        return self._x

    @property
    def residual(self) -> Tensor:
        """``B - free ∘ K(x)`` as the recursion has it."""
        return self._residual

    def run(self, iterations: int) -> list[float]:
        """Iterate; what each iteration lowered the quadratic function by (0 once the residual has vanished)."""
        decreases = [self._step() for _ in range(iterations)]
        return torch.stack(decreases).tolist() if decreases else []

    def _step(self) -> Tensor:
        with tf32():
            image = product(self._terms, self._direction)
        curvature = _dot(self._direction, image)
        before, usable = self._energy, (self._energy > 0.0) & (curvature > 0.0)
        length = torch.where(usable, before / curvature, 0.0)
        self._residual.addcmul_(length.to(self._x.dtype), image, value=-1.0).masked_fill_(~self._free, 0.0)
        self._x.addcmul_(length.to(self._x.dtype), self._direction)
        z = self._precondition(self._residual)
        self._energy = _dot(self._residual, z)
        ratio = torch.where(usable, self._energy / before, 0.0)
        self._direction = z.addcmul_(ratio.to(z.dtype), self._direction)
        return 0.5 * length * before

    def _precondition(self, residual: Tensor) -> Tensor:
        if self._correction is None:
            return residual / self._diagonal
        scales = self._diagonal.rsqrt()
        scaled = residual * scales
        left, right, _ = self._correction.factors(scaled)
        return torch.addmm(scaled, left, right.T).mul_(scales).masked_fill_(~self._free, 0.0)


def product(terms: Terms, X: Tensor) -> Tensor:
    """``Σ_i L_i X M_i``."""
    (L, M), *others = terms
    out = kron_product(L, X, M)
    for L, M in others:
        out += kron_product(L, X, M)
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
