"""The correlated update in chunks of at most m pruned weights (LLM Surgeon, eq. 11), and its m = 1 limit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.linalg.chunked_solve import (
    chunked_solve,
    chunked_solve_reference,
    largest_jitter,
    row_major,
    uses_extension,
)
from surgeon_kernels.runtime.checks import check_layer
from surgeon_kernels.runtime.ops import define

# The extension's sequential mode factorises as much at once as the factors' memory in bytes and the rows that wait for
# an update allow (estimates).
_FACTOR_BYTES = 1 << 30
_PENDING_ROWS = 256

define(
    "chunked_sequence_(Tensor(a!) Y, Tensor(b!) pending, Tensor G_inv, Tensor A_inv, Tensor rows, Tensor columns,"
    " Tensor row_offsets, Tensor offsets, Tensor row_ranges, int block_begin) -> Tensor",
    fake=lambda Y, pending, G_inv, A_inv, rows, columns, row_offsets, offsets, row_ranges, block_begin: Y.new_empty(
        offsets.shape[0] - 1, dtype=torch.int32
    ),
)


class ChunkedUpdate(NamedTuple):
    """Result of :func:`chunked_update`."""

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
    reads ``-G⁻¹[its rows, :] Y`` and one product at the end applies them all. On CUDA devices, in float32, the
    extension factorises the systems of many chunks at once, which do not depend on ``Δ``; only the triangular solves
    and ``Y`` go chunk by chunk, without a host sync.

    Args:
        weight: ``[R, C]``; pruned: bool ``[R, C]``; G_inv: ``[R, R]``; A_inv: ``[C, C]``, inverses of the damped
            factors, of ``weight``'s dtype.

    Raises:
        NotPositiveDefiniteError: a chunk's system could not be factorised even with the largest jitter.
        ValueError: shapes or devices that do not fit, or ``max_correlated`` below 1; TypeError: dtypes that do not fit.
    """
    check_layer(weight, pruned, G_inv=G_inv, A_inv=A_inv)
    if max_correlated < 1:
        raise ValueError(f"max_correlated must be at least 1, not {max_correlated}")
    rows, columns = pruned.nonzero(as_tuple=True)
    pruned_per_row = pruned.sum(dim=1).cpu()
    offsets = _chunk_offsets(pruned_per_row.tolist(), max_correlated)
    if not sequential:
        X = torch.zeros_like(weight)
        X[rows, columns], level = chunked_solve(G_inv, A_inv, rows, columns, offsets, weight[rows, columns])
        Y = X @ A_inv
    elif uses_extension(weight):
        Y, level = _solve_in_sequence_by_blocks(weight, rows, columns, pruned_per_row, offsets, G_inv, A_inv)
    else:
        Y, level = _solve_in_sequence(weight, rows, columns, pruned_per_row, offsets, G_inv, A_inv)
    jitter = largest_jitter(level, offsets)
    delta = -(G_inv @ Y)
    return ChunkedUpdate(torch.where(pruned, -weight, delta), jitter)


def independent_update(weight: Tensor, pruned: Tensor, G_inv: Tensor, A_inv: Tensor) -> Tensor:
    """Sum of the single-weight updates: the summed mode with ``m = 1``, where every system is a scalar::

    Δ = -G⁻¹ X A⁻¹,  X_rc = W_rc / (G⁻¹_rr A⁻¹_cc) on pruned weights, 0 elsewhere;  then Δ = -W on pruned weights.

    Arguments and errors are those of :func:`chunked_update`; returned is ``Δ`` ``[R, C]``.
    """
    check_layer(weight, pruned, G_inv=G_inv, A_inv=A_inv)
    X = weight / torch.outer(G_inv.diagonal(), A_inv.diagonal())
    delta = -(G_inv @ X.masked_fill(~pruned, 0.0) @ A_inv)
    return torch.where(pruned, -weight, delta)


