"""The exact joint update: all pruned weights compensated for at once, by conjugate gradients with a certified gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.linalg.kron_product import scaled
from surgeon_kernels.linalg.low_rank import LowRankCorrection, leading_vectors, low_rank_correction
from surgeon_kernels.linalg.masked_cg import MaskedCG, Terms, masked_cg, product
from surgeon_kernels.linalg.spd_inverse import NotPositiveDefiniteError
from surgeon_kernels.runtime.checks import check_layer
from surgeon_kernels.updates.convergence import FIRST_ESTIMATE, estimated_gap, still_to_rise

# With fewer weights kept than this fraction, the kept weights alone are the smaller problem: with the diagonal as
# preconditioner they take fewer products in all rows of `python -m bench.studies.solver` with less than 0.3 kept, and
# more in most others. It is the better conditioned one too if the fraction times both factors' mean variance inflation,
# ``M_ii [M⁻¹]_ii``, is less than the second number, an estimate.
_DUAL_FROM, _INFLATION = 1 / 3, 5.0
# The following are estimates. Iterations between two looks at the progress, each of which is a host sync.
_PERIOD = 4
# The bound is taken for final, and the kept weights' turn comes, when it is estimated to rise by no more than this
# part of the tolerance. The violation of the constraint decays later than the bound rises, and repairing it is dear.
_BOUND_TOLERANCE = 0.1
# The preconditioner is corrected if this adds so much to its energy of the residual.
_WORTH = 0.1
# Most restarts of a part from the residual in full precision.
_REPLACEMENTS = 3


# Gives the leading vectors of G and A, which a solve may need, or not.
Leading = Callable[[], tuple[Tensor, Tensor]]


class JointUpdate(NamedTuple):
    """Result of :func:`joint_update`."""

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
    start: Tensor | None = None,
    leading: Leading | None = None,
    tolerance: float = 0.01,
    max_iterations: int = 200,
) -> JointUpdate:
    """Minimise ``½ tr(Δᵀ G Δ A)`` subject to ``Δ = -W`` on every pruned weight (eq. 8 with all K weights at once).

    Two problems in turn, both by :func:`~surgeon_kernels.linalg.masked_cg.masked_cg`, whose iterations are one product
    with two matrices each:

    1. The dual, ``P ∘ (G⁻¹ Λ A⁻¹) = P ∘ W`` for multipliers ``Λ`` on the pruned positions ``P``. Its value
       ``⟨Λ, W⟩ - ½ ⟨Λ, G⁻¹ Λ A⁻¹⟩`` is a lower bound of the optimum, rises with every iteration, and meets it with
       ``Δ = -G⁻¹ Λ A⁻¹``. Large eigenvalues of ``G`` and ``A`` (outlier channels), which make the problem of the kept
       weights ill-conditioned, are small ones here. Where these still slow the first iterations down, the rest of
       them has a better preconditioner than the diagonal (:class:`~surgeon_kernels.linalg.low_rank.LowRankCorrection`).
    2. That ``Δ`` is made feasible: it is set to ``-W`` on ``P``. Its cost lies along the large eigenvalues;
       iterations on the kept weights, ``kept ∘ (G D A)`` being the operator, take it back first.

    It stops when the objective is within ``tolerance`` of the lower bound. Where few weights are kept that hardly
    depend on each other, and without the inverses, there is the second part only, from ``Δ = 0`` on the kept weights,
    and the gap is an estimate from the objective's trace (:func:`~surgeon_kernels.updates.convergence.estimated_gap`).
    Products within the iterations are of operands rounded to 11 bits on CUDA; after each part value and residual are
    computed anew in full precision, and the part goes on from there if it is not finished.

    Args:
        weight: ``[R, C]``; pruned: bool ``[R, C]``; G: damped ``[R, R]``; A: damped ``[C, C]``; G_inv, A_inv: their
            inverses. All of one dtype.
        second: a second pair ``(G₂, A₂)`` for the curvature ``G ⊗ A + G₂ ⊗ A₂``, whose inverse is no product:
            excludes the inverses.
        start: multipliers ``[R, C]`` to begin the dual at, on the pruned positions: another mask's, minus the
            gradient that was returned for it, say. Any other numbers cost iterations, no more.
        leading: gives the :func:`~surgeon_kernels.linalg.low_rank.leading_vectors` of ``G`` and of ``A``, where several
            solves share them; left out, a solve that needs them computes them.
        tolerance: relative gap to the optimum to stop at.
        max_iterations: cap on the iterations of both parts together; 0 only zeroes.

    Raises:
        NotPositiveDefiniteError: the diagonal of the curvature or of an inverse is not positive throughout: it was not
            damped, or holds NaN.
        ValueError: shapes or devices that do not fit, one inverse alone, or a tolerance below 0.
        TypeError: dtypes that do not fit.
    """
    _check(weight, pruned, G, A, G_inv, A_inv, start, tolerance)
    if (G_inv is None) != (A_inv is None) or (second is not None and G_inv is not None):
        raise ValueError("give both inverses or neither, and none beside a second pair")
    if second is not None:
        check_layer(weight, G_2=second[0], A_2=second[1])
    terms = [(G, A)] if second is None else [(G, A), second]
    if not bool(_positive_diagonal(terms, [M for M in (G_inv, A_inv) if M is not None])):
        raise NotPositiveDefiniteError("the curvature's diagonal is not positive throughout")
    if G_inv is not None and A_inv is not None and not _kept_weights_are_easier(pruned, [(G, G_inv), (A, A_inv)]):
        dual = _Dual(pruned, G, A, G_inv, A_inv, leading)
        delta, bound = _solve_dual(weight, pruned, dual, start, tolerance, max_iterations)
    else:
        delta, bound = torch.where(pruned, -weight, 0.0), [0.0]
    gradient = product(terms, delta)
    trace = [0.5 * _dot(delta, gradient)]
    certified = bound[-1] > 0.0

    def gap() -> float:
        return max(trace[-1] / bound[-1] - 1.0, 0.0) if certified else estimated_gap(trace)

    last_gap = gap()
    for _ in range(_REPLACEMENTS):
        left, before = max_iterations + 2 - len(trace) - len(bound), trace[-1]
        if left <= 0 or last_gap <= tolerance:
            break
        solver = masked_cg(terms, ~pruned, gradient.neg_().masked_fill_(pruned, 0.0))
        del gradient
        solved = _iterate(solver, trace, -1.0, left, lambda: gap() <= tolerance)
        delta += solver.x
        del solver
        gradient = product(terms, delta)
        last_gap, claimed = 0.0 if solved else gap(), trace[-1]
        trace[-1] = 0.5 * _dot(delta, gradient)
        last_gap = gap() if certified else last_gap + max(trace[-1] / claimed - 1.0, 0.0)
        if not trace[-1] < before:  # no progress in this precision
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
    start: Tensor | None = None,
    leading: Leading | None = None,
    tolerance: float = 0.01,
    max_iterations: int = 200,
) -> JointUpdate:
    """Estimate the optimum that :func:`joint_update` finds, for choosing other weights: the dual alone, no certificate.

    The optimum's gradient is ``-Λ``, to which the multipliers of the dual converge long before ``G Δ A`` does: there
    the remaining violation of the constraint is multiplied by the large eigenvalues of ``G`` and ``A``.
    ``bound`` is within about ``tolerance`` of the optimum's value (unless ``max_iterations`` ends it before),
    ``gradient`` is ``-Λ``, ``objective`` is empty and ``gap`` infinite. A few iterations from ``start`` are enough to
    tell one mask from the next, whatever is kept. Arguments and errors are :func:`joint_update`'s.
    """
    _check(weight, pruned, G, A, G_inv, A_inv, start, tolerance)
    wanted, inverses = weight.masked_fill(~pruned, 0.0), (G_inv, A_inv)
    multipliers, image, value = _scaled_start(start, wanted, pruned, inverses, parts=1)
    residual, bound = (wanted - image).masked_fill_(~pruned, 0.0), [value]
    del wanted, image

    def enough() -> bool:
        return still_to_rise(bound) <= tolerance

    dual = _Dual(pruned, G, A, *inverses, leading)
    gradient = multipliers.add_(dual.solve(residual, bound, max_iterations, enough)).neg_()
    del residual
    rough = product([inverses], gradient, parts=1)
    return JointUpdate(torch.where(pruned, -weight, rough), [], bound, gradient, math.inf)


def objective(delta: Tensor, G: Tensor, A: Tensor) -> float:
    """The predicted increase of the mean loss ``½ tr(Δᵀ G Δ A)``, in nats per token, summed in float64.

    Args:
        delta: ``[R, C]``; G: ``[R, R]``; A: ``[C, C]``, of one dtype (ValueError, TypeError otherwise).
    """
    check_layer(delta, G=G, A=A)
    return 0.5 * _dot(delta, G @ delta @ A)


def _solve_dual(
    weight: Tensor,
    pruned: Tensor,
    dual: _Dual,
    start: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, list[float]]:
    """The feasible ``Δ`` of the dual's solution, and the bound after 0, 1, 2, ... iterations."""
    wanted = weight.masked_fill(~pruned, 0.0)
    multipliers, image, value = _scaled_start(start, wanted, pruned, dual.inverses, parts=2)
    full, bound = image.neg_(), [value]

    def enough() -> bool:
        return still_to_rise(bound) <= _BOUND_TOLERANCE * tolerance

    for _ in range(_REPLACEMENTS):
        left = max_iterations + 1 - len(bound)
        multipliers += dual.solve((wanted + full).masked_fill_(~pruned, 0.0), bound, left, enough)
        full = product([dual.inverses], multipliers).neg_()
        claimed, bound[-1] = bound[-1], _dot(multipliers, wanted) + 0.5 * _dot(multipliers, full)
        if bound[-1] >= (1.0 - _BOUND_TOLERANCE * tolerance) * claimed or len(bound) > max_iterations:
            break
    return torch.where(pruned, -weight, full), bound


