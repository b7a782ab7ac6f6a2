"""What each method takes the removal of a weight, a row or a column to cost."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.models.decoder import PrunableLinear
from surgeon_kernels import WeightCosts, column_cost, element_cost, row_cost


def element_costs(
    linear: PrunableLinear, method: str, curvature: Curvature | None, factors: DampedFactors | None
) -> WeightCosts:
    """Cost of removing each weight of ``linear`` on its own, ``[R, C]`` (no bias column), not yet computed.

    ``surgeon``: ``½ W² / ([G⁻¹]_rr [A⁻¹]_cc)``; ``k-obd``: ``½ W² G_rr A_cc``; ``l-obd`` and ``wanda``: ``½ W² A_cc``;
    ``magnitude``: ``½ W²``.
    """
    g, a = _sensitivities(linear, method, curvature, factors)
    return WeightCosts(linear.weight, g, a[: linear.columns])


def row_column_costs(
    linear: PrunableLinear, method: str, curvature: Curvature | None, factors: DampedFactors | None
) -> tuple[Tensor, Tensor]:
    """Cost of removing each row ``[R]`` (its bias goes too) and each column ``[C]`` of ``linear``.

    ``surgeon``: ``½ (W A Wᵀ)_rr / [G⁻¹]_rr`` and ``½ (Wᵀ G W)_cc / [A⁻¹]_cc``; the others, which take all weights
    to be independent, sum their element costs.
    """
    weight = linear.matrix(device=None if factors is None else factors.device)
    if method == "surgeon":
        assert factors is not None
        g, a = factors.of(linear)
        g_inv, a_inv = factors.inverse_diagonals(linear)
        rows = row_cost(weight, a.damped, 1.0 / g_inv)
        columns = column_cost(weight, g.damped, 1.0 / a_inv)
        return rows, columns[: linear.columns]
    cost = element_cost(weight, *_sensitivities(linear, method, curvature, factors))
    return cost.sum(dim=1), cost.sum(dim=0)[: linear.columns]


def _sensitivities(
    linear: PrunableLinear, method: str, curvature: Curvature | None, factors: DampedFactors | None
) -> tuple[Tensor, Tensor]:
    """The vectors ``g`` ``[R]`` and ``a`` ``[C']`` of ``½ W² g aᵀ``."""
    if method == "surgeon":
        assert factors is not None
        g_inv, a_inv = factors.inverse_diagonals(linear)
        return 1.0 / g_inv, 1.0 / a_inv
    device = linear.weight.device if factors is None else factors.device
    ones = torch.ones(max(linear.rows, linear.columns + 1), device=device)
    ones_g, ones_a = ones[: linear.rows], ones[: linear.columns + linear.has_bias]
    if method == "magnitude":
        return ones_g, ones_a
    assert curvature is not None
    G, A = curvature.factors(linear)
    if method == "k-obd":
        assert G is not None
        return G.diagonal().to(device, copy=True), A.diagonal().to(device, copy=True)  # no views of the factors
    return ones_g, A.diagonal().to(device, copy=True)  # l-obd, wanda
