"""Costs of removing a weight, a row or a column by each method, as its record names them."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.config.methods import Method
from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.errors import InputError
from llm_surgeon.models.decoder import PrunableLinear
from surgeon_kernels import WeightCosts, column_cost, element_cost, row_cost


def element_costs(linear: PrunableLinear, method: Method, factors: DampedFactors | None) -> WeightCosts:
    """Cost of removing each weight of ``linear`` on its own, ``[R, C]`` (no bias column), not yet computed."""
    costs = _own_costs(linear, method, factors)
    if isinstance(costs, Tensor):
        return WeightCosts(costs[:, : linear.columns].float())
    g, a = costs
    return WeightCosts(linear.weight, g, a[: linear.columns])


def row_column_costs(linear: PrunableLinear, method: Method, factors: DampedFactors | None) -> tuple[Tensor, Tensor]:
    """Cost of removing each row ``[R]`` (its bias goes too) and each column ``[C]`` of ``linear``.

    Methods that take all weights to be independent, with no ``line_costs`` of their own, sum their element costs.
    """
    if method.line_costs is not None:
        return method.function("line_costs")(linear, factors)
    costs = _own_costs(linear, method, factors)
    if not isinstance(costs, Tensor):
        costs = element_cost(linear.matrix(device=None if factors is None else factors.device), *costs)
    return costs.sum(dim=1), costs.sum(dim=0)[: linear.columns]


def _own_costs(linear: PrunableLinear, method: Method, factors: DampedFactors | None) -> Tensor | tuple[Tensor, Tensor]:
    """What the function of ``method`` returns: costs ``[R, C']``, or ``g`` ``[R]`` and ``a`` ``[C']``.

    Raises:
        InputError: it returns anything else.
    """
    costs = method.function("costs")(linear, factors)
    R, C = linear.rows, linear.columns + linear.has_bias
    parts = costs if isinstance(costs, tuple) else (costs,)
    found = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    if found not in ([(R, C)], [(R,), (C,)]):
        what = " and ".join(str(list(part)) if isinstance(part, tuple) else part for part in found) or "nothing"
        raise InputError(
            f"costs of method {method.name!r} for {linear.name} must be [{R}, {C}], or g [{R}] and a [{C}], not {what}"
            + (" (its bias is the last column)" if linear.has_bias else "")
        )
    return costs


def surgeon_costs(linear: PrunableLinear, factors: DampedFactors) -> tuple[Tensor, Tensor]:
    """Costs ``½ W² / ([G⁻¹]_rr [A⁻¹]_cc)``: the other weights make up for each, under the damped factors."""
    g_inv, a_inv = factors.inverse_diagonals(linear)
    return 1.0 / g_inv, 1.0 / a_inv


def surgeon_line_costs(linear: PrunableLinear, factors: DampedFactors) -> tuple[Tensor, Tensor]:
    """Costs ``½ (W A Wᵀ)_rr / [G⁻¹]_rr`` of rows and ``½ (Wᵀ G W)_cc / [A⁻¹]_cc`` of columns."""
    weight = linear.matrix(device=factors.device)
    G, A = factors.of(linear).damped
    g_inv, a_inv = factors.inverse_diagonals(linear)
    return row_cost(weight, A, 1.0 / g_inv), column_cost(weight, G, 1.0 / a_inv)[: linear.columns]


def kronecker_costs(linear: PrunableLinear, factors: DampedFactors) -> tuple[Tensor, Tensor]:
    """Costs ``½ W² G_rr A_cc``: the others stay as they are (optimal brain damage)."""
    g, a = factors.diagonals(linear)
    assert g is not None
    return g, a


def input_costs(linear: PrunableLinear, factors: DampedFactors) -> tuple[Tensor, Tensor]:
    """Costs ``½ W² A_cc``: the output's error (layer-wise optimal brain damage; Wanda's score, squared)."""
    _, a = factors.diagonals(linear)
    return torch.ones(linear.rows, device=a.device), a


def magnitude_costs(linear: PrunableLinear, factors: DampedFactors | None) -> tuple[Tensor, Tensor]:
    """Costs ``½ W²``."""
    ones = torch.ones(max(linear.rows, linear.columns + 1), device=linear.weight.device)
    return ones[: linear.rows], ones[: linear.columns + linear.has_bias]
