"""The exact joint update: all pruned weights compensated for at once, by conjugate gradients with a certified gap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.kron_product import fits_split, kron_product_split
from surgeon_kernels.masked_cg import MaskedCG, Terms, masked_cg, product
from surgeon_kernels.spd_inverse import NotPositiveDefiniteError

# Iterations between two looks at the progress, each of which waits for the device.
_PERIOD = 4
# The bound is taken for final, and the kept weights' turn comes, when it is estimated to rise by no more than this
# part of the tolerance. The violation of the constraint decays later than the bound rises, and repairing it is dear.
_BOUND_TOLERANCE = 0.1
# With fewer weights kept than this fraction, the kept weights alone are the smaller and better conditioned problem.
_DUAL_FROM = 0.3
# Iterations before an estimate is made from a trace: enough to smooth the irregular single steps of CG.
_FIRST_ESTIMATE = 8
# Times that a part is begun anew from the residual in full precision.
_REPLACEMENTS = 3


class JointUpdate(NamedTuple):
    """What :func:`joint_update` returns."""

    delta: Tensor  # [R, C], -W on every pruned weight
    objective: list[float]  # ½ tr(Δᵀ G Δ A) of the first feasible Δ and after each iteration on the kept weights
    bound: list[float]  # lower bound of the optimum before and after each iteration on the pruned weights; else [0.0]
    gradient: Tensor  # G Δ A [R, C], of the objective: at the optimum 0 on the kept weights
    gap: float  # (objective - optimum) / optimum at the end: certified where there is a bound, else estimated, or inf


def joint_update(
    weight: Tensor,
    pruned: Tensor,
    G: Tensor,
    A: Tensor,
    G_inv: Tensor | None = None,
    A_inv: Tensor | None = None,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    tolerance: float = 0.01,
    max_iterations: int = 200,
) -> JointUpdate:
    """Minimise ``½ tr(Δᵀ G Δ A)`` subject to ``Δ = -W`` on every pruned weight (eq. 8 with all K weights at once).

    Two problems in turn, both by :func:`~surgeon_kernels.masked_cg.masked_cg`, whose iterations are one product with
    two matrices each:

    1. The dual, ``P ∘ (G⁻¹ Λ A⁻¹) = P ∘ W`` for multipliers ``Λ`` on the pruned positions ``P``. Its value
       ``⟨Λ, W⟩ - ½ ⟨Λ, G⁻¹ Λ A⁻¹⟩`` is a lower bound of the optimum, rises with every iteration, and meets it with
       ``Δ = -G⁻¹ Λ A⁻¹``. Large eigenvalues of ``G`` and ``A`` (outlier channels), which make the problem of the kept
       weights ill-conditioned, are small ones here and do no harm.
    2. That ``Δ`` is made feasible: it is set to ``-W`` on ``P``. What this costs lies along the large eigenvalues;
       iterations on the kept weights, ``kept ∘ (G D A)`` being the operator, take it back first.

    It stops when the objective is within ``tolerance`` of the lower bound. Where few weights are kept, and without
    the inverses, there is the second part only, from ``Δ = 0`` on the kept weights, and the gap is an estimate from
    the objective's trace (:func:`estimated_gap`). Products within the iterations round to 11 bits on CUDA; after each
    part value and residual are computed anew in full precision, and the part goes on from there if it is not finished.

    Args:
        weight: ``[R, C]``; pruned: bool ``[R, C]``; G: damped ``[R, R]``; A: damped ``[C, C]``; G_inv, A_inv: their
            inverses. All of one dtype.
        second: a second pair ``(G₂, A₂)`` for the curvature ``G ⊗ A + G₂ ⊗ A₂``, whose inverse is no product:
            excludes the inverses.
        tolerance: relative gap to the optimum to stop at.
        max_iterations: cap on the iterations of both parts together; 0 only zeroes.

    Raises:
        NotPositiveDefiniteError: the curvature's diagonal is not positive throughout: it was not damped.
    """
    if (G_inv is None) != (A_inv is None) or (second is not None and G_inv is not None):
        raise ValueError("give both inverses or neither, and none beside a second pair")
    terms = [(G, A)] if second is None else [(G, A), second]
    if not bool(_positive_diagonal(terms)):
        raise NotPositiveDefiniteError("the curvature's diagonal is not positive throughout")
    if G_inv is not None and A_inv is not None and _kept_fraction(pruned) >= _DUAL_FROM:
        delta, bound = _solve_dual(weight, pruned, [(G_inv, A_inv)], tolerance, max_iterations)
    else:
        delta, bound = torch.where(pruned, -weight, 0.0), [0.0]
    gradient = product(terms, delta)
    trace = [0.5 * _dot(delta, gradient)]
    certified = bound[-1] > 0.0

    def gap() -> float:
        return max(trace[-1] / bound[-1] - 1.0, 0.0) if certified else estimated_gap(trace)

    last_gap = gap()
    for _ in range(_REPLACEMENTS):
        left, begun = max_iterations + 2 - len(trace) - len(bound), trace[-1]
        if left <= 0 or last_gap <= tolerance:
            break
        solver = masked_cg(terms, ~pruned, gradient.neg_().masked_fill_(pruned, 0.0))
        del gradient
        solved = _run(solver, trace, -1.0, left, lambda: gap() <= tolerance)
        delta += solver.x
        del solver
        gradient = product(terms, delta)
        last_gap, claimed = 0.0 if solved else gap(), trace[-1]
        trace[-1] = 0.5 * _dot(delta, gradient)
        last_gap = gap() if certified else last_gap + max(trace[-1] / claimed - 1.0, 0.0)
        if not trace[-1] < begun:  # nothing more to be had in this precision
            break
    return JointUpdate(delta, trace, bound, gradient, last_gap)


def joint_estimate(
    weight: Tensor,
    pruned: Tensor,
    G: Tensor,
    A: Tensor,
    G_inv: Tensor,
    A_inv: Tensor,
    *,
    tolerance: float = 0.01,
    max_iterations: int = 200,
) -> JointUpdate:
    """What :func:`joint_update` is about to find, for choosing other weights: the dual alone, and no certificate.

    The optimum's gradient is ``-Λ``, to which the multipliers of the dual converge long before ``G Δ A`` does: there
    what is left of the violation of the constraint stands multiplied by the large eigenvalues of ``G`` and ``A``.
    ``bound`` is within about ``tolerance`` of the optimum's value, ``gradient`` is ``-Λ``, ``objective`` is empty and
    ``gap`` infinite. Where few weights are kept this is :func:`joint_update`.
    """
    options: dict[str, Any] = {"tolerance": tolerance, "max_iterations": max_iterations}
    if _kept_fraction(pruned) < _DUAL_FROM:
        return joint_update(weight, pruned, G, A, G_inv, A_inv, **options)
    solver, bound = masked_cg([(G_inv, A_inv)], pruned, weight.masked_fill(~pruned, 0.0)), [0.0]
    _run(solver, bound, 1.0, max_iterations, lambda: still_to_rise(bound) <= tolerance)
    gradient = solver.x.neg_()
    del solver
    rough = kron_product_split(G_inv, gradient, A_inv, parts=1) if fits_split(weight) else G_inv @ gradient @ A_inv
    return JointUpdate(torch.where(pruned, -weight, rough), [], bound, gradient, math.inf)


def _solve_dual(
    weight: Tensor, pruned: Tensor, inverse: Terms, tolerance: float, max_iterations: int
) -> tuple[Tensor, list[float]]:
    """The feasible ``Δ`` of the dual's solution, and the bound after 0, 1, 2, ... iterations."""
    wanted = weight.masked_fill(~pruned, 0.0)
    multipliers, full, bound = torch.zeros_like(weight), torch.zeros_like(weight), [0.0]
    for _ in range(_REPLACEMENTS):
        solver = masked_cg(inverse, pruned, (wanted + full).masked_fill_(~pruned, 0.0))
        left = max_iterations + 1 - len(bound)
        _run(solver, bound, 1.0, left, lambda: still_to_rise(bound) <= _BOUND_TOLERANCE * tolerance)
        multipliers += solver.x
        del solver
        full = product(inverse, multipliers).neg_()
        claimed, bound[-1] = bound[-1], _dot(multipliers, wanted) + 0.5 * _dot(multipliers, full)
        if bound[-1] >= (1.0 - _BOUND_TOLERANCE * tolerance) * claimed or len(bound) > max_iterations:
            break
    return torch.where(pruned, -weight, full), bound


