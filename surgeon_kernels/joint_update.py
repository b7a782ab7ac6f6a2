"""The exact joint update: all pruned weights compensated for at once, by preconditioned conjugate gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.spd_inverse import spd_inverse

# Iterations before the gap is estimated at all: enough to smooth the irregular single steps of CG.
_FIRST_ESTIMATE = 8


class JointUpdate(NamedTuple):
    """What :func:`joint_update` returns."""

    delta: Tensor  # [R, C], -W on every pruned weight
    objective: list[float]  # ½ tr(Δᵀ G Δ A) of the start and after each iteration: never increases
    gap: float  # estimated (objective - optimum) / optimum at the end; inf if too few iterations to tell
    jitter: float  # largest relative jitter the preconditioner's factorisations needed, normally 0.0


def joint_update(
    weight: Tensor,
    pruned: Tensor,
    G: Tensor,
    A: Tensor,
    *,
    start: Tensor | None = None,
    tolerance: float = 0.01,
    max_iterations: int = 100,
    name: str = "layer",
) -> JointUpdate:
    """Minimise ``½ tr(Δᵀ G Δ A)`` subject to ``Δ = -W`` on every pruned weight (eq. 8 with all K weights at once).

    Conjugate gradients on the kept weights, whose operator is ``mask ∘ (G D A)``: every iterate is feasible and the
    objective falls monotonically. The preconditioner is ``mask ∘ (Ĝ⁻¹ R Â⁻¹)`` with off-diagonals shrunk,
    ``M̂ = ρ M + (1 - ρ) diag M``. ``ρ = √d`` with d the kept fraction: a pair of different weights is coupled in the
    masked problem only when both are kept, with probability d given one of them, and in ``Ĝ ⊗ Â`` a pair that
    differs in row and column is scaled by ρ².

    Iteration stops when the gap to the optimum, as :func:`estimated_gap` extrapolates it from the decreases so far,
    is below ``tolerance``.

    Args:
        weight: ``[R, C]``; pruned: bool ``[R, C]``; G: damped ``[R, R]``; A: damped ``[C, C]``, of one dtype.
        start: a first guess of ``Δ`` ``[R, C]`` (a chunked update); scaled by its own exact line search. Its values
            at pruned weights are ignored.
        tolerance: relative gap to the optimum to stop at.
        max_iterations: cap on iterations; 0 returns the scaled start.
        name: the layer, for error messages.

    Raises:
        NotPositiveDefiniteError: a shrunk factor is not positive definite; the message names the layer.
    """
    problem = _Problem(weight, pruned, G, A)
    step, residual, objective = problem.begin(start)
    density = 1.0 - float(pruned.double().mean()) if pruned.numel() else 1.0
    G_hat, A_hat = (
        spd_inverse(_shrink(M, density**0.5), name=f"{name}: shrunk {symbol}") for symbol, M in (("G", G), ("A", A))
    )
    trace, solved = [objective], False
    direction, energy = torch.zeros_like(weight), 0.0
    while len(trace) <= max_iterations and estimated_gap(trace) > tolerance:
        z = problem.mask(G_hat.inverse @ residual @ A_hat.inverse)
        previous, energy = energy, _dot(residual, z)
        if energy <= 0.0:  # the residual has vanished: exactly, or to rounding
            solved = energy == 0.0
            break
        direction = z + direction * (energy / previous) if previous else z
        image = problem.apply(direction)
        curvature = _dot(direction, image)
        if curvature <= 0.0:
            break
        length = energy / curvature
        decrease = 0.5 * length * energy
        if not trace[-1] - decrease >= 0.0:  # below what this dtype resolves (or NaN): the step is noise
            break
        step.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        trace.append(trace[-1] - decrease)
    delta = torch.where(pruned, -weight, step)
    return JointUpdate(delta, trace, 0.0 if solved else estimated_gap(trace), max(G_hat.jitter, A_hat.jitter))


def objective(delta: Tensor, G: Tensor, A: Tensor) -> float:
    """The predicted increase of the mean loss ``½ tr(Δᵀ G Δ A)``, in nats per token, summed in float64."""
    return 0.5 * _dot(delta, G @ delta @ A)


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
        return float("inf")
    before, last = trace[4 * n // 9] - trace[2 * n // 3], trace[2 * n // 3] - trace[n]
    if last <= 0.0:
        return 0.0
    if last >= before:
        return float("inf")
    ratio = last / before
    to_come = last * ratio / (1.0 - ratio)
    optimum = trace[-1] - to_come
    return to_come / optimum if optimum > 0.0 else float("inf")


class _Problem:
    """The quadratic problem restricted to kept weights."""

    def __init__(self, weight: Tensor, pruned: Tensor, G: Tensor, A: Tensor) -> None:
        self.weight, self.pruned, self.G, self.A = weight, pruned, G, A

    def mask(self, X: Tensor) -> Tensor:
        return X.masked_fill_(self.pruned, 0.0)

    def apply(self, D: Tensor) -> Tensor:
        return self.mask(self.G @ D @ self.A)

    def begin(self, start: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """The first step on the kept weights, the residual there (minus the gradient) and the objective."""
        zeroing = torch.where(self.pruned, -self.weight, torch.zeros_like(self.weight))
        gradient = self.G @ zeroing @ self.A
        value = 0.5 * _dot(zeroing, gradient)
        residual = self.mask(-gradient)
        if start is None:
            return torch.zeros_like(residual), residual, value
        step = self.mask(start.clone())
        image = self.apply(step)
        slope, curvature = _dot(step, residual), _dot(step, image)
        if curvature <= 0.0:
            return torch.zeros_like(residual), residual, value
        scale = slope / curvature
        return step * scale, residual - scale * image, max(value - 0.5 * scale * slope, 0.0)


def _shrink(M: Tensor, rho: float) -> Tensor:
    shrunk = rho * M
    shrunk.diagonal().copy_(M.diagonal())
    return shrunk


def _dot(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))
