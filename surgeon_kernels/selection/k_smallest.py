"""Exact-k global threshold: the k cheapest of many cost tensors, without concatenating or sorting them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DIGIT_BITS = 16


def k_smallest(costs: Sequence[Tensor], k: int) -> tuple[float, list[Tensor]]:
    """Select the ``k`` smallest entries over all tensors: exactly ``k``, ties and infinities included.

    The threshold (the k-th smallest value) is found by a radix select: one histogram pass over the tensors for every
    16 bits of the dtype, counts in int64. Everything below it is selected; of the entries equal to it the first are,
    in the order of the tensors and row by row within one, until ``k`` is met.

    Args:
        costs: tensors of one dtype (float32 or float64), any shapes and devices; -inf is always taken first,
            +inf last.
        k: how many to select, ``0 <= k <= total``.

    Returns:
        The threshold (-inf for ``k = 0``) and one bool mask per tensor, True where selected.

    Raises:
        ValueError: ``k`` out of range, mixed dtypes, or NaN among the costs.
    """
    total = sum(cost.numel() for cost in costs)
    if not 0 <= k <= total:
        raise ValueError(f"cannot select {k} of {total} costs")
    if k == 0:
        return float("-inf"), [torch.zeros_like(cost, dtype=torch.bool) for cost in costs]
    if len({cost.dtype for cost in costs}) != 1 or costs[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"costs must share float32 or float64, not {sorted({str(c.dtype) for c in costs})}")
    threshold, below = _radix_select(costs, k)
    ties_left = k - below
    masks = []
    for cost in costs:
        mask = (cost < threshold).contiguous()
        if ties_left > 0:
            ties = (cost == threshold).flatten().nonzero()[:ties_left, 0]
            mask.view(-1)[ties] = True
            ties_left -= ties.numel()
        masks.append(mask)
    return threshold, masks


def smallest_mask(cost: Tensor, k: Tensor) -> Tensor:
    """The mask of :func:`k_smallest` for one tensor and a ``k`` on its device, of which the host need not know.

    On a GPU costs are sorted, which takes six times the memory of float32 ones, and NaN is not refused but taken last.

    Args:
        cost: float32 or float64, any shape; k: int64 scalar, ``0 <= k <= cost.numel()``.
    """
    return _mask_by_order(cost, k) if cost.is_cuda else k_smallest([cost], int(k))[1][0]


def _mask_by_order(cost: Tensor, k: Tensor) -> Tensor:
    order = (cost.flatten() + 0.0).argsort(stable=True)  # -0.0 and 0.0 tie
    chosen = torch.arange(len(order), device=cost.device) < k
    return torch.empty_like(chosen).scatter_(0, order, chosen).view(cost.shape)


def _radix_select(costs: Sequence[Tensor], k: int) -> tuple[float, int]:
    """The k-th smallest value and the number of values strictly below it."""
    dtype = costs[0].dtype
    digits = torch.finfo(dtype).bits // _DIGIT_BITS
    prefix, below = 0, 0  # leading digits found so far (as a signed key), count of keys with smaller leading digits
    for digit in reversed(range(digits)):
        shift = digit * _DIGIT_BITS
        histogram = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
        for cost in costs:
            keys = _ordered_keys(cost)
            if digit == digits - 1:
                bins = (keys >> shift) + (1 << (_DIGIT_BITS - 1))  # signed leading digit, made non-negative
            else:
                keys = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
                bins = (keys >> shift) & ((1 << _DIGIT_BITS) - 1)
            histogram += torch.bincount(bins, minlength=1 << _DIGIT_BITS).cpu()
        cumulative = histogram.cumsum(0)
        found = int(torch.searchsorted(cumulative, k - below))
        below += int(cumulative[found] - histogram[found])
        prefix = found - (1 << (_DIGIT_BITS - 1)) if digit == digits - 1 else (prefix << _DIGIT_BITS) | found
    return _value_of_key(prefix, dtype), below


def _ordered_keys(cost: Tensor) -> Tensor:
    """Integers of the cost's width that sort as the costs do (IEEE 754 bits, the negatives' order reversed)."""
    if cost.isnan().any():
        raise ValueError("a cost is NaN")
    cost = cost.contiguous().flatten() + 0.0  # -0.0 and 0.0 tie
    integer = torch.int32 if cost.dtype == torch.float32 else torch.int64
    bits = cost.view(integer)
    return torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits)


def _value_of_key(key: int, dtype: torch.dtype) -> float:
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    bits = torch.tensor(key if key >= 0 else key ^ torch.iinfo(integer).max, dtype=integer)
    return float(bits.view(dtype))
