"""Exact-k selection by the costs ``½ W² g aᵀ`` of many layers at once, without ever storing the costs.

The threshold, the k-th smallest cost, is found by a radix select on the bits of the float32 costs, which order them as
their values do. Every pass computes the costs anew from the weights and two vectors, and counts them in bins; the next
pass looks into one bin. Counts are int64, per layer, and added up over layers on their device and over devices on the
host. Ties at the threshold are counted out afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.runtime import extension
from surgeon_kernels.runtime.checks import check_mask
from surgeon_kernels.runtime.ops import define
from surgeon_kernels.selection.nm_select import nm_group_cost, nm_select
from surgeon_kernels.selection.weight_costs import KERNEL_DTYPES, WeightCosts, checked_costs, kernel_operands

Pattern = tuple[int, int]  # (n, m)

# The 31 bits of a cost in three passes; in the kernel the bins are 8 KiB of shared memory.
_BIN_BITS = 11
_BINS = 1 << _BIN_BITS
# Estimates. Where the costs are many, a pass over some of the rows narrows the first bins: one pass over all less.
_SAMPLED_FROM = 1 << 26
_SAMPLE_STEP = 64
_SAMPLE_SLACK = 0.01  # of all costs, in rank: the error that the sample may have
# Weights among which ties are counted out at one time (an estimate): bounds the int64 indices to 128 MiB.
_TIES_AT_ONCE = 1 << 24

define(
    "cost_histogram(Tensor[] weights, Tensor[] g, Tensor[] a, int n, int m, int low, int shift, int bins, int row_step)"
    " -> Tensor",
    fake=lambda weights, g, a, n, m, low, shift, bins, row_step: weights[0].new_empty(
        (len(weights), bins + 2), dtype=torch.int64
    ),
)
define(
    "cost_mask(Tensor weight, Tensor g, Tensor a, float threshold, bool ties) -> Tensor",
    fake=lambda weight, *_: weight.new_empty(weight.shape, dtype=torch.bool),
)


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
        pattern: ``(n, m)``: select whole groups of ``m`` columns by the cost of pruning them to ``n``
            (:func:`~surgeon_kernels.nm_group_cost`), and prune their cheapest ``m - n`` weights.
        previous: bool ``[R, C]`` per layer: weights that are pruned, and zero, already: they stay selected. With a
            ``pattern``, the masks of an earlier call.
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
    """Mask of what costs less than ``threshold`` or is pruned already, and of the first ``ties`` that cost as much.

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
    """Mask of what costs less than ``threshold``, or as much where ``ties``, or is pruned already."""
    if pattern is not None:
        valid = threshold > -math.inf  # the search for the threshold has read all costs
        return nm_select(cost, *pattern, previous=previous, threshold=threshold, ties=ties, valid=valid)
    if fits_kernel(cost, None):
        mask = torch.ops.surgeon_kernels.cost_mask(*kernel_operands(cost), threshold, ties)
    else:
        dense = checked_costs(cost)
        mask = dense <= threshold if ties else dense < threshold
    # Pruned weights cost nothing, so that they are in the mask unless the threshold is zero.
    return mask | previous if previous is not None and threshold <= 0.0 else mask


