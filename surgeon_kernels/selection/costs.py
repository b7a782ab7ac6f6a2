"""Costs of removing weights: predicted increases of the mean loss, in nats per token.

With the curvature ``F ≈ G ⊗ A`` and every weight, row or column treated on its own, eq. 7 of LLM Surgeon
(van der Ouderaa et al., ICLR 2024) gives the costs below. A bias enters as the last column of ``W`` and ``A``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.linalg.quadratic_form import quadratic_form
from surgeon_kernels.runtime.checks import check_layer


def element_cost(weight: Tensor, g: Tensor, a: Tensor) -> Tensor:
    """Cost of removing single weights: ``½ W_rc² g_r a_c``, ``[R, C]``.

    Args:
        weight: ``[R, C]``, any floating dtype, the costs' own.
        g: ``[R]``: ``1 / diag(G⁻¹)`` when the other weights will compensate (optimal brain surgeon, eq. 10), or
            ``diag(G)`` when they will not (optimal brain damage).
        a: ``[C]``: ``1 / diag(A⁻¹)`` or ``diag(A)`` likewise.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_factors(weight, g, a)
    # In the order in which the CUDA kernels multiply: they give the same bits.
    return weight.square() * (0.5 * g)[:, None] * a[None, :]


def check_factors(weight: Tensor, g: Tensor, a: Tensor) -> None:
    """Raise ValueError unless ``g`` and ``a`` are as long as the weight's sides."""
    if weight.dim() != 2 or (g.shape, a.shape) != (weight.shape[:1], weight.shape[1:]):
        shapes = f"{list(weight.shape)}, {list(g.shape)} and {list(a.shape)}"
        raise ValueError(f"costs need a weight [R, C], g [R] and a [C], not {shapes}")


def row_cost(weight: Tensor, A: Tensor, g: Tensor) -> Tensor:
    """Cost of removing whole rows: ``½ (W A Wᵀ)_rr g_r``, ``[R]``, with ``g = 1 / diag(G⁻¹)`` ``[R]``.

    ``W`` is ``[R, C]``, ``A`` ``[C, C]``, of one dtype. On CUDA devices large float32 operands are multiplied in TF32,
    see :func:`~surgeon_kernels.quadratic_form`, which has the errors.
    """
    return 0.5 * quadratic_form(weight, A) * g


def column_cost(weight: Tensor, G: Tensor, a: Tensor) -> Tensor:
    """Cost of removing whole columns: ``½ (Wᵀ G W)_cc a_c``, ``[C]``, with ``a = 1 / diag(A⁻¹)`` ``[C]``.

    ``W`` is ``[R, C]``, ``G`` ``[R, R]``, of one dtype. On CUDA devices large float32 operands are multiplied in TF32,
    see :func:`~surgeon_kernels.quadratic_form`, which has the errors.
    """
    return 0.5 * quadratic_form(weight.T, G) * a


def column_block_cost(weight: Tensor, G: Tensor, A_inv: Tensor, blocks: Tensor) -> Tensor:
    """Cost of removing blocks of columns together: ``½ tr((A⁻¹[B,B])⁻¹ W_Bᵀ G W_B)`` for each block ``B``.

    Args:
        weight: ``[R, C]``; G: ``[R, R]``; A_inv: ``[C, C]``.
        blocks: int64 ``[n, size]``, the columns of each block (a head's slice of an output projection, say).

    Returns:
        ``[n]``.

    Raises:
        ValueError: shapes or devices that do not fit; TypeError: dtypes that do not.
        torch.linalg.LinAlgError: ``A⁻¹`` is singular on a block, as where that names a column twice.
    """
    check_layer(weight, G=G, A_inv=A_inv)
    if blocks.dim() != 2 or blocks.dtype != torch.int64:
        raise ValueError(f"blocks must be int64 [n, size], not {blocks.dtype} {list(blocks.shape)}")
    moment = weight.T @ G @ weight  # [C, C]
    rows, columns = blocks[:, :, None], blocks[:, None, :]
    solved = torch.linalg.solve(A_inv[rows, columns], moment[rows, columns])  # [n, size, size]
    return 0.5 * solved.diagonal(dim1=1, dim2=2).sum(dim=1)


def swap_cost(
    weight: Tensor, pruned: Tensor, gradient: Tensor, G: Tensor, A: Tensor, g_inv: Tensor, a_inv: Tensor
) -> Tensor:
    """Cost of pruning each kept weight, and of leaving each pruned one pruned, around a joint optimum: ``[R, C]``::

        kept weights: ½ Ŵ² κ      pruned weights: ½ (G Δ A)² / κ      κ² = G_rr A_cc / ([G⁻¹]_rr [A⁻¹]_cc)

    Swapping a kept and a pruned weight gains the difference of the two. The objective rises by the one when a kept
    weight goes and falls by the other when a pruned weight comes back, the kept weights compensating again, if ``κ`` is
    its curvature there: which lies between ``1 / ([G⁻¹]_rr [A⁻¹]_cc)``, with all others free, and ``G_rr A_cc``, with
    none. ``κ`` is taken to be their geometric mean.

    Args:
        weight: ``Ŵ = W + Δ`` ``[R, C]``; pruned: bool ``[R, C]``; gradient: ``G Δ A`` ``[R, C]``; G, A: damped;
            g_inv, a_inv: diagonals of their inverses, ``[R]`` and ``[C]``.

    Raises:
        ValueError: shapes or devices that do not fit; TypeError: dtypes that do not.
    """
    check_layer(weight, pruned, gradient, G=G, A=A)
    curvature = torch.outer((G.diagonal() / g_inv).sqrt(), (A.diagonal() / a_inv).sqrt())
    return torch.where(pruned, 0.5 * gradient**2 / curvature, 0.5 * weight**2 * curvature)
