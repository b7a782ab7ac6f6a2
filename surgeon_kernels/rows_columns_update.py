"""The exact update for removing whole rows and columns together, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.spd_inverse import cholesky_with_jitter


def rows_columns_update(
    weight: Tensor, G: Tensor, A: Tensor, rows: Tensor, columns: Tensor, *, name: str = "layer"
) -> Tensor:
    """Minimise ``½ tr(Δᵀ G Δ A)`` subject to ``Δ = -W`` on all removed rows and columns.

    With ``r̄``, ``c̄`` the kept rows and columns, the kept part of ``W + Δ`` is::

        Ŵ[r̄,c̄] = G[r̄,r̄]⁻¹ G[r̄,:] W A[:,c̄] A[c̄,c̄]⁻¹

    and the rest is zero: the same as removing the rows first, then the columns of the updated weight. (LLM Surgeon
    sums the two updates of its eq. 12, which is not the optimum when rows and columns go together.)

    Args:
        weight: ``[R, C]``; G: damped ``[R, R]``; A: damped ``[C, C]``.
        rows: bool ``[R]``, True where removed; columns: bool ``[C]`` likewise.

    Returns:
        ``Δ`` ``[R, C]``.

    Raises:
        NotPositiveDefiniteError: a kept block of G or A is not positive definite.
    """
    kept = _project(G, rows, weight, f"{name}: G of the kept rows") if rows.any() else weight
    if columns.any():
        kept = _project(A, columns, kept.T, f"{name}: A of the kept columns").T
    return kept - weight


def _project(M: Tensor, removed: Tensor, X: Tensor, name: str) -> Tensor:
    """``M[k̄,k̄]⁻¹ M[k̄,:] X`` on the kept rows of ``X``, zero on the removed ones.

    Written as ``X[k̄] + M[k̄,k̄]⁻¹ M[k̄,removed] X[removed]``, which is exact where the off-diagonal block is zero.
    """
    kept = ~removed
    out = torch.zeros_like(X)
    if kept.any():
        L, _ = cholesky_with_jitter(M[kept][:, kept], name=name)
        out[kept] = X[kept] + torch.cholesky_solve(M[kept][:, removed] @ X[removed], L)
    return out
