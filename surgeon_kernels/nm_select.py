"""N:M selection: in every group of M consecutive columns keep the N weights that cost most to remove."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels import extension


def nm_select(cost: Tensor, n: int, m: int) -> Tensor:
    """The ``m - n`` cheapest weights of every ``m`` consecutive columns.

    Args:
        cost: ``[R, C]``, ``C`` divisible by ``m``. Of equal costs the lower column index is pruned first.

    Returns:
        bool ``[R, C]``, True where the weight is pruned: exactly ``m - n`` in every group.

    Raises:
        ValueError: ``n:m`` is no pattern, ``C`` is not divisible by ``m``, or a cost is NaN.
    """
    groups = _groups(cost, n, m)
    if groups.isnan().any():
        raise ValueError("cost holds NaN")
    if cost.is_cuda and cost.dtype == torch.float32 and extension.available():
        return torch.ops.surgeon_kernels.nm_select(cost.contiguous(), n, m)
    return _nm_select_reference(groups, n, m).view(cost.shape)


def _nm_select_reference(groups: Tensor, n: int, m: int) -> Tensor:
    cheapest = groups.argsort(dim=-1, stable=True)[..., : m - n]
    return groups.new_zeros(groups.shape, dtype=torch.bool).scatter_(-1, cheapest, True)


def nm_group_cost(cost: Tensor, pruned: Tensor, n: int, m: int) -> Tensor:
    """Sum of the pruned weights' costs in every group of ``m`` columns: ``[R, C / m]`` from ``[R, C]``."""
    return _groups(cost.masked_fill(~pruned, 0.0), n, m).sum(dim=-1)


def _groups(x: Tensor, n: int, m: int) -> Tensor:
    if not 0 < n < m:
        raise ValueError(f"N:M needs 0 < N < M, not {n}:{m}")
    if x.dim() != 2 or x.shape[1] % m:
        raise ValueError(f"{n}:{m} needs a matrix whose width is divisible by {m}, not {list(x.shape)}")
    return x.unflatten(1, (x.shape[1] // m, m))  # [R, C / m, m]
