"""The correlated update in chunks of at most m pruned weights (LLM Surgeon, eq. 11), and its m = 1 limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.spd_inverse import JITTERS, cholesky_with_jitter

# Gathered systems solved at once by the summed mode: bounds its workspace to 64 MiB in float32.
_BATCH_ELEMENTS = 1 << 24


class ChunkedUpdate(NamedTuple):
    """What :func:`chunked_update` returns."""

    delta: Tensor  # [R, C], -W on every pruned weight
    jitter: float  # largest relative jitter a chunk's Cholesky factorisation needed, normally 0.0


def chunked_update(
    weight: Tensor,
    pruned: Tensor,
    G_inv: Tensor,
    A_inv: Tensor,
    *,
    max_correlated: int = 2000,
    sequential: bool = True,
) -> ChunkedUpdate:
    """Compensate for the removal of ``pruned``, a chunk ``K`` of pruned weights ``(r_i, c_i)`` at a time::

        S = G⁻¹[r,r] ∘ A⁻¹[c,c]        λ = S⁻¹ w_K        Δ ← Δ - G⁻¹ scatter(λ) A⁻¹

    ``w_K`` is ``W_K`` plus, in the sequential mode, what earlier chunks already added there; the summed mode leaves
    that out and adds independent updates. Chunks are runs of whole rows, in order, of at most ``max_correlated``
    pruned weights; a row with more is split. With every pruned weight in one chunk this is eq. 8, the exact optimum
    of ``½ tr(Δᵀ G Δ A)``.

    The sequential mode never forms the dense ``Δ`` of a chunk: with ``Y = scatter(λ) A⁻¹`` kept row by row, a chunk
    reads ``-G⁻¹[its rows, :] Y`` and one product at the end applies them all.

    Args:
        weight: ``[R, C]``; pruned: bool ``[R, C]``; G_inv: ``[R, R]``; A_inv: ``[C, C]``, inverses of the damped
            factors, of ``weight``'s dtype.

    Raises:
        NotPositiveDefiniteError: a chunk's system could not be factorised even with the largest jitter.
    """
    if max_correlated < 1:
        raise ValueError(f"max_correlated must be at least 1, not {max_correlated}")
    rows, columns = pruned.nonzero(as_tuple=True)
    chunks = list(_chunks(pruned.sum(dim=1).tolist(), max_correlated))
    solve = _solve_in_sequence if sequential else _solve_summed
    Y, jitter = solve(weight, rows, columns, chunks, G_inv, A_inv)
    delta = -(G_inv @ Y)
    return ChunkedUpdate(torch.where(pruned, -weight, delta), jitter)


def independent_update(weight: Tensor, pruned: Tensor, G_inv: Tensor, A_inv: Tensor) -> Tensor:
    """Sum of the single-weight updates: the summed mode with ``m = 1``, where every system is a scalar::

    Δ = -G⁻¹ X A⁻¹,  X_rc = W_rc / (G⁻¹_rr A⁻¹_cc) on pruned weights, 0 elsewhere;  then Δ = -W on pruned weights.
    """
    X = weight / torch.outer(G_inv.diagonal(), A_inv.diagonal())
    delta = -(G_inv @ X.masked_fill(~pruned, 0.0) @ A_inv)
    return torch.where(pruned, -weight, delta)


def _chunks(pruned_per_row: list[int], limit: int) -> Iterator[tuple[int, int, int, int]]:
    """``(start, end, first_row, last_row + 1)`` of each chunk; start and end count pruned weights in row order."""
    position = start = first = 0
    for row, count in enumerate(pruned_per_row):
        if position > start and position + count - start > limit:
            yield start, position, first, row
            start = position
        if position == start:
            first = row
        while position + count - start > limit:  # this row alone has more than the limit
            yield start, start + limit, row, row + 1
            count -= limit
            start = position = start + limit
        position += count
    if position > start:
        yield start, position, first, len(pruned_per_row)


def _solve_in_sequence(
    weight: Tensor, rows: Tensor, columns: Tensor, chunks: list, G_inv: Tensor, A_inv: Tensor
) -> tuple[Tensor, float]:
    Y = torch.zeros_like(weight)
    worst = 0.0
    for start, end, first, last in chunks:
        r, c = rows[start:end], columns[start:end]
        delta = -(G_inv[first:last, :last] @ Y[:last])  # [rows of the chunk, C]
        solution, jitter = _solve(_gather(G_inv, A_inv, r, c)[None], (weight[r, c] + delta[r - first, c])[None])
        X = torch.zeros_like(weight[first:last])
        X[r - first, c] = solution[0]
        Y[first:last] += X @ A_inv
        worst = max(worst, jitter)
    return Y, worst


def _solve_summed(
    weight: Tensor, rows: Tensor, columns: Tensor, chunks: list, G_inv: Tensor, A_inv: Tensor
) -> tuple[Tensor, float]:
    X = torch.zeros_like(weight)
    worst = 0.0
    for batch in _batches(chunks):
        starts = torch.tensor([chunk[0] for chunk in batch], device=weight.device)
        sizes = torch.tensor([chunk[1] - chunk[0] for chunk in batch], device=weight.device)
        offset = torch.arange(int(sizes.max()), device=weight.device)  # [K], K the batch's largest chunk
        real = offset < sizes[:, None]  # [batch, K]
        position = (starts[:, None] + offset).clamp_max(rows.numel() - 1)
        r, c = rows[position], columns[position]
        # Smaller chunks are padded with rows and columns of the identity, whose solution is the zero given.
        S = _gather(G_inv, A_inv, r, c).masked_fill(~(real[:, :, None] & real[:, None, :]), 0.0)
        S.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1.0)
        solution, jitter = _solve(S, weight[r, c].masked_fill(~real, 0.0))
        X[r[real], c[real]] = solution[real]
        worst = max(worst, jitter)
    return X @ A_inv, worst


def _batches(chunks: list) -> Iterator[list]:
    """Runs of chunks whose padded systems fit :data:`_BATCH_ELEMENTS` (always at least one)."""
    batch: list = []
    widest = 0
    for chunk in chunks:
        widened = max(widest, chunk[1] - chunk[0])
        if batch and (len(batch) + 1) * widened**2 > _BATCH_ELEMENTS:
            yield batch
            batch, widened = [], chunk[1] - chunk[0]
        batch.append(chunk)
        widest = widened
    if batch:
        yield batch


def _gather(G_inv: Tensor, A_inv: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """``S_ij = G⁻¹[r_i,r_j] A⁻¹[c_i,c_j]``: ``[..., K, K]`` from indices ``[..., K]``."""
    return G_inv[r[..., :, None], r[..., None, :]] * A_inv[c[..., :, None], c[..., None, :]]


def _solve(S: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """Solutions ``[B, K]`` of ``S x = b`` and the largest jitter; only systems that fail are tried with jitter."""
    L, info = torch.linalg.cholesky_ex(S)
    worst = JITTERS[0]
    for i in info.nonzero()[:, 0].tolist():
        L[i], jitter = cholesky_with_jitter(S[i], name=f"the system of {S.shape[-1]} correlated weights")
        worst = max(worst, jitter)
    return torch.cholesky_solve(b[..., None], L)[..., 0], worst
