"""Costs of removing each group of a dimension."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from llm_surgeon.curvature.factors import KroneckerFactors
from llm_surgeon.structures.find.dimension import Dimension
from surgeon_kernels import column_block_cost, column_cost


class DimensionCosts(NamedTuple):
    """Costs of removing whole groups, ``[groups]``, and single parts, ``[groups, parts]``."""

    groups: Tensor
    parts: Tensor


def kronecker_costs(dimension: Dimension, weight: Tensor, factors: KroneckerFactors, removed: Tensor) -> DimensionCosts:
    """Predicted increases of the loss, nats per token, when the consumer's other columns compensate.

    ``½ tr((A⁻¹[B,B])⁻¹ W_Bᵀ G W_B)`` over the columns B of a group or part that are still there: the producers' rows
    reach nothing else, so they go for free.

    Args:
        weight: the consumer's ``[R, C]`` or, with its bias, ``[R, C + 1]``; factors: as wide as ``weight``.
        removed: bool ``[groups, parts]``, gone already.
    """
    G, A_inv = factors.g.damped, factors.a.inverse
    if not dimension.is_heads:
        cost = column_cost(weight, G, 1.0 / A_inv.diagonal())[dimension.columns[:, 0]]
        return DimensionCosts(cost, cost[:, None])
    alive = ~removed
    groups = weight.new_zeros(dimension.groups)
    parts = weight.new_zeros(removed.shape)
    left = alive.any(dim=1)
    if left.any():
        blocks = dimension.part_columns[alive]  # [alive parts, size]
        parts[alive] = column_block_cost(weight, G, A_inv, blocks)
        groups[left] = column_block_cost(weight, G, A_inv, blocks.view(int(left.sum()), -1))
    return DimensionCosts(groups, parts)
