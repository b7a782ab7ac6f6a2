"""Conjugate gradients on the entries of a matrix that a mask leaves free, for a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon_kernels.linalg.half_products import float32_sums, padded
from surgeon_kernels.linalg.kron_product import LARGEST, kron_product, mm_half, scaled, scaled_parts
from surgeon_kernels.linalg.low_rank import LowRankCorrection
from surgeon_kernels.runtime.triton_support import has_kernels

Terms = Sequence[tuple[Tensor, Tensor]]  # symmetric (L_i [R, R], M_i [C, C]) of the operator Σ_i L_i X M_i


def masked_cg(terms: Terms, free: Tensor, residual: Tensor, correction: LowRankCorrection | None = None) -> MaskedCG:
    """The solver for these operands: on CUDA, in float32, :class:`FusedCG` (sides up to 65504), else the reference."""
    on_gpu = residual.is_cuda and residual.dtype == torch.float32 and has_kernels()
    if on_gpu and residual.numel() and max(residual.shape) <= LARGEST:
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
    on the device: iterations follow each other without the host. This class calls PyTorch for all of it, with
    products in the accuracy that :func:`~surgeon_kernels.linalg.kron_product.kron_product` has.
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
        """Iterate; decreases of the quadratic function, one an iteration (0 once the residual has vanished)."""
        decreases = [self._step() for _ in range(iterations)]
        return torch.stack(decreases).tolist() if decreases else []

    def _step(self) -> Tensor:
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


class FusedCG(MaskedCG):
    """:class:`MaskedCG` by the kernels of :mod:`surgeon_kernels.linalg.masked_cg_triton`; the same inputs give the same
    bits.

    The operator of one product is scaled to a unit diagonal, ``L̂ = L / √(diag L diag Lᵀ)``, and with it ``R``, ``X``
    and ``D``, so that ``S = 1``. Then the product's operands, ``D`` among them, are in float16, which rounds as TF32
    does in half of the time (see :mod:`surgeon_kernels.linalg.kron_product`): kept is ``D / b`` with ``b >= max |D|``.
    For them sides are padded by zeros to multiples of 8. Of several products the diagonals have no such scaling;
    ``D / b`` is in float32, and each product scales for itself.
    """

    operands = torch.float16  # of the product, where it is one

    def __init__(
        self,
        terms: Terms,
        free: Tensor,
        residual: Tensor,
        correction: LowRankCorrection | None = None,
        **launches: int,
    ) -> None:
        """``launches``: the options of :class:`~surgeon_kernels.linalg.masked_cg_triton.Passes`."""
        from surgeon_kernels.linalg.masked_cg_triton import Passes

        residual = residual.contiguous()
        self._terms, self._correction, self._shape = terms, correction, residual.shape
        row_scales = torch.stack([L.diagonal() for L, _ in terms])  # [terms, R]
        column_scales = torch.stack([M.diagonal() for _, M in terms])  # [terms, C]
        if len(terms) == 1:
            (L, M), g, a = terms[0], row_scales[0].rsqrt(), column_scales[0].rsqrt()
            self._scaled = padded(scaled_parts(L, g, g, 1)[0]), padded(scaled_parts(M, a, a, 1)[0])
            row_scales, column_scales = g, a  # of X; R has their inverses'
            z = scaled(residual, g, a, out=residual)
            if correction is not None:
                left, right, _ = correction.factors(residual)
                z = torch.addmm(residual, left, right.T).masked_fill_(~free, 0.0)
            residual, z, free = padded(residual), padded(z), padded(free)
        else:
            z = residual / (row_scales.T @ column_scales)
        self._residual, self._x, self._free = residual, torch.zeros_like(residual), free.contiguous().view(torch.uint8)
        self._passes = Passes(residual.shape, len(terms), residual.device, **launches)
        self._scales = row_scales, column_scales
        dtype = self.operands if len(terms) == 1 else residual.dtype
        energy, bound = (residual * z).sum(dtype=torch.float64), torch.linalg.vector_norm(z, torch.inf)
        self._energies, self._bounds = energy[None], bound.double()[None]
        self._direction = torch.empty_like(z, dtype=dtype)
        torch.mul(z, 1 / bound.clamp_min(torch.finfo(z.dtype).tiny), out=self._direction)
        self._half = torch.empty_like(self._direction)
        self._image = torch.empty_like(residual) if correction is None else z  # which is needed no more

    @property
    def x(self) -> Tensor:
        g, a = self._scales
        return self._x if len(self._terms) > 1 else scaled(self._inside(self._x), g, a)

    @property
    def residual(self) -> Tensor:
        g, a = self._scales
        return self._residual if len(self._terms) > 1 else scaled(self._inside(self._residual), 1 / g, 1 / a)

    def _inside(self, x: Tensor) -> Tensor:
        """``x`` without what was padded, a view."""
        return x[: self._shape[0], : self._shape[1]]

    def run(self, iterations: int) -> list[float]:
        self._energies, self._bounds = (
            torch.cat([values[-1:], values.new_empty(iterations)]) for values in (self._energies, self._bounds)
        )
        decreases = self._energies.new_zeros(iterations)
        with float32_sums():
            for k in range(iterations):
                self._multiply()
                self._finish(k, decreases)
        return decreases.tolist()

    def _multiply(self) -> None:
        """The image of the direction."""
        if len(self._terms) > 1:
            self._image = product(self._terms, self._direction, parts=1)
            return
        L, M = self._scaled
        mm_half(L, self._direction, self._half)
        mm_half(self._half, M, self._image)

    def _finish(self, k: int, decreases: Tensor) -> None:
        """The rest of iteration ``k``, once the product is there."""
        passes, state = self._passes, (self._free, self._scales, self._energies, self._bounds)
        with torch.cuda.device_of(self._x):
            passes.curvature(self._direction, self._image)
            passes.residual(self._residual, self._image, *state, k)
            if self._correction is not None:
                self._correct(self._correction)
            source = self._residual if self._correction is None else self._image
            corrected = self._correction is not None
            passes.direction(self._x, source, self._direction, *state, decreases, k, corrected=corrected)

    def _correct(self, correction: LowRankCorrection) -> None:
        """Put ``Z`` in the image's place, its energy and largest entry beside the programs' partial results."""
        residual = self._inside(self._residual)
        left, right, self._passes.new_energies[-1] = correction.factors(residual)
        torch.addmm(residual, left, right.T, out=self._inside(self._image))
        torch.linalg.vector_norm(self._image, torch.inf, out=self._passes.largest[-1])


def product(terms: Terms, X: Tensor, *, parts: int = 2) -> Tensor:
    """``Σ_i L_i X M_i``; ``parts`` as :func:`~surgeon_kernels.linalg.kron_product.kron_product` takes it.

    Of several terms only the sum need be positive definite.
    """
    if len(terms) == 1:
        ((L, M),) = terms
        return kron_product(L, X, M, parts=parts)
    out = torch.zeros_like(X)
    for L, M in terms:
        out += kron_product(L, X, M, parts=parts, definite=False)
    return out


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dtype=torch.float64)
