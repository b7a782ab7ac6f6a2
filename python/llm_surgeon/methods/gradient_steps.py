"""Steps along the natural gradient of the kept weights, after a shot.

The curvature of single layers does not see how what is pruned in one adds to what is pruned in others: at the pruned
weights the loss has a gradient, which an optimum has not. A step lowers the loss by it, every layer by its own
``∇W`` and curvature, and of all layers together the length is found on windows that are held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llm_surgeon.curvature.factors import KroneckerFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.report.schema import GradientStep
from surgeon_kernels import joint_update

# Of the calibration windows, as many decide how far to go: further ones, or their last, which curvature has seen.
HELD_OUT = 1 / 8
# The length that a first step tries first, what others are multiplied by, and between which they lie. Little is left of
# a whole step: a gradient of N tokens is mostly noise in as many directions as there are weights, which the inverses
# magnify.
_FIRST, _RATIO, _SHORTEST, _LONGEST = 1e-3, 3.0, 1e-5, 1.0
# How near to its optimum the direction is solved for.
_TOLERANCE = 0.05


def split_windows(calibration: Calibration, held_out: int | None) -> tuple[Calibration, Calibration]:
    """Split calibration windows into those for gradients and those, the last ``held_out`` or eighth, for lengths.

    Raises:
        InputError: no window is left for gradients.
    """
    ids, mask = calibration.input_ids, calibration.attention_mask
    kept = len(ids) - (held_out or max(1, round(len(ids) * HELD_OUT)))
    if kept < 1:
        least = 1 + (held_out or 1)
        raise InputError(
            f"gradient_steps need at least {least} calibration windows, not {len(ids)}: the last of them are held out"
        )
    parts = (slice(0, kept), slice(kept, None))
    first, last = (
        replace(calibration, input_ids=ids[part], attention_mask=None if mask is None else mask[part]) for part in parts
    )
    return first, last


def direction(gradient: Tensor, pruned: Tensor, factors: KroneckerFactors, max_iterations: int) -> Tensor:
    """``D`` that minimises ``½ tr(Dᵀ G D A) - ⟨∇W, D⟩`` with ``D = 0`` on the pruned weights, ``[R, C']``.

    Without pruned weights that is ``N = G⁻¹ ∇W A⁻¹``. With them, ``D = N + Δ``, ``Δ`` the joint update that removes
    their part of ``N``.
    """
    natural = factors.inverse_product(gradient)
    solved = joint_update(
        natural, pruned, *factors.damped, *factors.inverses, tolerance=_TOLERANCE, max_iterations=max_iterations
    )
    return natural.add_(solved.delta).masked_fill_(pruned, 0.0)


def step(
    linears: list[PrunableLinear],
    directions: dict[str, Tensor],
    loss: Callable[[], float],
    moved: Callable[[PrunableLinear, Tensor], None],
    first: float = _FIRST,
) -> GradientStep:
    """``W ← W - s D`` of every linear, with the ``s`` that has the least ``loss()``.

    Lengths grow from ``first`` while the loss falls, or shrink until it does; then the least of the parabola through
    the best and its neighbours is tried as well. A length with which the loss is no number any more is as bad as can
    be.

    Args:
        moved: called for every linear with the ``s D`` that it was moved by, where a step is taken.
    """
    before = {linear.name: linear.matrix(linear.weight.dtype) for linear in linears}

    def write(length: float) -> None:
        for linear in linears:
            weight = before[linear.name]
            linear.write(weight.to(torch.promote_types(weight.dtype, torch.float32)) - length * directions[linear.name])

    def loss_at(length: float) -> float:
        write(length)
        try:
            return loss()
        except NumericalError:
            return math.inf

    tried = {0.0: loss(), first: loss_at(first)}
    length, helped = first, tried[first] < tried[0.0]
    ratio = _RATIO if helped else 1 / _RATIO
    while (tried[length] == min(tried.values())) == helped and _SHORTEST < length * ratio < _LONGEST:
        length *= ratio
        tried[length] = loss_at(length)
    between = _least_of_parabola(tried)
    if between is not None:
        tried[between] = loss_at(between)
    best = min(tried, key=lambda s: tried[s])
    write(best)
    if best > 0.0:
        for linear in linears:
            moved(linear, directions[linear.name] * best)
    return GradientStep(best, tried[0.0], tried[best])


def _least_of_parabola(tried: dict[float, float]) -> float | None:
    """Minimum of the parabola through the best point and its neighbours; None without two of these."""
    points = sorted(tried.items())
    best = min(range(len(points)), key=lambda i: points[i][1])
    if not 0 < best < len(points) - 1:
        return None
    (x0, y0), (x1, y1), (x2, y2) = points[best - 1 : best + 2]
    falls, rises = (y0 - y1) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if not 0.0 < falls + rises < math.inf:
        return None
    return 0.5 * (x0 + x1) + 0.5 * falls * (x2 - x0) / (falls + rises)
