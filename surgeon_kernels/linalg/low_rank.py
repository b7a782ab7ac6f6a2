"""Low-rank correction of the dual's diagonal preconditioner, by the leading eigenvectors of both factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Eigenvectors of each factor: in rows of `python -m bench.studies.solver` 16 save products over 8, and 32 some more, at
# four times the memory of the inverses. Further vectors and rounds of the subspace iteration for them: estimates.
_RANK, _SPARE, _ROUNDS = 16, 8, 3


class LowRankCorrection(NamedTuple):
    """``P ∘ (X_V Vᵀ + U X_Uᵀ)``, added to ``X`` approximates the inverse of ``P ∘ (Ĝ⁻¹ X Â⁻¹)`` on the entries ``P``.

    The factors are scaled so that their inverses have a unit diagonal, and modelled as ``Â = I + V Vᵀ``,
    ``Ĝ = I + U Uᵀ``. The inverse of a principal submatrix ``[Â⁻¹]_PP`` is the Schur complement
    ``Â_PP - Â_PF (Â_FF)⁻¹ Â_FP``, ``F`` being the rest: of the model, ``I + V_P (I + V_Fᵀ V_F)⁻¹ V_Pᵀ``. So with the
    coupling of rows by ``Ĝ`` left out row r of ``X_V`` is ``(I + V_Fᵀ V_F)⁻¹ Vᵀ x_r``, F what row r keeps, and
    likewise ``X_U`` by columns. Channels of large activations or gradients (outliers), which make the dual
    ill-conditioned where much is pruned, are in the leading eigenvectors.
    """

    U: Tensor  # [R, K]
    V: Tensor  # [C, K]
    rows: Tensor  # [R, K, K], the inverses (I + V_Fᵀ V_F)⁻¹
    columns: Tensor  # [C, K, K]

    def factors(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[X_V U]`` ``[R, 2K]`` and ``[V X_U]`` ``[C, 2K]``, whose product is the correction of ``X`` ``[R, C]``,
        zero off ``P``; and the inner product of the two, in float64."""
        by_row, by_column = X @ self.V, X.T @ self.U
        X_V, X_U = (torch.bmm(S, x[:, :, None])[:, :, 0] for S, x in ((self.rows, by_row), (self.columns, by_column)))
        energy = (by_row * X_V).sum(dtype=torch.float64) + (by_column * X_U).sum(dtype=torch.float64)
        return torch.cat([X_V, self.U], dim=1), torch.cat([self.V, X_U], dim=1), energy


def low_rank_correction(U: Tensor, V: Tensor, pruned: Tensor) -> LowRankCorrection:
    """The correction for factors of these :func:`leading_vectors` and ``P = pruned`` ``[R, C]``."""
    kept = (~pruned).to(V.dtype)
    return LowRankCorrection(U, V, _inverses(kept, V), _inverses(kept.T, U))


def leading_vectors(M: Tensor, inverse: Tensor) -> Tensor:
    """``V`` ``[n, min(n, 16)]`` with ``I + V Vᵀ`` the nearest to ``M ∘ (s sᵀ)``, ``s²`` the diagonal of ``M⁻¹``.

    By subspace iteration; the host waits for the device once.

    Args:
        M: symmetric positive definite ``[n, n]``; inverse: of it.
    """
    scales = inverse.diagonal().sqrt()

    def times(Q: Tensor) -> Tensor:
        return scales[:, None] * (M @ (scales[:, None] * Q))

    random = torch.Generator(M.device).manual_seed(0)
    size = len(M), min(len(M), _RANK + _SPARE)
    Q = _orthonormal(torch.randn(size, generator=random, device=M.device, dtype=M.dtype))
    for _ in range(_ROUNDS):
        Q = _orthonormal(times(Q))
    # The host is the fastest at so small a problem.
    values, vectors = torch.linalg.eigh((Q.T @ times(Q)).double().cpu())
    lengths = (values[-_RANK:] - 1.0).clamp_min(0.0).sqrt()
    return Q @ (vectors[:, -_RANK:] * lengths).to(Q)


def _orthonormal(Y: Tensor) -> Tensor:
    """The columns of ``Y`` made orthonormal, by the Cholesky factor of their products in float64."""
    exact = Y.double()
    L = torch.linalg.cholesky_ex(exact.T @ exact).L
    return torch.linalg.solve_triangular(L, exact.T, upper=False).T.to(Y.dtype)


def _inverses(kept: Tensor, V: Tensor) -> Tensor:
    """``(I + Σ_c kept_rc v_c v_cᵀ)⁻¹`` of every row r."""
    K = V.shape[1]
    systems = (kept @ (V[:, :, None] * V[:, None, :]).flatten(1)).unflatten(1, (K, K)).double()
    systems.diagonal(dim1=1, dim2=2).add_(1.0)
    return torch.linalg.inv_ex(systems).inverse.to(V.dtype)
