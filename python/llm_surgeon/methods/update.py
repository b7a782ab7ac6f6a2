"""The new weights of one layer after its selection."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import KroneckerFactors, numerical_errors
from llm_surgeon.errors import NumericalError
from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.swaps import solve_with_swaps
from llm_surgeon.models.passes import to_list
from surgeon_kernels import chunked_update, independent_update, rows_columns_update


@dataclass(frozen=True)
class LayerUpdate:
    """New weights of a layer and what its solver reported."""

    weight: Tensor  # [R, C'], exactly +0.0 where pruned
    delta: Tensor  # [R, C']
    selection: Selection  # what is pruned, swaps included
    objective: list[float] = field(default_factory=list)  # joint solver only, like bound and gap: see JointUpdate
    bound: list[float] = field(default_factory=list)
    gap: float | None = None  # None where the solver could not tell
    jitter: float = 0.0


class Written(NamedTuple):
    """What is told of a linear whose new weights were written.

    Attributes:
        pruned: bool ``[R, C]``, where the update changed what was selected; else ``None``.
        objective, bound, gap: see :class:`LayerUpdate`.
        increase: predicted, nats per token, a scalar on any device; ``None`` where it is not known.
        jitter: what a factorisation needed.
    """

    pruned: Tensor | None
    objective: list[float]
    bound: list[float]
    gap: float | None
    increase: Tensor | None
    jitter: float

    @classmethod
    def of(cls, update: LayerUpdate, increase: Tensor | None, jitter: float, *, changed: bool) -> Written:
        pruned = update.selection.pruned if changed else None
        return cls(pruned, update.objective, update.bound, update.gap, increase, jitter)


def remove(weight: Tensor, selection: Selection) -> LayerUpdate:
    """Zero what is selected and leave the rest as it is."""
    pruned = selection.with_bias(weight.shape[1])
    return LayerUpdate(weight.masked_fill(pruned, 0.0), torch.where(pruned, -weight, 0.0), selection)


def remove_and_compensate(
    weight: Tensor, selection: Selection, factors: KroneckerFactors, config: PruneConfig, name: str
) -> LayerUpdate:
    """Zero what is selected and move the surviving weights (and the bias) by ``config.update``.

    Does not check that the result is finite, to avoid a host sync.

    Args:
        weight: ``[R, C']``, the bias as last column where there is one.

    Raises:
        NumericalError: a factorisation failed; the message names the layer.
    """
    if config.update == "none":
        return remove(weight, selection)
    pruned = selection.with_bias(weight.shape[1])
    trace: list[float] = []
    bound: list[float] = []
    gap, jitter = None, 0.0
    with numerical_errors(f"update of {name}"):
        if selection.rows is not None and selection.columns is not None:
            delta = _rows_columns_delta(weight, selection, factors, config, name)
        elif config.update == "independent":
            delta = independent_update(weight, pruned, *factors.inverses)
        elif config.update == "chunked":
            delta, jitter = chunked_update(weight, pruned, *factors.inverses, max_correlated=config.max_correlated)
        else:
            solved, selection = solve_with_swaps(weight, selection, factors, config)
            pruned = selection.with_bias(weight.shape[1])
            delta, trace, bound = solved.delta, solved.objective, solved.bound
            gap = solved.gap if math.isfinite(solved.gap) else None
    return LayerUpdate((weight + delta).masked_fill(pruned, 0.0), delta, selection, trace, bound, gap, jitter)


def _rows_columns_delta(
    weight: Tensor, selection: Selection, factors: KroneckerFactors, config: PruneConfig, name: str
) -> Tensor:
    assert selection.rows is not None and selection.columns is not None
    bias = selection.columns.new_zeros(weight.shape[1] - selection.columns.numel())
    columns = torch.cat([selection.columns, bias])
    if config.update == "joint":
        counts = selection.removed
        return rows_columns_update(weight, *factors.damped, selection.rows, columns, removed=counts, name=name)
    # Eq. 13: the update of every single row and column as if it went alone, all summed.
    G_inv, A_inv = factors.inverses
    rows_part = G_inv / G_inv.diagonal() @ weight.masked_fill(~selection.rows[:, None], 0.0)
    columns_part = (weight / A_inv.diagonal()).masked_fill(~columns, 0.0) @ A_inv
    pruned = selection.rows[:, None] | columns
    return torch.where(pruned, -weight, -rows_part - columns_part)


def checked_increases(increases: dict[str, Tensor]) -> dict[str, float]:
    """Predicted increases of linears by name, on the host.

    Raises:
        NumericalError: one is NaN or infinite; the linear is named.
    """
    # Read back together: the host runs ahead of the device.
    found = dict(zip(increases, to_list(list(increases.values())), strict=True))
    for name, increase in found.items():
        if not math.isfinite(increase):
            raise NumericalError(f"update of {name} holds NaN or infinity: raise damp_g or damp_a")
    return found
