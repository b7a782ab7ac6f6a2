"""Linears that stay dense where N:M prunes a part of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import KroneckerFactors, numerical_errors
from llm_surgeon.models.decoder import PrunableLinear
from surgeon_kernels import element_cost, joint_estimate, nm_select

# How near to its optimum the loss of a linear is found.
_TOLERANCE = 0.05


def loss_of_pattern(linear: PrunableLinear, factors: KroneckerFactors, config: PruneConfig) -> float:
    """Loss that N:M of one linear is predicted to cost: nats per token, or as ``dense_by`` has it.

    ``"loss"``: the value ``½ tr(Δᵀ G Δ A)`` of its joint update. ``"wanda"``: the sum of ``|w| ‖x‖`` of what N:M
    prunes by these scores, up to a factor. ``"none"``: zero.
    """
    n, m, weight = config.structure_record.n, config.structure_record.m, linear.matrix(device=factors.g.damped.device)
    if config.dense_by == "none":
        return 0.0
    if config.dense_by == "wanda":
        squares = factors.a.damped.diagonal()[: linear.columns] - factors.a.shift
        scores = weight[:, : linear.columns].abs() * squares.clamp_min(0.0).sqrt()
        return float(scores[nm_select(scores, n, m)].sum(dtype=torch.float64))
    with numerical_errors(f"loss of {linear.name}"):
        g, a = factors.inverse_diagonals
        cost = element_cost(weight[:, : linear.columns], 1.0 / g, 1.0 / a[: linear.columns])
        pruned = nm_select(cost, n, m)
        if linear.has_bias:
            pruned = torch.cat([pruned, torch.zeros_like(pruned[:, :1])], dim=1)
        matrices = *factors.damped, *factors.inverses
        found = joint_estimate(
            weight,
            pruned,
            *matrices,
            leading=factors.leading,
            tolerance=_TOLERANCE,
            max_iterations=config.max_iterations,
        )
    return found.bound[-1]


def choose_dense(losses: Sequence[float], sizes: Sequence[int], fraction: float) -> list[bool]:
    """True for linears that stay dense: those that lose most per weight, ``fraction`` of all weights at most.

    Every weight that goes saves the same bytes. They are taken in order, one that does not fit any more being left out.
    Where all lose alike they are spread evenly, and are about that fraction of the first so many linears.
    """
    room = fraction * sum(sizes) * (1 + 1e-9)
    if len(set(losses)) <= 1:
        return _spread(sizes, fraction)
    chosen = [False] * len(sizes)
    taken = 0
    for index in sorted(range(len(sizes)), key=lambda i: -losses[i] / sizes[i]):
        if taken + sizes[index] <= room:
            chosen[index], taken = True, taken + sizes[index]
    return chosen


def _spread(sizes: Sequence[int], fraction: float) -> list[bool]:
    chosen, seen, taken = [], 0, 0
    for size in sizes:
        seen += size
        chosen.append(taken + size / 2 <= fraction * seen * (1 + 1e-9))
        taken += size * chosen[-1]
    return chosen
