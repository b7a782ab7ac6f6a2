"""Solves of many systems gathered from two inverse factors: the linear algebra of the chunked update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgeon_kernels.linalg.spd_inverse import JITTERS, NotPositiveDefiniteError, cholesky_with_jitter
from surgeon_kernels.runtime import extension
from surgeon_kernels.runtime.ops import define

# Systems gathered at once by the reference: bounds its workspace to 64 MiB in float32 (an estimate).
_BATCH_ELEMENTS = 1 << 24


def chunked_solve(
    G_inv: Tensor, A_inv: Tensor, rows: Tensor, columns: Tensor, offsets: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve ``S_b x_b = target_b`` for every chunk ``b`` of positions ``(r_i, c_i)``, each by its own Cholesky factor::

        S = G⁻¹[r,r] ∘ A⁻¹[c,c],    i = offsets[b] .. offsets[b + 1] - 1

    A system with a pivot that is not positive and finite is tried again with :data:`spd_inverse.JITTERS` of its mean
    diagonal added, in this order; only the lower triangles of the systems count.

    On CUDA devices, in float32, systems of up to 256 weights are gathered, factorised and solved by one block each in
    shared memory, those of up to 64 by one warp; larger ones are factorised in tiles by all blocks together. Products
    are three of tf32 for one of float32; a subnormal pivot counts as zero. The same inputs give the same bits.

    Args:
        G_inv: ``[R, R]``; A_inv: ``[C, C]``; rows, columns: int64 ``[n]``, the positions; target: ``[n]``. All on one
            device, floating point of one dtype.
        offsets: int64 ``[B + 1]``, from 0 to n, on the CPU.

    Returns:
        The solutions ``[n]``, and int32 ``[B]``: each system's index into ``JITTERS``, normally 0, or
        ``len(JITTERS)`` for a system that none was enough for; its solution is 0.

    Raises:
        TypeError: dtypes that differ, or indices that are not int64.
        ValueError: shapes, devices, offsets or lengths that do not agree (RuntimeError for decreasing offsets on CUDA
            devices), or on the CPU a position outside the factors. On CUDA devices, where the host does not check them,
            to avoid a sync, such a position is an assertion that fails on the device, as with indices in PyTorch:
            nothing is read there, and the next synchronizing call raises.
    """
    _check(G_inv, A_inv, rows, columns, offsets, target)
    if uses_extension(target):
        return torch.ops.surgeon_kernels.chunked_solve.default(
            row_major(G_inv),
            row_major(A_inv),
            rows.contiguous(),
            columns.contiguous(),
            offsets.contiguous(),
            target.contiguous(),
        )
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):  # the extension's op checks by itself
        raise ValueError("offsets must start at 0 and must not decrease")
    if not target.is_cuda:
        for name, index, factor in (("rows", rows, G_inv), ("columns", columns, A_inv)):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(factor):
                raise ValueError(f"{name} must be from 0 to {len(factor) - 1}, the factor's last")
    return chunked_solve_reference(G_inv, A_inv, rows, columns, offsets, target)


def _check(G_inv: Tensor, A_inv: Tensor, rows: Tensor, columns: Tensor, offsets: Tensor, target: Tensor) -> None:
    for name, factor in (("G_inv", G_inv), ("A_inv", A_inv)):
        if factor.dim() != 2 or factor.shape[0] != factor.shape[1]:
            raise ValueError(f"{name} must be a square matrix, not {list(factor.shape)}")
        if factor.dtype != target.dtype:
            raise TypeError(f"{name} is {factor.dtype}, target {target.dtype}: they must be of one dtype")
    if not target.is_floating_point():
        raise TypeError(f"target must be floating point, not {target.dtype}")
    for name, index in (("rows", rows), ("columns", columns), ("offsets", offsets)):
        if index.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, not {index.dtype}")
    if len({tensor.device for tensor in (G_inv, A_inv, rows, columns, target)}) > 1:
        raise ValueError("the factors, rows, columns and target must be on one device")
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.is_cuda or int(offsets[-1]) != target.numel():
        raise ValueError("offsets must be a vector on the CPU that ends with the number of positions")
    if not rows.shape == columns.shape == target.shape or target.dim() != 1:
        raise ValueError("rows, columns and target must be vectors of one length")


