"""Swaps of kept and pruned weights, in rounds around the joint update of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import KroneckerFactors
from llm_surgeon.methods.select import Selection, reselect
from surgeon_kernels import JointUpdate, joint_estimate, joint_update, swap_cost

# How near to the optimum the first round's multipliers come, and the iterations of each further round, which begins at
# the last one's. A round moves too many weights, each judged alone, and the next puts right what it did wrong.
_ROUGH, _ROUND = 0.05, 4
# Where less than the first fraction of a layer is kept, weights that gain by coming back are many and depend on each
# other: so much of its gain counts, or a round takes more back than pays. Both are estimates.
_FEW, _GAIN = 0.45, 0.8


def solve_with_swaps(
    weight: Tensor, selection: Selection, factors: KroneckerFactors, config: PruneConfig
) -> tuple[JointUpdate, Selection]:
    """The joint update, after ``config.swaps`` rounds of a better selection from the last one's multipliers.

    A round's multipliers begin at those of the last one, and so do the solution's: few iterations bring them near.
    Where the swaps did not lower the objective, the ``selection`` that was given is solved for and returned.

    Args:
        weight: ``[R, C']``, the bias as last column where there is one.
    """
    matrices = *factors.damped, *factors.inverses
    options: dict[str, Any] = {
        "tolerance": config.tolerance,
        "max_iterations": config.max_iterations,
        "leading": factors.leading,
    }

    def solve(chosen: Selection, start: Tensor | None = None) -> JointUpdate:
        return joint_update(weight, chosen.with_bias(weight.shape[1]), *matrices, start=start, **options)

    def estimate(chosen: Selection, **settings: Any) -> JointUpdate:
        return joint_estimate(weight, chosen.with_bias(weight.shape[1]), *matrices, **settings)

    if not config.swaps:
        return solve(selection), selection
    rough = estimate(selection, **options | {"tolerance": _ROUGH})
    value = rough.bound[-1]
    chosen, multipliers = selection, None
    for index in range(config.swaps):
        if index:
            rough = estimate(chosen, start=multipliers, leading=factors.leading, max_iterations=_ROUND)
        changed, multipliers = _swapped(weight, chosen, rough, factors, config), rough.gradient.neg_()
        if torch.equal(changed.pruned, chosen.pruned):
            break
        chosen = changed
    del rough
    solved = solve(chosen, multipliers)
    if chosen is selection or solved.objective[-1] < value:
        return solved, chosen
    before = solve(selection)
    return (solved, chosen) if solved.objective[-1] < before.objective[-1] else (before, selection)


def _swapped(
    weight: Tensor, selection: Selection, estimate: JointUpdate, factors: KroneckerFactors, config: PruneConfig
) -> Selection:
    """The selection that is better by the ``estimate`` of the joint update for ``selection``."""
    costs = swap_cost(
        weight + estimate.delta,
        selection.with_bias(weight.shape[1]),
        estimate.gradient,
        *factors.damped,
        *factors.inverse_diagonals,
    )[:, : selection.pruned.shape[1]]
    pruned = selection.pruned
    few = pruned.count_nonzero() > (1.0 - _FEW) * pruned.numel()
    costs = torch.where(pruned & few, _GAIN * costs, costs)
    return Selection(reselect(pruned, costs, config))