def _scaled_start(
    start: Tensor | None, wanted: Tensor, pruned: Tensor, inverses: tuple[Tensor, Tensor], *, parts: int
) -> tuple[Tensor, Tensor, float]:
    """The best multiple ``Λ`` of ``start`` on the pruned weights, ``G⁻¹ Λ A⁻¹`` and the dual's value, at least 0."""
    if start is not None:
        multipliers = start.masked_fill(~pruned, 0.0)
        image = product([inverses], multipliers, parts=parts)
        along, curvature = _dot(multipliers, wanted), _dot(multipliers, image)
        if along > 0.0 and 0.0 < curvature < math.inf:
            scale = along / curvature
            return multipliers.mul_(scale), image.mul_(scale), 0.5 * scale * along
    return torch.zeros_like(wanted), torch.zeros_like(wanted), 0.0


class _Dual:
    """``P ∘ (G⁻¹ Λ A⁻¹) = B`` by conjugate gradients, whose preconditioner is corrected once the diagonal is slow."""

    def __init__(
        self, pruned: Tensor, G: Tensor, A: Tensor, G_inv: Tensor, A_inv: Tensor, leading: Leading | None
    ) -> None:
        self.inverses = G_inv, A_inv
        self._pruned = pruned
        self._leading = leading or (lambda: (leading_vectors(G, G_inv), leading_vectors(A, A_inv)))
        self._correction: LowRankCorrection | None = None
        self._settled = False  # whether there is to be one

    def solve(self, residual: Tensor, bound: list[float], iterations: int, enough: Callable[[], bool]) -> Tensor:
        """``Λ`` for ``B = residual``, which is taken over; each iteration appends to the ``bound``."""
        inverse, before = [self.inverses], len(bound)
        solver = masked_cg(inverse, self._pruned, residual, self._correction)
        first = iterations if self._settled else min(FIRST_ESTIMATE, iterations)
        solved = _iterate(solver, bound, 1.0, first, enough)
        left = iterations - (len(bound) - before)
        if solved or left <= 0 or enough():
            return solver.x
        self._settled, residual = True, solver.residual
        correction = low_rank_correction(*self._leading(), self._pruned)
        if not self._worth(correction, residual):
            _iterate(solver, bound, 1.0, left, enough)
            return solver.x
        self._correction = correction
        x = solver.x
        del solver
        solver = masked_cg(inverse, self._pruned, residual, correction)
        _iterate(solver, bound, 1.0, left, enough)
        return x.add_(solver.x)

    def _worth(self, correction: LowRankCorrection, residual: Tensor) -> bool:
        """True if much of the residual lies where the correction changes something."""
        rows, columns = (inverse.diagonal().rsqrt() for inverse in self.inverses)
        X = scaled(residual, rows, columns)
        return bool(correction.factors(X)[2] >= _WORTH * torch.linalg.vector_norm(X, dtype=torch.float64) ** 2)


