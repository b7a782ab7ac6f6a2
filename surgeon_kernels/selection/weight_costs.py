"""Costs of single weights as a weight and two vectors, and how kernels and references take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from surgeon_kernels.selection.costs import check_factors, element_cost

# Of weights that the CUDA kernels take; costs that are given are float32.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class WeightCosts(NamedTuple):
    """The costs ``½ W_rc² g_r a_c`` of one layer's weights, computed in float32 where they are needed, never stored.

    Attributes:
        weight: ``[R, C]``, any floating dtype; without ``g`` and ``a``, the costs themselves, not negative.
        g: ``[R]``, a: ``[C]``, not negative, see :func:`element_cost`; on the device that computes.
    """

    weight: Tensor
    g: Tensor | None = None
    a: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device that computes the costs."""
        return self.weight.device if self.g is None else self.g.device

    def check(self) -> None:
        """Raise ValueError unless both factors or none are given, as long as the weight's sides."""
        if (self.g is None) != (self.a is None):
            raise ValueError("costs need both factors, g and a, or none")
        if self.g is not None and self.a is not None:
            check_factors(self.weight, self.g, self.a)

    def gathered(self) -> WeightCosts:
        """The same costs, their weight copied to the device of its factors."""
        return WeightCosts(self.weight.to(self.device, non_blocking=True), self.g, self.a)

    def rows(self, part: slice) -> WeightCosts:
        return WeightCosts(self.weight[part], None if self.g is None else self.g[part], self.a)

    def dense(self) -> Tensor:
        """All costs, float32 ``[R, C]``."""
        if self.g is None or self.a is None:
            return self.weight.float()
        return element_cost(self.gathered().weight.float(), self.g.float(), self.a.float())


def checked_costs(cost: Tensor | WeightCosts) -> Tensor:
    """All costs ``[R, C]``; ValueError where one is NaN or has a negative factor."""
    dense = cost.dense() if isinstance(cost, WeightCosts) else cost
    signed = [x for x in (cost[1:] if isinstance(cost, WeightCosts) else ()) if x is not None]
    if dense.isnan().any() or any(bool((x < 0).any()) for x in signed):
        raise ValueError("a cost is NaN or negative")
    return dense


def kernel_operands(cost: WeightCosts) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, ``g`` and ``a`` as the CUDA ops take them; a weight whose columns are not adjacent is copied."""
    assert cost.g is not None and cost.a is not None
    return dense_rows(cost.weight), cost.g.float().contiguous(), _aligned(cost.a.float().contiguous())


def dense_rows(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _aligned(a: Tensor) -> Tensor:
    """``a`` at a multiple of 16 bytes, the kernels' vector loads."""
    return a if a.data_ptr() % 16 == 0 else a.clone()