def _count(mask: Tensor, pattern: Pattern | None) -> int:
    """Weights in a mask, or groups with a weight in it."""
    return int(
        mask.unflatten(1, (mask.shape[1] // pattern[1], pattern[1])).any(dim=-1).sum() if pattern else mask.sum()
    )


class _Window(NamedTuple):
    """Bin ``b`` holds the costs whose bits are in ``[low + (b << shift), low + (b + 1 << shift))``."""

    low: int
    shift: int


class _Batch(NamedTuple):
    """Layers that one launch counts, with their weights, ``g`` and ``a``; or one layer (None) counted by itself."""

    layers: list[int]
    operands: list[list[Tensor]] | None


_EVERYTHING = _Window(0, 31 - _BIN_BITS)  # costs are not negative


def kth_cost(
    costs: Sequence[WeightCosts], k: int, limits: Sequence[int], pattern: Pattern | None
) -> tuple[int, list[int], list[int]]:
    """The bits of the k-th smallest cost, and how many costs of every layer are below it, and up to it."""
    batches = _batches(costs, pattern)
    window = _guess(costs, batches, k, limits, pattern) if sum(limits) >= _SAMPLED_FROM else _EVERYTHING
    while True:
        counts, total = _pass(costs, batches, limits, pattern, window)
        position = int(torch.searchsorted(total, k))  # the first end of a bin up to which there are k costs
        if not 0 < position < len(total):
            window = _EVERYTHING  # the sample was wrong
        elif window.shift > 0:
            window = _Window(window.low + (position - 1 << window.shift), max(0, window.shift - _BIN_BITS))
        else:
            below, up_to = [0] * len(costs), [0] * len(costs)
            for batch, count in zip(batches, counts, strict=True):
                for layer, ends in zip(batch.layers, count[:, position - 1 : position + 1].tolist(), strict=True):
                    below[layer], up_to[layer] = ends
            return window.low + position - 1, below, up_to


def _guess(
    costs: Sequence[WeightCosts],
    batches: Sequence[_Batch],
    k: int,
    limits: Sequence[int],
    pattern: Pattern | None,
) -> _Window:
    """A window that holds the k-th smallest cost, in all likelihood, from every 64th row."""
    rows = [len(range(0, cost.weight.shape[0], _SAMPLE_STEP)) for cost in costs]
    sampled = [limit * n // max(1, cost.weight.shape[0]) for limit, n, cost in zip(limits, rows, costs, strict=True)]
    _, total = _pass(costs, batches, sampled, pattern, _EVERYTHING, _SAMPLE_STEP)
    size = sum(sampled)
    rank, slack = k * size / sum(limits), _SAMPLE_SLACK * size
    first, last = torch.searchsorted(total, torch.tensor([rank - slack, min(rank + slack, size)])).tolist()
    bins = max(1, min(last, _BINS) - max(0, first - 1))
    shift = _EVERYTHING.shift + (bins - 1).bit_length() - _BIN_BITS
    return _Window(max(0, first - 1) << _EVERYTHING.shift, shift)


def _pass(
    costs: Sequence[WeightCosts],
    batches: Sequence[_Batch],
    limits: Sequence[int],
    pattern: Pattern | None,
    window: _Window,
    step: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """Count costs below the first bin, up to the end of the first bin, of the second, and so on.

    Returns:
        The counts of every batch's layers, int64 ``[layers, 1 + bins]`` on its device, and their sum over all layers,
        none counted beyond its limit, ``[1 + bins]`` on the host.
    """
    counts, total = [], torch.zeros(_BINS + 2, dtype=torch.int64)
    for batch in batches:
        if batch.operands is None:
            found = _histogram(costs[batch.layers[0]].gathered(), pattern, window, step)
        else:
            found = _kernel(batch.operands, pattern, window, step)
        counts.append(found[:, :-1].cumsum(1))
        limit = torch.tensor([limits[i] for i in batch.layers], device=found.device)
        capped = torch.minimum(counts[-1], limit[:, None])
        total += torch.cat([capped, found[:, -1:]], dim=1).sum(0).cpu()
    if total[-1] != 0:
        raise ValueError("a cost is NaN or negative")
    return counts, total[:-1]


def _histogram(cost: WeightCosts, pattern: Pattern | None, window: _Window, step: int) -> Tensor:
    """Costs below the window, in each of its bins, and invalid ones: int64 ``[1, bins + 2]``."""
    if fits_kernel(cost, pattern):
        return _kernel([[operand] for operand in kernel_operands(cost)], pattern, window, step)
    return _histogram_reference(_dense(cost, pattern, step), window)[None]


def _kernel(operands: Sequence[list[Tensor]], pattern: Pattern | None, window: _Window, step: int) -> Tensor:
    """:func:`_histogram` of several layers, of their weights, ``g`` and ``a``: int64 ``[layers, bins + 2]``."""
    return torch.ops.surgeon_kernels.cost_histogram(*operands, *(pattern or (0, 1)), *window, _BINS, step)


def _histogram_reference(cost: Tensor, window: _Window) -> Tensor:
    offset = cost.abs().view(torch.int32).flatten() - window.low
    bins = offset[offset >= 0] >> window.shift
    inside = torch.bincount(bins[bins < _BINS], minlength=_BINS)
    return torch.cat([(offset < 0).sum()[None], inside, (cost < 0).sum()[None]])


def _dense(cost: WeightCosts, pattern: Pattern | None, step: int) -> Tensor:
    """The costs of every ``step``-th row, or of its groups."""
    rows = cost.rows(slice(None, None, step))
    return nm_group_cost(rows, *pattern) if pattern else checked_costs(rows)


def number_of_costs(cost: WeightCosts, pattern: Pattern | None) -> int:
    """Weights of a layer, or its groups."""
    return cost.weight.numel() // (pattern[1] if pattern else 1)


def _batches(costs: Sequence[WeightCosts], pattern: Pattern | None) -> list[_Batch]:
    """Layers of one device and dtype together; those that take the reference, or are copied, on their own."""
    layers: dict[object, list[int]] = {}
    for layer, cost in enumerate(costs):
        alone = cost.weight.device != cost.device or not fits_kernel(cost, pattern)
        layers.setdefault(layer if alone else (cost.weight.device, cost.weight.dtype), []).append(layer)
    return [
        _Batch(batch, None if key == batch[0] else _columns([kernel_operands(costs[i]) for i in batch]))
        for key, batch in layers.items()
    ]


def _columns(rows: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*rows, strict=True)]


def fits_kernel(cost: WeightCosts, pattern: Pattern | None) -> bool:
    """The dispatch rule: weights of at most 32 bits on a CUDA device; of groups, 4, 8 or 16 columns, rows aligned."""
    weight = cost.weight
    if cost.g is None or not (weight.is_cuda and weight.dtype in KERNEL_DTYPES and extension.available(weight.device)):
        return False
    if pattern is None:
        return True
    lane = max(pattern[1], 16 // weight.element_size())
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.element_size() % 16 == 0
    return pattern[1] in (4, 8, 16) and weight.stride(1) == 1 and weight.shape[1] % lane == 0 and aligned