def _check(
    weight: Tensor,
    pruned: Tensor,
    G: Tensor,
    A: Tensor,
    G_inv: Tensor | None,
    A_inv: Tensor | None,
    start: Tensor | None,
    tolerance: float,
) -> None:
    check_layer(weight, pruned, *[x for x in (start,) if x is not None], G=G, A=A, G_inv=G_inv, A_inv=A_inv)
    if not tolerance >= 0.0:
        raise ValueError(f"tolerance must be at least 0, not {tolerance}")


def _positive_diagonal(terms: Terms, inverses: Sequence[Tensor]) -> Tensor:
    if len(terms) == 1:
        return torch.stack([(M.diagonal() > 0.0).all() for M in (*terms[0], *inverses)]).all()
    row_scales = torch.stack([L.diagonal() for L, _ in terms])
    return (row_scales.T @ torch.stack([M.diagonal() for _, M in terms]) > 0.0).all()


def _kept_weights_are_easier(pruned: Tensor, factors: Terms) -> bool:
    if not pruned.numel():
        return False
    kept = 1.0 - pruned.count_nonzero() / pruned.numel()
    inflations = [(M.diagonal() * inverse.diagonal()).double().mean() for M, inverse in factors]
    return bool((kept < _DUAL_FROM) & (kept * math.prod(inflations) < _INFLATION))


def _iterate(solver: MaskedCG, values: list[float], sign: float, iterations: int, enough: Callable[[], bool]) -> bool:
    """Iterate and append the values until ``enough``; True if it ended because nothing changes any more."""
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


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
