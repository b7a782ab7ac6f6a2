"""The new weights of one layer after its selection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import DampedFactor
from llm_surgeon.errors import NumericalError
from llm_surgeon.methods.select import Selection, reselect
from surgeon_kernels import (
    JointUpdate,
    NotPositiveDefiniteError,
    chunked_update,
    independent_update,
    joint_estimate,
    joint_update,
    rows_columns_update,
    swap_cost,
)

# How near to the optimum the first round's multipliers come, and the iterations of each further round, which begins at
# the last one's. A round moves too many weights, each judged alone, and the next puts right what it did wrong.
_ROUGH, _ROUND = 0.05, 4


@dataclass(frozen=True)
class LayerUpdate:
    """New weights of a layer and what its solver reported."""

    weight: Tensor  # [R, C'], exactly +0.0 where pruned
    delta: Tensor  # [R, C']
    selection: Selection  # what is pruned, exchanges included
    objective: list[float] = field(default_factory=list)  # joint solver only, like bound and gap: see JointUpdate
    bound: list[float] = field(default_factory=list)
    gap: float | None = None  # None where the solver could not tell
    jitter: float = 0.0


def remove(weight: Tensor, selection: Selection) -> LayerUpdate:
    """Zero what is selected and leave the rest as it is."""
    pruned = with_bias(selection, weight.shape[1])
    return LayerUpdate(weight.masked_fill(pruned, 0.0), torch.where(pruned, -weight, 0.0), selection)


def remove_and_compensate(
    weight: Tensor, selection: Selection, g: DampedFactor, a: DampedFactor, config: PruneConfig, name: str
) -> LayerUpdate:
    """Zero what is selected and move the surviving weights (and the bias) by ``config.update``.

    Whether the result is finite is not asked: the host would wait for the device.

    Args:
        weight: ``[R, C']``, the bias as last column where there is one.
        g, a: damped factors ``[R, R]``, ``[C', C']`` with their inverses.

    Raises:
        NumericalError: a factorisation failed; the message names the layer.
    """
    if config.update == "none":
        return remove(weight, selection)
    pruned = with_bias(selection, weight.shape[1])
    trace: list[float] = []
    bound: list[float] = []
    gap, jitter = None, 0.0
    try:
        if selection.rows is not None and selection.columns is not None:
            delta = _rows_columns_delta(weight, selection, g, a, config, name)
        elif config.update == "independent":
            delta = independent_update(weight, pruned, g.inverse, a.inverse)
        elif config.update == "chunked":
            delta, jitter = chunked_update(weight, pruned, g.inverse, a.inverse, max_correlated=config.max_correlated)
        else:
            solved, selection = _solve(weight, selection, g, a, config)
            pruned = with_bias(selection, weight.shape[1])
            delta, trace, bound = solved.delta, solved.objective, solved.bound
            gap = solved.gap if math.isfinite(solved.gap) else None
    except NotPositiveDefiniteError as error:
        raise NumericalError(f"update of {name}: {error}") from error
    return LayerUpdate((weight + delta).masked_fill(pruned, 0.0), delta, selection, trace, bound, gap, jitter)


def _solve(
    weight: Tensor, selection: Selection, g: DampedFactor, a: DampedFactor, config: PruneConfig
) -> tuple[JointUpdate, Selection]:
    """The joint update, after ``config.exchanges`` rounds of a better selection from the last one's multipliers.

    A round's multipliers begin at those of the last one, and so do the solution's: few iterations bring them near.
    """
    assert config.exchanges is not None
    factors = g.damped, a.damped, g.inverse, a.inverse
    options: dict[str, Any] = {"tolerance": config.tolerance, "max_iterations": config.max_iterations}

    def solve(chosen: Selection, start: Tensor | None = None) -> JointUpdate:
        return joint_update(weight, with_bias(chosen, weight.shape[1]), *factors, start=start, **options)

    def estimate(chosen: Selection, **settings: Any) -> JointUpdate:
        return joint_estimate(weight, with_bias(chosen, weight.shape[1]), *factors, **settings)

    if not config.exchanges:
        return solve(selection), selection
    rough = estimate(selection, **options | {"tolerance": _ROUGH})
    value = rough.objective[-1] if rough.objective else rough.bound[-1]
    chosen, multipliers = selection, None
    for index in range(config.exchanges):
        if index:
            rough = estimate(chosen, start=multipliers, max_iterations=_ROUND)
        changed, multipliers = _exchanged(weight, chosen, rough, g, a, config), rough.gradient.neg_()
        if torch.equal(changed.pruned, chosen.pruned):
            break
        chosen = changed
    del rough
    solved = solve(chosen, multipliers)
    if chosen is selection or solved.objective[-1] < value:
        return solved, chosen
    before = solve(selection)
    return (solved, chosen) if solved.objective[-1] < before.objective[-1] else (before, selection)


def _exchanged(
    weight: Tensor, selection: Selection, estimate: JointUpdate, g: DampedFactor, a: DampedFactor, config: PruneConfig
) -> Selection:
    """The selection that is better by the ``estimate`` of the joint update for ``selection``."""
    cost = swap_cost(
        weight + estimate.delta,
        with_bias(selection, weight.shape[1]),
        estimate.gradient,
        g.damped,
        a.damped,
        g.inverse.diagonal(),
        a.inverse.diagonal(),
    )[:, : selection.pruned.shape[1]]
    return Selection(reselect(selection.pruned, cost, config))


def with_bias(selection: Selection, width: int) -> Tensor:
    """The pruned mask ``[R, C']``: a bias (column ``C`` where ``width = C + 1``) goes only with its whole row."""
    pruned = selection.pruned
    if width == pruned.shape[1]:
        return pruned
    bias = torch.zeros_like(pruned[:, :1]) if selection.rows is None else selection.rows[:, None]
    return torch.cat([pruned, bias], dim=1)


def _rows_columns_delta(
    weight: Tensor, selection: Selection, g: DampedFactor, a: DampedFactor, config: PruneConfig, name: str
) -> Tensor:
    assert selection.rows is not None and selection.columns is not None
    bias = selection.columns.new_zeros(weight.shape[1] - selection.columns.numel())
    columns = torch.cat([selection.columns, bias])
    if config.update == "joint":
        counts = selection.removed
        return rows_columns_update(weight, g.damped, a.damped, selection.rows, columns, removed=counts, name=name)
    # Eq. 13: the update of every single row and column as if it went alone, all summed.
    rows_part = g.inverse / g.inverse.diagonal() @ weight.masked_fill(~selection.rows[:, None], 0.0)
    columns_part = (weight / a.inverse.diagonal()).masked_fill(~columns, 0.0) @ a.inverse
    pruned = selection.rows[:, None] | columns
    return torch.where(pruned, -weight, -rows_part - columns_part)
