"""The linear layer of a packed model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgeon_kernels import Packed24, pack_2_4, unpack_2_4

_logger = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b``, ``W`` ``[R, C]`` 2:4: ``values`` ``[R, C / 2]``, uint8 ``indices`` ``[R, ceil(C / 8)]``.

    The packed weight is frozen; gradients flow to ``x`` and ``b``. On CUDA the kernels of
    :func:`surgeon_kernels.linear_2_4` read it. Elsewhere the first pass unpacks a dense weight and keeps it beside the
    packed one, which a warning says once per process.
    """

    values: Tensor
    indices: Tensor
    bias: nn.Parameter | None
    replaces: type[nn.Module] = nn.Linear  # or transformers' Conv1D: the class that its dense twin has

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features % 4:
            raise ValueError(f"2:4 needs a number of inputs divisible by 4, not {in_features}")
        self.in_features, self.out_features = in_features, out_features
        R, C = out_features, in_features
        self.values = nn.Parameter(torch.empty(R, C // 2, device=device, dtype=dtype), requires_grad=False)
        self.register_buffer("indices", torch.empty(R, -(-C // 8), dtype=torch.uint8, device=device))
        self.bias = nn.Parameter(torch.empty(R, device=device, dtype=dtype)) if bias else None
        self._dense: Tensor | None = None

    @classmethod
    def from_dense(cls, weight: Tensor, bias: nn.Parameter | None = None) -> PackedLinear:
        """Pack ``weight`` ``[R, C]``; raises what :func:`~surgeon_kernels.pack_2_4` raises."""
        packed = pack_2_4(weight.detach())
        module = cls(packed.columns, packed.rows, bias=False, device="meta")
        module.values = nn.Parameter(packed.values, requires_grad=False)
        module.indices = packed.indices
        module.bias = bias
        return module

    @property
    def packed(self) -> Packed24:
        return Packed24(self.values, self.indices)

    @property
    def weight(self) -> Tensor:
        """``W`` ``[R, C]``, dense, unpacked anew: for code that looks at the weight of a linear layer."""
        return unpack_2_4(Packed24(self.values.detach(), self.indices))

    def forward(self, x: Tensor) -> Tensor:
        if self._dense is None and not self.values.is_cuda and not torch.compiler.is_compiling():
            _say_unpacked(self.values.device.type)
            self._dense = self.weight
        if self._dense is not None:
            return functional.linear(x, self._dense, self.bias)
        return functional.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._dense = None  # made anew from what fn gives: another device, another dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._dense = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@functools.cache
def _say_unpacked(device: str) -> None:
    _logger.warning(
        f"2:4 weights are unpacked to dense on {device}: only on CUDA are packed ones smaller in memory and faster"
    )
