"""N:M selection: in every group of M consecutive columns keep the N weights that cost most to remove."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgeon_kernels.runtime import extension
from surgeon_kernels.runtime.checks import check_mask
from surgeon_kernels.runtime.ops import define
from surgeon_kernels.selection.weight_costs import (
    KERNEL_DTYPES,
    WeightCosts,
    checked_costs,
    dense_rows,
    kernel_operands,
)

# As csrc/selection/nm_select.h has it: the most columns of a group that a kernel ranks.
_LARGEST_GROUP = 1024

define(
    "nm_select(Tensor weight, Tensor? g, Tensor? a, int n, int m, Tensor? previous, float threshold, bool ties,"
    " Tensor(a!) invalid) -> Tensor",
    fake=lambda weight, *_: weight.new_empty(weight.shape, dtype=torch.bool),
)
define(
    "nm_group_cost(Tensor weight, Tensor? g, Tensor? a, int n, int m, Tensor(a!) invalid) -> Tensor",
    fake=lambda weight, g, a, n, m, _: weight.new_empty((weight.shape[0], weight.shape[1] // m), dtype=torch.float32),
)
define(
    "nm_prune(Tensor weight, Tensor g, Tensor a, int n, int m, Tensor(a!) invalid) -> Tensor",
    fake=lambda weight, *_: weight.new_empty(weight.shape),
)


def nm_select(
    cost: Tensor | WeightCosts,
    n: int,
    m: int,
    *,
    previous: Tensor | None = None,
    threshold: float = math.inf,
    ties: bool = True,
    valid: bool = False,
) -> Tensor:
    """Select the ``m - n`` cheapest weights of every ``m`` consecutive columns.

    On CUDA devices one kernel reads the weights (or float32 costs) once and writes the mask: costs are not stored.
    Widths that are no multiple of 16 bytes and patterns other than n:4, n:8 and n:16 take a slower kernel.

    Args:
        cost: ``[R, C]``, ``C`` divisible by ``m``. Of equal costs the lower column index is pruned first.
        previous: bool ``[R, C]``, True where a weight is pruned already: it stays pruned, before all others of its
            group, and costs nothing.
        threshold: leave groups alone that cost more (see :func:`nm_group_cost`) and hold no ``previous`` weight.
        ties: whether groups that cost exactly ``threshold`` are pruned.
        valid: no cost is NaN or has a negative factor, as the caller knows: not checked, to avoid a host sync.

    Returns:
        bool ``[R, C]``, True where the weight is pruned: exactly ``m - n`` in every group, or none.

    Raises:
        ValueError: ``n:m`` is no pattern, ``C`` is not divisible by ``m``, a cost is NaN or has a negative factor, or
            ``previous`` or a factor has another shape; TypeError: costs or ``previous`` have another dtype.
    """
    _check(cost, n, m)
    if previous is not None:
        check_mask(previous, _weight(cost).shape, "previous")
    if math.isnan(threshold):
        raise ValueError("threshold is NaN")
    if _fits_kernel(cost, m):
        weight, g, a = _operands(cost)
        before = None if previous is None else previous.contiguous()
        invalid = _flag(weight)
        pruned = torch.ops.surgeon_kernels.nm_select(weight, g, a, n, m, before, threshold, ties, invalid)
        if not valid:
            _require_valid(invalid)
        return pruned
    pruned, total = _reference(checked_costs(cost), n, m, previous)
    chosen = ~((total > threshold) if ties else (total >= threshold))  # true for inf - inf
    if previous is not None:
        chosen |= previous.unflatten(1, pruned.shape[1:]).any(dim=-1)
    return (pruned & chosen[:, :, None]).flatten(1)


def nm_group_cost(cost: Tensor | WeightCosts, n: int, m: int) -> Tensor:
    """Cost of pruning each group: the sum of its ``m - n`` cheapest costs, ``[R, C / m]``, in the costs' dtype.

    Arguments and errors are those of :func:`nm_select`.
    """
    _check(cost, n, m)
    if _fits_kernel(cost, m):
        weight, g, a = _operands(cost)
        invalid = _flag(weight)
        total = torch.ops.surgeon_kernels.nm_group_cost(weight, g, a, n, m, invalid)
        _require_valid(invalid)
        return total
    return _reference(checked_costs(cost), n, m, None)[1]


def nm_prune(cost: WeightCosts, n: int, m: int) -> Tensor:
    """The weight ``[R, C]`` in its dtype, zero where :func:`nm_select` would prune it, which has the errors."""
    _check(cost, n, m)
    if _fits_kernel(cost, m) and cost.g is not None:
        weight, g, a = kernel_operands(cost)
        invalid = _flag(weight)
        pruned_weight = torch.ops.surgeon_kernels.nm_prune(weight, g, a, n, m, invalid)
        _require_valid(invalid)
        return pruned_weight
    return cost.weight.masked_fill(nm_select(cost, n, m), 0.0)


def _reference(cost: Tensor, n: int, m: int, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights to prune in every group, bool ``[R, C / m, m]``, and the cost of that, ``[R, C / m]``."""
    groups = cost.unflatten(1, (cost.shape[1] // m, m))
    gone = torch.zeros_like(groups, dtype=torch.bool) if previous is None else previous.unflatten(1, groups.shape[1:])
    order = groups.masked_fill(gone, -math.inf).argsort(dim=-1, stable=True)
    pruned = torch.zeros_like(gone).scatter_(-1, order[..., : m - n], True)
    total = groups.new_zeros(groups.shape[:2])
    for column in (groups.masked_fill(~pruned | gone, 0.0)).unbind(dim=-1):  # in the order of the kernel's sums
        total += column
    return pruned, total


def _check(cost: Tensor | WeightCosts, n: int, m: int) -> None:
    shape = _weight(cost).shape
    if not 0 < n < m:
        raise ValueError(f"N:M needs 0 < N < M, not {n}:{m}")
    if len(shape) != 2 or shape[1] % m:
        raise ValueError(f"{n}:{m} needs a matrix whose width is divisible by {m}, not {list(shape)}")
    if not _weight(cost).is_floating_point():
        raise TypeError(f"costs must be floating point, not {_weight(cost).dtype}")
    if isinstance(cost, WeightCosts):
        cost.check()


def _weight(cost: Tensor | WeightCosts) -> Tensor:
    """The weight, or the costs themselves."""
    return cost.weight if isinstance(cost, WeightCosts) else cost


def _fits_kernel(cost: Tensor | WeightCosts, m: int) -> bool:
    """The dispatch rule: float32 costs, or weights of at most 32 bits, on a CUDA device; groups of at most 1024."""
    weight = _weight(cost)
    dtypes = KERNEL_DTYPES if isinstance(cost, WeightCosts) else (torch.float32,)
    return weight.is_cuda and weight.dtype in dtypes and m <= _LARGEST_GROUP and extension.available(weight.device)


def _operands(cost: Tensor | WeightCosts) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(cost, WeightCosts) and cost.g is not None:
        return kernel_operands(cost)
    return dense_rows(cost.dense() if isinstance(cost, WeightCosts) else cost), None, None


def _flag(weight: Tensor) -> Tensor:
    """A flag that the ops set where a cost is NaN or has a negative factor, and never clear: calls may share one."""
    return torch.zeros((), dtype=torch.bool, device=weight.device)


def _require_valid(invalid: Tensor) -> None:
    if invalid:
        raise ValueError("a cost is NaN or negative")