def _run(solver: MaskedCG, values: list[float], sign: float, iterations: int, enough: Callable[[], bool]) -> bool:
    """Iterate and append the values until ``enough``; whether it ended because nothing changes any more."""
    while iterations > 0 and not enough():
        changes = solver.run(min(_PERIOD, iterations))
        iterations -= len(changes)
        for change in changes:
            if change == 0.0:
                return True
            values.append(max(values[-1] + sign * change, 0.0))
        if values[-1] == values[-2]:
            return True
    return False


def objective(delta: Tensor, G: Tensor, A: Tensor) -> float:
    """The predicted increase of the mean loss ``½ tr(Δᵀ G Δ A)``, in nats per token, summed in float64."""
    return 0.5 * _dot(delta, G @ delta @ A)


def still_to_rise(bound: list[float]) -> float:
    """By what part of itself the dual's lower bound will still rise, extrapolated from its rises so far.

    With ``s₀`` and ``s₁`` the rises over the last third of the iterations and the third before, these are taken to go
    on as a geometric series: ``s₁ q / (1 - q)``, ``q = s₁ / s₀``. The dual is well-conditioned, its error falls so.
    Infinite for the first iterations and while the rises grow.
    """
    n = len(bound) - 1
    third = n // 3
    if n < _FIRST_ESTIMATE:
        return math.inf
    last, before = bound[n] - bound[n - third], bound[n - third] - bound[n - 2 * third]
    if last <= 0.0:
        return 0.0
    return last * last / (before - last) / bound[n] if last < before else math.inf


