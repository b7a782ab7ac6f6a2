"""The exact update for removing whole rows and columns together, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.linalg.spd_inverse import cholesky_with_jitter
from surgeon_kernels.runtime.checks import check_layer, check_mask


def rows_columns_update(
    weight: Tensor,
    G: Tensor | None,
    A: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    removed: tuple[int, int] | None = None,
    name: str = "layer",
) -> Tensor:
    """Minimise ``½ tr(Δᵀ G Δ A)`` subject to ``Δ = -W`` on all removed rows and columns.

    With ``r̄``, ``c̄`` the kept rows and columns, the kept part of ``W + Δ`` is::

        Ŵ[r̄,c̄] = G[r̄,r̄]⁻¹ G[r̄,:] W A[:,c̄] A[c̄,c̄]⁻¹

    and the rest is zero: the same as removing the rows first, then the columns of the updated weight. (LLM Surgeon
    sums the two updates of its eq. 12, which is not the optimum when rows and columns go together.)

    Args:
        weight: ``[R, C]``; G: damped ``[R, R]``, or None where no row is removed; A: damped ``[C, C]``, or None where
            no column is.
        rows: bool ``[R]``, True where removed; columns: bool ``[C]`` likewise.
        removed: the numbers of those rows and columns, if known: there is no host sync then, and a kept block that is
            not positive definite is not reported but gives NaN.

    Returns:
        ``Δ`` ``[R, C]``.

    Raises:
        NotPositiveDefiniteError: a kept block of G or A is not positive definite.
        ValueError: shapes or devices that do not fit; TypeError: dtypes that do not.
    """
    check_layer(weight, G=G, A=A)
    check_mask(rows, weight.shape[:1], "rows")
    check_mask(columns, weight.shape[1:], "columns")
    gone_rows, gone_columns = removed or (None, None)
    kept = _project(G, rows, gone_rows, weight, f"{name}: G of the kept rows")
    kept = _project(A, columns, gone_columns, kept.T, f"{name}: A of the kept columns").T
    return kept - weight


def _project(M: Tensor | None, removed: Tensor, count: int | None, X: Tensor, name: str) -> Tensor:
    """``M[k̄,k̄]⁻¹ M[k̄,:] X`` on the kept rows of ``X``, zero on the ``count`` removed ones.

    Written as ``X[k̄] + M[k̄,k̄]⁻¹ M[k̄,removed] X[removed]``, which is exact where the off-diagonal block is zero.
    """
    number = int(removed.sum()) if count is None else count
    if number == 0:
        return X
    if M is None:
        raise ValueError(f"{name} is needed where some are removed")
    kept, gone = removed.byte().argsort(stable=True).split([len(removed) - number, number])
    out = torch.zeros_like(X)
    if len(kept):
        rows = M[kept]  # [kept, n]
        block = rows[:, kept]
        L = cholesky_with_jitter(block, name=name)[0] if count is None else _cholesky_or_nan(block)
        out[kept] = X[kept] + torch.cholesky_solve(rows[:, gone] @ X[gone], L)
    return out


def _cholesky_or_nan(M: Tensor) -> Tensor:
    L, info = torch.linalg.cholesky_ex(M)
    return L.masked_fill_(info != 0, torch.nan)
