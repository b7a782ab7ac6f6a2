"""The dual of the joint update: conjugate gradients on the multipliers of the pruned weights, and their bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from surgeon_kernels.linalg.kron_product import scaled
from surgeon_kernels.linalg.low_rank import LowRankCorrection, low_rank_correction
from surgeon_kernels.linalg.masked_cg import MaskedCG, masked_cg, product
from surgeon_kernels.updates.convergence import FIRST_ESTIMATE, still_to_rise

# Iterations between two looks at the progress, each of which waits for the device.
_PERIOD = 4
# The bound is taken for final, and the kept weights' turn comes, when it is estimated to rise by no more than this
# part of the tolerance. The violation of the constraint decays later than the bound rises, and repairing it is dear.
_BOUND_TOLERANCE = 0.1
# The preconditioner is corrected if this adds so much to its energy of the residual.
_WORTH = 0.1
# Times that a part is begun anew from the residual in full precision.
REPLACEMENTS = 3


def solve_dual(
    weight: Tensor,
    pruned: Tensor,
    G: Tensor,
    A: Tensor,
    G_inv: Tensor,
    A_inv: Tensor,
    start: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, list[float]]:
    """The feasible ``Δ`` of the dual's solution, and the bound after 0, 1, 2, ... iterations."""
    dual, wanted = Dual(pruned, G, A, G_inv, A_inv), weight.masked_fill(~pruned, 0.0)
    multipliers, image, value = begin(start, wanted, pruned, (G_inv, A_inv), parts=2)
    full, bound = image.neg_(), [value]

    def enough() -> bool:
        return still_to_rise(bound) <= _BOUND_TOLERANCE * tolerance

    for _ in range(REPLACEMENTS):
        left = max_iterations + 1 - len(bound)
        multipliers += dual.solve((wanted + full).masked_fill_(~pruned, 0.0), bound, left, enough)
        full = product([(G_inv, A_inv)], multipliers).neg_()
        claimed, bound[-1] = bound[-1], dot(multipliers, wanted) + 0.5 * dot(multipliers, full)
        if bound[-1] >= (1.0 - _BOUND_TOLERANCE * tolerance) * claimed or len(bound) > max_iterations:
            break
    return torch.where(pruned, -weight, full), bound


def begin(
    start: Tensor | None, wanted: Tensor, pruned: Tensor, inverses: tuple[Tensor, Tensor], *, parts: int
) -> tuple[Tensor, Tensor, float]:
    """The best multiple ``Λ`` of ``start`` on the pruned weights, ``G⁻¹ Λ A⁻¹`` and the dual's value, at least 0."""
    if start is not None:
        multipliers = start.masked_fill(~pruned, 0.0)
        image = product([inverses], multipliers, parts=parts)
        along, curvature = dot(multipliers, wanted), dot(multipliers, image)
        if along > 0.0 and 0.0 < curvature < math.inf:
            scale = along / curvature
            return multipliers.mul_(scale), image.mul_(scale), 0.5 * scale * along
    return torch.zeros_like(wanted), torch.zeros_like(wanted), 0.0


class Dual:
    """``P ∘ (G⁻¹ Λ A⁻¹) = B`` by conjugate gradients, whose preconditioner is corrected once the diagonal is slow."""

    def __init__(self, pruned: Tensor, G: Tensor, A: Tensor, G_inv: Tensor, A_inv: Tensor) -> None:
        self._pruned, self._factors = pruned, (G, A, G_inv, A_inv)
        self._correction: LowRankCorrection | None = None
        self._settled = False  # whether there is to be one

    def solve(self, residual: Tensor, bound: list[float], iterations: int, enough: Callable[[], bool]) -> Tensor:
        """``Λ`` for ``B = residual``, which is taken over; each iteration appends to the ``bound``."""
        inverse, begun = [self._factors[2:]], len(bound)
        solver = masked_cg(inverse, self._pruned, residual, self._correction)
        first = iterations if self._settled else min(FIRST_ESTIMATE, iterations)
        solved = iterate(solver, bound, 1.0, first, enough)
        left = iterations - (len(bound) - begun)
        if solved or left <= 0 or enough():
            return solver.x
        self._settled, residual = True, solver.residual
        correction = low_rank_correction(*self._factors, self._pruned)
        if not self._worth(correction, residual):
            iterate(solver, bound, 1.0, left, enough)
            return solver.x
        self._correction = correction
        x = solver.x
        del solver
        solver = masked_cg(inverse, self._pruned, residual, correction)
        iterate(solver, bound, 1.0, left, enough)
        return x.add_(solver.x)

    def _worth(self, correction: LowRankCorrection, residual: Tensor) -> bool:
        """Whether much of what is left to solve for lies where the correction changes something."""
        rows, columns = (inverse.diagonal().rsqrt() for inverse in self._factors[2:])
        X = scaled(residual, rows, columns)
        return bool(correction.factors(X)[2] >= _WORTH * torch.linalg.vector_norm(X, dtype=torch.float64) ** 2)


def iterate(solver: MaskedCG, values: list[float], sign: float, iterations: int, enough: Callable[[], bool]) -> bool:
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


def dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
