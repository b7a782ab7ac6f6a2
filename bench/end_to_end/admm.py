"""ALPS: layer-wise pruning by ADMM with a growing penalty (Meng et al., NeurIPS 2024), a baseline.

Of a linear ``W`` with inputs ``x``, ``H = E[x xᵀ] + λ mean(diag) I``, wanted is

    min ½ tr((Ŵ - W) H (Ŵ - W)ᵀ)   with Ŵ = D, D having k weights,

in coordinates where ``diag H = 1``. Each iteration minimises the augmented Lagrangian over ``Ŵ``, then over ``D``:

    Ŵ ← (W H - V + ρ D)(H + ρ I)⁻¹,    D ← the k largest of Ŵ + V / ρ,    V ← V + ρ (Ŵ - D).

``ρ`` grows while the support of ``D`` changes, the faster the more it does, and once it does not, the weights of that
support are taken to their optimum by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llm_surgeon.errors import NumericalError
from llm_surgeon.methods import Method, register
from llm_surgeon.methods.layerwise import check_pattern, prune_layers
from surgeon_kernels import k_smallest, nm_select

_PENALTY = 0.1  # at first
_EVERY = 3  # iterations between changes of the penalty
# Factor of the penalty where more than this fraction of the kept weights has changed.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def admm_layer(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    damp: float = 0.01,
    name: str = "layer",
    max_iterations: int = 300,
    refinements: int = 20,
) -> tuple[Tensor, Tensor]:
    """Prune one linear, see :class:`~llm_surgeon.methods.layerwise.LayerMethod`.

    Args:
        max_iterations: of ADMM, where the support does not come to rest before.
        refinements: steps of conjugate gradients on the support.

    Raises:
        InputError: ``pattern`` does not fit the width; NumericalError: NaN or infinity in an operand.
    """
    if pattern is not None:
        check_pattern(pattern, weight.shape[1], name)
    W = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not W.isfinite().all() or not hessian.isfinite().all():
        raise NumericalError(f"{name}: the weight or the Hessian of its inputs holds NaN or infinity")
    H = hessian.to(W.dtype, copy=True)
    H.diagonal().add_(damp * H.diagonal().mean())
    scale = H.diagonal().sqrt()
    scale = torch.where(scale > 0.0, scale, 1.0)  # of no inputs at all
    H /= scale[:, None] * scale
    W = W * scale
    D, pruned = _support(W, H, partial(_smallest, sparsity=sparsity, pattern=pattern), max_iterations)
    return _refined(W, H, D, pruned, refinements) / scale, pruned


def _support(W: Tensor, H: Tensor, smallest: Callable[[Tensor], Tensor], max_iterations: int) -> tuple[Tensor, Tensor]:
    """``D`` and where it is zero, once that does not change any more."""
    values, Q = torch.linalg.eigh(H)
    target = W @ H
    pruned = smallest(W)
    D, V, penalty = W.masked_fill(pruned, 0.0), torch.zeros_like(W), _PENALTY
    before = pruned
    for iteration in range(1, max_iterations + 1):
        X = ((target - V + penalty * D) @ Q / (values + penalty)) @ Q.T
        proposal = X + V / penalty
        pruned = smallest(proposal)
        D = proposal.masked_fill(pruned, 0.0)
        V += penalty * (X - D)
        if iteration % _EVERY == 0:
            changed, before = int((pruned ^ before).sum()), pruned
            if not changed:
                break
            fraction = changed / max(1, int((~pruned).sum()))
            penalty *= next(factor for least, factor in _GROWTH if fraction > least)
    return D, pruned


def _smallest(X: Tensor, *, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Where the smallest of ``X`` ``[R, C]`` are, of each group of a ``pattern`` or so many of all."""
    if pattern is not None:
        return nm_select(X.square(), *pattern)
    return k_smallest([X.abs()], round(sparsity * X.numel()))[1][0]


def _refined(W: Tensor, H: Tensor, D: Tensor, pruned: Tensor, steps: int) -> Tensor:
    """``D`` after ``steps`` of conjugate gradients, each row on its own, towards the optimum with these zeros.

    The diagonal, which would precondition them, is 1.
    """
    least = torch.finfo(W.dtype).tiny
    residual = ((W - D) @ H).masked_fill(pruned, 0.0)
    direction, squared = residual.clone(), residual.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        product = (direction @ H).masked_fill(pruned, 0.0)
        length = squared / (direction * product).sum(dim=1, keepdim=True).clamp_min(least)
        D = D + length * direction
        residual -= length * product
        last, squared = squared, residual.square().sum(dim=1, keepdim=True)
        direction = residual + squared / last.clamp_min(least) * direction
    return D


ADMM = Method(
    "admm",
    "ALPS: layer-wise reconstruction by ADMM, layer after layer",
    "ALPS (Meng et al., NeurIPS 2024)",
    needs="activations",
    updates=("none", "sequential"),
    sweep=partial(prune_layers, admm_layer),
)
register(ADMM)