def _chunk_offsets(pruned_per_row: list[int], limit: int) -> Tensor:
    """Starts of the chunks in row order, int64 ``[B + 1]``: runs of whole rows up to ``limit``; long rows are split."""
    starts: list[int] = []
    position = unfinished = 0  # weights so far, and of the last chunk
    for count in pruned_per_row:
        if unfinished and unfinished + count <= limit:
            unfinished += count
        elif count:
            starts.extend(range(position, position + count, limit))
            unfinished = (count - 1) % limit + 1
        position += count
    return torch.tensor([*starts, position])


def _row_ranges(pruned_per_row: Tensor, offsets: Tensor) -> Tensor:
    """The first row of each chunk and one past its last, int64 ``[B, 2]``."""
    ends = pruned_per_row.cumsum(0)
    first, last = torch.searchsorted(ends, offsets[:-1], right=True), torch.searchsorted(ends, offsets[1:]) + 1
    return torch.stack([first, last], dim=1)


def _solve_in_sequence(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    pruned_per_row: Tensor,
    offsets: Tensor,
    G_inv: Tensor,
    A_inv: Tensor,
) -> tuple[Tensor, Tensor]:
    """``Y`` with ``Δ = -G⁻¹ Y``, and the chunks' levels of jitter."""
    Y = torch.zeros_like(weight)
    levels = [torch.zeros(0, dtype=torch.int32, device=weight.device)]
    for (start, end), (first, last) in zip(
        pairwise(offsets.tolist()), _row_ranges(pruned_per_row, offsets).tolist(), strict=True
    ):
        r, c = rows[start:end], columns[start:end]
        delta = -(G_inv[first:last, :last] @ Y[:last])  # [rows of the chunk, C]
        target = weight[r, c] + delta[r - first, c]
        solution, level = chunked_solve_reference(G_inv, A_inv, r, c, torch.tensor([0, end - start]), target)
        X = torch.zeros_like(weight[first:last])
        X[r - first, c] = solution
        Y[first:last] += X @ A_inv
        levels.append(level)
    return Y, torch.cat(levels)


def _solve_in_sequence_by_blocks(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    pruned_per_row: Tensor,
    offsets: Tensor,
    G_inv: Tensor,
    A_inv: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same by the extension, for blocks of chunks.

    ``pending`` holds ``W + Δ`` in a block's rows: a product brings in all earlier blocks, and every chunk adds its own
    part for those after it in its block.
    """
    G_inv, A_inv = row_major(G_inv), row_major(A_inv)
    Y = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    ranges = _row_ranges(pruned_per_row, offsets)
    row_offsets = torch.cat([pruned_per_row.new_zeros(1), pruned_per_row.cumsum(0)]).to(weight.device)
    levels = [torch.zeros(0, dtype=torch.int32, device=weight.device)]
    for first, last in _blocks(offsets.diff().tolist(), ranges.tolist()):
        begin, end = int(ranges[first, 0]), int(ranges[last - 1, 1])
        pending = torch.addmm(weight[begin:end], G_inv[begin:end, :end], Y[:end], alpha=-1)
        levels.append(
            torch.ops.surgeon_kernels.chunked_sequence_(
                Y,
                pending,
                G_inv,
                A_inv,
                rows,
                columns,
                row_offsets,
                offsets[first : last + 1],
                ranges[first:last],
                begin,
            )
        )
    return Y, torch.cat(levels)


def _blocks(sizes: list[int], ranges: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Runs of chunks, ``(first, last + 1)``, within :data:`_FACTOR_BYTES` and :data:`_PENDING_ROWS` (at least one)."""
    first = widest = 0
    for chunk, size in enumerate(sizes):
        tiles = -(-max(widest, size) // 64)
        factors = (chunk + 1 - first) * tiles * (tiles + 1) // 2 * 64**2 * 4
        if chunk > first and (factors > _FACTOR_BYTES or ranges[chunk][1] - ranges[first][0] > _PENDING_ROWS):
            yield first, chunk
            first, widest = chunk, 0
        widest = max(widest, size)
    if sizes:
        yield first, len(sizes)
