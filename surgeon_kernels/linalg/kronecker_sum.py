"""Curvature as a sum of two Kronecker products, ``F ≈ G₁ ⊗ A₁ + G₂ ⊗ A₂`` (LLM Surgeon, appendix I)."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.linalg.spd_inverse import cholesky_with_jitter

# The sum keeps at least this part of its first, damped product.
_LEAST = 0.1


def orthonormal(pair: Tensor) -> Tensor:
    """Two matrices ``[2, n, n]`` made orthonormal in the Frobenius inner product by Gram-Schmidt: the first keeps
    its direction."""
    first = pair[0] / pair[0].norm()
    second = pair[1] - (pair[1] * first).sum() * first
    return torch.stack([first, second / second.norm().clamp_min(torch.finfo(pair.dtype).tiny ** 0.375)])


class KroneckerSum:
    """``F = G₁ ⊗ A₁ + t G₂ ⊗ A₂`` of a damped first pair and a second one that may be indefinite.

    ``t ≤ 1`` is the largest with ``F ≥ 0.1 G₁ ⊗ A₁``. With ``G₁ = L_G L_Gᵀ``, ``A₁ = L_A L_Aᵀ``, ``K = L⁻ᵀ E`` and
    ``E``, ``s`` eigenvectors and -values of ``L⁻¹ M₂ L⁻ᵀ`` it is diagonal: ``F⁻¹ = (K_G ⊗ K_A) D (K_G ⊗ K_A)ᵀ``,
    ``D = 1 / (1 + t s_G s_Aᵀ)``.

    Attributes:
        terms: the two pairs, the second one's G scaled by t.

    Raises:
        NotPositiveDefiniteError: ``G₁`` or ``A₁`` is not positive definite.
    """

    def __init__(self, G: tuple[Tensor, Tensor], A: tuple[Tensor, Tensor], *, name: str = "layer") -> None:
        K_g, s_g = _diagonalise(*G, name=f"{name}: first G")
        K_a, s_a = _diagonalise(*A, name=f"{name}: first A")
        least = float(torch.outer(s_g[[0, -1]], s_a[[0, -1]]).min())  # the smallest product is one of extremes
        scale = min(1.0, (1.0 - _LEAST) / -least) if least < 0.0 else 1.0
        self.terms = [(G[0], A[0]), (scale * G[1], A[1])]
        self._K_g, self._K_a = K_g, K_a
        self._D = 1.0 / (1.0 + scale * torch.outer(s_g, s_a))

    def solve(self, X: Tensor) -> Tensor:
        """``F⁻¹ vec(X)`` as ``[R, C]``."""
        return self._K_g @ ((self._K_g.T @ X @ self._K_a) * self._D) @ self._K_a.T

    def inverse_diagonal(self) -> Tensor:
        """``[F⁻¹]`` at ``((r, c), (r, c))``: ``[R, C]``."""
        return self._K_g**2 @ self._D @ (self._K_a**2).T


def _diagonalise(first: Tensor, second: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    L, _ = cholesky_with_jitter(first, name=name)
    half = torch.linalg.solve_triangular(L, second, upper=False)
    s, E = torch.linalg.eigh(torch.linalg.solve_triangular(L, half.T, upper=False))
    return torch.linalg.solve_triangular(L.T, E, upper=True), s
