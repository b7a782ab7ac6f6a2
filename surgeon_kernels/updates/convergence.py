"""Convergence of conjugate gradients, extrapolated from the changes that the iterations have made so far."""

from __future__ import annotations

import math

# Iterations before an extrapolation is made (an estimate): enough to smooth the irregular single steps.
FIRST_ESTIMATE = 8


def still_to_rise(bound: list[float]) -> float:
    """Relative rise still to come of the dual's lower bound, extrapolated from its rises so far.

    With ``s₀`` and ``s₁`` the rises over the last third of the iterations and the third before, these are taken to go
    on as a geometric series: ``s₁ q / (1 - q)``, ``q = s₁ / s₀``. The dual is well-conditioned, its error falls so.
    Infinite for the first iterations and while the rises grow.
    """
    n = len(bound) - 1
    third = n // 3
    if n < FIRST_ESTIMATE:
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
    if n < FIRST_ESTIMATE:
        return math.inf
    before, last = trace[4 * n // 9] - trace[2 * n // 3], trace[2 * n // 3] - trace[n]
    if last <= 0.0:
        return 0.0
    if last >= before:
        return math.inf
    to_come = last * last / (before - last)
    optimum = trace[-1] - to_come
    return to_come / optimum if optimum > 0.0 else math.inf
