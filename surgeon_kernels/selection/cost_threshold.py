"""The k-th smallest of the costs ``½ W² g aᵀ`` of many layers, without ever storing the costs.

A radix select on the bits of the float32 costs, which order them as their values do. Every pass computes the costs anew
from the weights and two vectors, and counts them in bins; the next pass looks into one bin. Counts are int64, per
layer, and added up over layers on their device and over devices on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.runtime import extension
from surgeon_kernels.selection.costs import WeightCosts
from surgeon_kernels.selection.nm_select import KERNEL_DTYPES, checked_costs, kernel_operands, nm_group_cost

Pattern = tuple[int, int]  # (n, m)

_BIN_BITS = 11
_BINS = 1 << _BIN_BITS
# Where the costs are many, a pass over some of the rows narrows the first bins: one pass over all of them less.
_SAMPLED_FROM = 1 << 26
_SAMPLE_STEP = 64
_SAMPLE_SLACK = 0.01  # of all costs, in rank: what the sample may be wrong by

_library = torch.library.Library("surgeon_kernels", "FRAGMENT")
_library.define(
    "cost_histogram(Tensor[] weights, Tensor[] g, Tensor[] a, int n, int m, int low, int shift, int bins, int row_step)"
    " -> Tensor"
)
_library.define("cost_mask(Tensor weight, Tensor g, Tensor a, float threshold, bool ties) -> Tensor")


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
    """How many costs there are below the first bin, up to the end of the first bin, of the second, and so on.

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


@torch.library.register_fake("surgeon_kernels::cost_histogram", lib=_library)
def _(
    weights: list[Tensor],
    g: list[Tensor],
    a: list[Tensor],
    n: int,
    m: int,
    low: int,
    shift: int,
    bins: int,
    row_step: int,
) -> Tensor:
    return weights[0].new_empty((len(weights), bins + 2), dtype=torch.int64)


@torch.library.register_fake("surgeon_kernels::cost_mask", lib=_library)
def _(weight: Tensor, g: Tensor, a: Tensor, threshold: float, ties: bool) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.bool)