def uses_extension(x: Tensor) -> bool:
    """The dispatch rule: float32 on a CUDA device the extension is available for runs it; all else the reference."""
    return x.is_cuda and x.dtype == torch.float32 and extension.available(x.device)


def row_major(M: Tensor) -> Tensor:
    """A symmetric matrix with contiguous rows; the column-major ones that factorisations return are only viewed."""
    return M.mT if M.stride(0) == 1 and M.stride(1) != 1 else M.contiguous()


def largest_jitter(level: Tensor, offsets: Tensor) -> float:
    """The largest relative jitter of solved chunks, from what :func:`chunked_solve` returned.

    Raises:
        NotPositiveDefiniteError: a system had no factor even with the largest jitter.
    """
    worst = int(level.max()) if level.numel() else 0
    if worst == len(JITTERS):
        size = int(offsets.diff()[int(level.argmax())])
        raise NotPositiveDefiniteError(
            f"the system of {size} correlated weights is not positive definite, even with {JITTERS[-1]:g} of its mean "
            "diagonal added: raise the damping"
        )
    return JITTERS[worst]


def chunked_solve_reference(
    G_inv: Tensor, A_inv: Tensor, rows: Tensor, columns: Tensor, offsets: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`chunked_solve`, on any device and in any dtype."""
    solution = torch.zeros_like(target)
    sizes = offsets.diff()
    level = torch.zeros(sizes.numel(), dtype=torch.int32, device=target.device)
    for first, last in _batches(sizes.tolist()):
        start, size = offsets[first:last].to(target.device), sizes[first:last].to(target.device)
        offset = torch.arange(int(sizes[first:last].max()), device=target.device)  # [K], K of the largest chunk
        real = offset < size[:, None]  # [batch, K]
        position = (start[:, None] + offset).clamp_max(target.numel() - 1)
        # Smaller chunks are padded with rows and columns of the identity, whose solution is the zero given.
        S = _gather(G_inv, A_inv, rows[position], columns[position])
        S.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0.0).diagonal(dim1=1, dim2=2).masked_fill_(~real, 1.0)
        L, level[first:last] = _cholesky(S, sizes[first:last].tolist())
        solved = torch.cholesky_solve(target[position].masked_fill(~real, 0.0)[..., None], L)[..., 0]
        solution[position[real]] = solved.masked_fill(level[first:last, None] == len(JITTERS), 0.0)[real]
    return solution, level


def _batches(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of chunks, ``(first, last + 1)``, whose padded systems fit :data:`_BATCH_ELEMENTS` (always at least one)."""
    first = widest = 0
    for chunk, size in enumerate(sizes):
        if chunk > first and (chunk + 1 - first) * max(widest, size) ** 2 > _BATCH_ELEMENTS:
            yield first, chunk
            first, widest = chunk, 0
        widest = max(widest, size)
    if widest:
        yield first, len(sizes)


def _gather(G_inv: Tensor, A_inv: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """``S_ij = G⁻¹[r_i,r_j] A⁻¹[c_i,c_j]``: ``[..., K, K]`` from indices ``[..., K]``."""
    return G_inv[r[..., :, None], r[..., None, :]] * A_inv[c[..., :, None], c[..., None, :]]


def _cholesky(S: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Factors ``[B, K, K]`` of systems padded from their sizes, and the levels; only those that fail get jitter."""
    L, info = torch.linalg.cholesky_ex(S)
    failed = (info != 0) | ~L.sum(dim=(1, 2)).isfinite()
    level = torch.zeros_like(info, dtype=torch.int32)
    for i in failed.nonzero()[:, 0].tolist():
        K = sizes[i]
        L[i] = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        try:
            L[i, :K, :K], jitter = cholesky_with_jitter(S[i, :K, :K])
            level[i] = JITTERS.index(jitter)
        except NotPositiveDefiniteError:  # reported, so that the other chunks are solved
            level[i] = len(JITTERS)
    return L, level


define(
    "chunked_solve(Tensor G_inv, Tensor A_inv, Tensor rows, Tensor columns, Tensor offsets, Tensor target)"
    " -> (Tensor, Tensor)",
    fake=lambda G_inv, A_inv, rows, columns, offsets, target: (
        torch.empty_like(target),
        target.new_empty(offsets.shape[0] - 1, dtype=torch.int32),
    ),
    cpu=chunked_solve_reference,
)
