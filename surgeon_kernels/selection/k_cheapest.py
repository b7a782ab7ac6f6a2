"""Exact-k selection by the costs ``½ W² g aᵀ`` of many layers at once, without ever storing the costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon_kernels.runtime.checks import check_mask
from surgeon_kernels.selection.cost_threshold import Pattern, fits_kernel, kth_cost, number_of_costs
from surgeon_kernels.selection.costs import WeightCosts
from surgeon_kernels.selection.nm_select import checked_costs, kernel_operands, nm_select

# Weights among which ties are counted out at one time.
_TIES_AT_ONCE = 1 << 24


def k_cheapest(
    costs: Sequence[WeightCosts],
    k: int,
    *,
    pattern: Pattern | None = None,
    previous: Sequence[Tensor] | None = None,
    at_most: Sequence[int] | None = None,
    out: Sequence[Tensor] | None = None,
) -> tuple[float, list[Tensor]]:
    """Select the ``k`` cheapest weights, or N:M groups, of all layers: exactly ``k``, ties included.

    Of equal costs those of ``previous`` come first, then the first in the order of the layers and row by row within
    one. Costs are float32, computed where ``g`` and ``a`` are: a weight that lies elsewhere is copied there while it
    is read. CUDA kernels run where they can, see :func:`~surgeon_kernels.nm_select`; 2:4 of six billion bfloat16
    weights reads them twice for the threshold and once for the masks.

    Args:
        costs: one per layer, on any devices.
        k: how many weights (or groups, with a ``pattern``) to select in all, ``previous`` ones included.
        pattern: ``(n, m)``: select whole groups of ``m`` columns by what pruning them to ``n`` costs
            (:func:`~surgeon_kernels.nm_group_cost`), and prune their cheapest ``m - n`` weights.
        previous: bool ``[R, C]`` per layer: weights that are pruned, and zero, already: they stay selected. With a
            ``pattern``, what an earlier call returned.
        at_most: the most that may be selected of each layer.
        out: bool ``[R, C]`` per layer, on any devices, the masks to be written; they may be those of ``previous``. Of
            masks in pinned memory the copies are on their way when this returns, in the order of the current stream.

    Returns:
        The threshold, the highest cost selected where no layer is at its limit (-inf for ``k = 0``), and one bool
        mask ``[R, C]`` per layer, where its weight is unless given by ``out``: True where a weight is (to be) pruned.

    Raises:
        ValueError: ``k`` or a limit is out of range or ``k`` smaller than what is pruned already; a cost is NaN or
            negative; shapes do not fit. TypeError: a mask of ``previous`` is not bool.
    """
    for layer, cost in enumerate(costs):
        cost.check()
        if previous is not None:
            check_mask(previous[layer], cost.weight.shape, f"previous[{layer}]")
    if at_most is not None and min(at_most, default=0) < 0:
        raise ValueError(f"at_most must not be negative, not {min(at_most)}")
    sizes = [number_of_costs(cost, pattern) for cost in costs]
    limits = sizes if at_most is None else [min(pair) for pair in zip(sizes, at_most, strict=True)]
    if not 0 <= k <= sum(limits):
        raise ValueError(f"cannot select {k} of {sum(limits)} costs")
    if k > 0:
        key, below, up_to = kth_cost(costs, k, limits, pattern)
        threshold = float(torch.tensor(key, dtype=torch.int32).view(torch.float32))
    else:
        threshold, below, up_to = -math.inf, [0] * len(costs), [0] * len(costs)
    first = [0] * len(costs)  # of each layer's costs at the threshold, those that are pruned already
    if previous is not None and threshold <= 0.0:
        first = [_count(mask, pattern) for mask in previous]
    left = k - sum(map(min, below, limits)) - sum(first)
    if left < 0:
        raise ValueError(f"cannot select {k} costs where more are pruned already")
    masks = []
    for layer, cost in enumerate(costs):
        before = None if previous is None else previous[layer]
        given = None if out is None else out[layer]
        if below[layer] > limits[layer]:
            alone = None if before is None else [before]
            target = None if given is None else [given]
            masks.append(k_cheapest([cost], limits[layer], pattern=pattern, previous=alone, out=target)[1][0])
            continue
        room = min(up_to[layer], limits[layer]) - below[layer] - first[layer]
        more = max(0, min(left, room))
        left -= more
        rest = up_to[layer] - below[layer] - first[layer] - more
        mask = _select(cost, threshold, pattern, before, more, rest)
        if given is None:
            masks.append(mask.to(cost.weight.device))
        else:
            masks.append(given.copy_(mask, non_blocking=given.is_pinned()))
    return threshold, masks


def _select(
    cost: WeightCosts,
    threshold: float,
    pattern: Pattern | None,
    previous: Tensor | None,
    ties: int,
    others: int,
) -> Tensor:
    """What costs less than ``threshold``, what is pruned already, and the first ``ties`` of all that cost as much.

    Args:
        others: how many cost as much and are not to be selected.
    """
    cost = cost.gathered()
    previous = None if previous is None else previous.to(cost.weight.device)
    mask = _up_to(cost, threshold, pattern, previous, ties=others == 0)
    if ties == 0 or others == 0:
        return mask
    R, C = cost.weight.shape
    rows = max(1, _TIES_AT_ONCE // C)
    for start in range(0, R, rows):
        part = slice(start, start + rows)
        slab = cost.rows(part)
        before = None if previous is None else previous[part]
        equal = _up_to(slab, threshold, pattern, before, ties=True) & ~mask[part]
        whole = equal.unflatten(1, (C // pattern[1], pattern[1])).any(dim=-1) if pattern else equal
        first = whole.flatten().nonzero()[:ties, 0]
        chosen = torch.zeros(whole.numel(), dtype=torch.bool, device=mask.device).index_fill_(0, first, True)
        chosen = chosen.view(whole.shape)
        mask[part] |= equal & (chosen.repeat_interleave(pattern[1], dim=1) if pattern else chosen)
        ties -= first.numel()
        if ties == 0:
            break
    return mask


def _up_to(
    cost: WeightCosts, threshold: float, pattern: Pattern | None, previous: Tensor | None, *, ties: bool
) -> Tensor:
    """What costs less than ``threshold``, or as much where ``ties``, or is pruned already."""
    if pattern is not None:
        valid = threshold > -math.inf  # the search for the threshold has read all costs
        return nm_select(cost, *pattern, previous=previous, threshold=threshold, ties=ties, valid=valid)
    if fits_kernel(cost, None):
        mask = torch.ops.surgeon_kernels.cost_mask(*kernel_operands(cost), threshold, ties)
    else:
        dense = checked_costs(cost)
        mask = dense <= threshold if ties else dense < threshold
    # What is pruned already costs nothing, so that it is in the mask unless the threshold is zero.
    return mask | previous if previous is not None and threshold <= 0.0 else mask


def _count(mask: Tensor, pattern: Pattern | None) -> int:
    """Weights in a mask, or groups with a weight in it."""
    return int(
        mask.unflatten(1, (mask.shape[1] // pattern[1], pattern[1])).any(dim=-1).sum() if pattern else mask.sum()
    )