def estimated_gap(trace: list[float]) -> float:
    """Relative distance of the last objective to the optimum, extrapolated from the decreases so far.

    The energy-norm error of conjugate gradients is the sum of the decreases still to come (Hestenes and Stiefel,
    1952). With ``s₀`` and ``s₁`` the decreases over iterations ``4n/9 .. 2n/3`` and ``2n/3 .. n`` and ``q = s₁ / s₀``,
    these are taken to be ``s₁ q / (1 - q)``: exact where the error falls as a power of n, as it does while many
    small eigenvalues are still unresolved, and on the safe side where it falls geometrically. Windows of a fixed
    length take the fast first phase for the whole and stop far too early on ill-conditioned layers. Infinite for the
    first iterations and while the decreases grow.
    """
    if trace[-1] <= 0.0:
        return 0.0
    n = len(trace) - 1
    if n < _FIRST_ESTIMATE:
        return math.inf
    before, last = trace[4 * n // 9] - trace[2 * n // 3], trace[2 * n // 3] - trace[n]
    if last <= 0.0:
        return 0.0
    if last >= before:
        return math.inf
    to_come = last * last / (before - last)
    optimum = trace[-1] - to_come
    return to_come / optimum if optimum > 0.0 else math.inf


def _positive_diagonal(terms: Terms) -> Tensor:
    if len(terms) == 1:
        return torch.stack([(M.diagonal() > 0.0).all() for M in terms[0]]).all()
    row_scales = torch.stack([L.diagonal() for L, _ in terms])
    return (row_scales.T @ torch.stack([M.diagonal() for _, M in terms]) > 0.0).all()


def _kept_fraction(pruned: Tensor) -> float:
    return 1.0 - int(pruned.count_nonzero()) / pruned.numel() if pruned.numel() else 1.0


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
