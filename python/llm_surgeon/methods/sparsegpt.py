"""SparseGPT (Frantar & Alistarh, ICML 2023): columns from left to right, those to the right making up for what goes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llm_surgeon.curvature.factors import numerical_errors
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.methods.layerwise import check_pattern, prune_layers
from surgeon_kernels import cholesky_with_jitter, k_smallest, nm_select


def sparsegpt_layer(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    damp: float = 0.01,
    name: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Prune one linear layer, the columns to the right making up for every removed weight.

    With ``H = mean(a aᵀ)``, damped, and ``H⁻¹ = Uᵀ U`` (``U`` upper triangular), columns are visited from
    left to right. A weight ``W_rc`` costs ``(W_rc / U_cc)²``, its exact optimal-brain-surgeon cost when only
    columns right of it can still change; removing it subtracts ``(W_rc / U_cc) U_c,c:`` from ``W_r,c:``.
    Columns right of the current block receive their updates together when it ends: the same result, faster.

    Args:
        weight: ``[R, C]`` without its bias, which this method leaves as it is.
        hessian: ``H``, ``[C, C]``, undamped. A column whose input is always zero has its weights set to zero.
        sparsity: fraction to remove, in [0, 1]: exactly ``round(sparsity R C)`` weights, chosen block by
            block. Not read when there is a ``pattern``.
        pattern: ``(n, m)`` to keep ``n`` of every ``m`` consecutive columns, chosen when a group is reached.
        block: columns among which the weights to remove are chosen together. With a pattern it is lowered to
            a multiple of ``m`` (but at least ``m``) and has no influence on the result.
        damp: added to the diagonal of ``H``, relative to its mean.
        name: names the layer in errors.

    Returns:
        The new weight, float32 or (for a float64 ``weight``) float64, and ``pruned``, bool ``[R, C]``,
        True where a weight was removed. Of equal costs the first row, then the first column, goes first.

    Raises:
        InputError: ``C`` is not divisible by ``m``, or an argument is out of range.
        NumericalError: NaN or infinity in ``weight`` or ``hessian``, or no factorisation of ``H``.
    """
    R, C = weight.shape
    if hessian.shape != (C, C):
        raise InputError(f"{name}: the Hessian must be [{C}, {C}], not {list(hessian.shape)}")
    if not 0 <= sparsity <= 1:
        raise InputError(f"{name}: sparsity must be in [0, 1], not {sparsity}")
    if block < 1:
        raise InputError(f"{name}: block must be at least 1, not {block}")
    if pattern is not None:
        check_pattern(pattern, C, name)
        block = max(pattern[1], block - block % pattern[1])
    if not weight.isfinite().all():
        raise NumericalError(f"{name}: the weight holds NaN or infinity")

    W = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    W[:, hessian.diagonal() == 0] = 0.0
    U = _inverse_factor(hessian.to(W.dtype), damp, name)
    scale = U.diagonal()
    pruned = torch.zeros_like(W, dtype=torch.bool)
    for start in range(0, C, block):
        end = min(start + block, C)
        if pattern is None:
            # Rounding the running total, not each block's share, makes the layer's total exact.
            quota = round(sparsity * R * end) - round(sparsity * R * start)
            costs = (W[:, start:end] / scale[start:end]).square()
            pruned[:, start:end] = k_smallest([costs], quota)[1][0]
        errors = W.new_empty(R, end - start)
        for c in range(start, end):
            if pattern is not None and c % pattern[1] == 0:
                group = slice(c, c + pattern[1])
                pruned[:, group] = nm_select((W[:, group] / scale[group]).square(), *pattern)
            error = W[:, c] * pruned[:, c] / scale[c]
            W[:, c:end].addr_(error, U[c, c:end], alpha=-1)
            errors[:, c - start] = error
        W[:, end:].addmm_(errors, U[start:end, end:], alpha=-1)
    return W.masked_fill_(pruned, 0.0), pruned


prune_sparsegpt = partial(prune_layers, sparsegpt_layer)


def _inverse_factor(H: Tensor, damp: float, name: str) -> Tensor:
    """Upper triangular ``U`` with ``(H + damping)⁻¹ = Uᵀ U``, by one Cholesky factorisation.

    With ``J`` the reversal of the order and ``J H J = L Lᵀ``: ``H = V Vᵀ`` for the upper triangular
    ``V = J L J``, so ``U = V⁻¹ = J L⁻¹ J``.
    """
    H = H.clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    # Dead inputs have no correlations, so any positive value does; the mean leaves the damping as it is.
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    with numerical_errors():
        L, _ = cholesky_with_jitter(H.flip(0, 1), damp, name=f"{name}: the Hessian of the inputs")
    identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1)
