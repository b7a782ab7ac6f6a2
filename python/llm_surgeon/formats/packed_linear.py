"""The linear layer of a packed model."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgeon_kernels import Packed24, pack_2_4, unpack_2_4
from surgeon_kernels.sparse24.linear_2_4 import Linear24Weight, linear_2_4, prepare_2_4
from surgeon_kernels.sparse24.linear_2_4_tune import tune_2_4

_logger = logging.getLogger(__name__)
# Numbers of tokens of the decoding steps; for prefill the kernels' own estimates serve.
TUNED_TOKENS = (1, 2, 4, 8, 16, 32, 64)
# Weights of fewer elements are multiplied dense where there is a kernel: 2 MiB of 16 bits are read in less time than a
# launch takes, so that packing cannot win. An estimate from few sizes on an H200: after a norm, 576 x 576 and, from 17
# tokens on, 1536 x 576 were slower packed, and 1600 x 1600 was faster at few tokens.
DENSE_BELOW = 1 << 20
_tuned: set[tuple[int, int, torch.dtype, torch.device]] = set()


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b``, ``W`` ``[R, C]`` 2:4: ``values`` ``[R, C / 2]``, uint8 ``indices`` ``[R, ceil(C / 8)]``.

    The packed weight is frozen; gradients flow to ``x`` and ``b``. Where :func:`surgeon_kernels.linear_2_4` has a
    kernel (CUDA, bfloat16 and float16), ``values`` and ``indices`` give way to ``fragments``, the same bits in the
    kernel's order; state dicts hold the former all the same, in main memory. Who writes to ``fragments`` in place
    synchronizes the device before the next pass: see :class:`~surgeon_kernels.Linear24Weight`. Of several kernels the
    fastest is found by measurement, once per size and device (:func:`~surgeon_kernels.tune_2_4` keeps it on disk),
    unless ``SURGEON_TUNE=0`` is set (the same choice on every machine then). Weights of fewer than `DENSE_BELOW`
    elements, where the kernel cannot be faster, are kept dense beside the packed form instead. Elsewhere the first pass
    unpacks a dense weight and keeps it so, which a warning says once.
    """

    values: nn.Parameter | None
    indices: Tensor | None
    fragments: nn.Parameter | None
    compressed: nn.Parameter | None
    bias: nn.Parameter | None
    replaces: type[nn.Module] = nn.Linear  # or transformers' Conv1D: the class that its dense twin has
    streamed = False  # its tensors come to the device for each pass only: no dense weight is kept there

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
        # A parameter, as the weights of dense layers are: torch.compile takes their addresses for constant, and checks
        # at each call (there are hundreds) no more of them than it has to.
        self.register_parameter("fragments", None)
        self.register_parameter("compressed", None)  # beside the fragments, where cuSPARSELt was asked for
        self.bias = nn.Parameter(torch.empty(R, device=device, dtype=dtype)) if bias else None
        self.kept_dense: Tensor | None = None  # where there is no kernel, or none that is faster
        self._dtype = _name_of(torch.get_default_dtype() if dtype is None else dtype)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: nn.Parameter | None = None) -> PackedLinear:
        """Pack ``weight`` ``[R, C]``; raises what :func:`~surgeon_kernels.pack_2_4` raises."""
        packed = pack_2_4(weight.detach())
        module = cls(packed.columns, packed.rows, bias=False, device="meta", dtype=weight.dtype)
        module._set_packed(packed)
        module.bias = bias
        module.prepare()
        return module

    @property
    def packed(self) -> Packed24:
        """The packed weight; made anew where the kernel's fragments are kept instead."""
        if self.values is None or self.indices is None:
            assert self.fragments is not None
            return self._kernel_weight(self.fragments).packed()
        return Packed24(self.values.detach(), self.indices)

    @property
    def weight(self) -> Tensor:
        """``W`` ``[R, C]``, dense, unpacked anew: for code that looks at the weight of a linear layer."""
        return unpack_2_4(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        if (fragments := self.fragments) is not None:
            return linear_2_4(x, self._kernel_weight(fragments), self.bias)
        if self.kept_dense is None and not self.streamed and not torch.compiler.is_compiling():
            assert self.values is not None
            _say_unpacked(self.values.device.type, _name_of(self.values.dtype))
            self.kept_dense = self.weight
        return functional.linear(x, self.weight if self.kept_dense is None else self.kept_dense, self.bias)

    def prepare(self) -> None:
        """Rearrange the weight for the kernel where there is one for its device, dtype and shape, and it may pay."""
        packed = self.packed
        if not _may_have_kernel(packed):
            return
        if self.out_features * self.in_features < DENSE_BELOW:
            self.kept_dense = None if self.streamed else unpack_2_4(packed)
        elif (prepared := prepare_2_4(packed)).kernel:
            tune_once(prepared)
            self._dtype = _name_of(packed.values.dtype)
            self.values = self.indices = None
            self.fragments = frozen_parameter(prepared.fragments)

    def compress(self) -> None:
        """Keep the weight as cuSPARSELt has it, too; raises what `prepare_2_4` raises."""
        self.compressed = frozen_parameter(prepare_2_4(self.packed, cusparselt=True).compressed)

    def _kernel_weight(self, fragments: Tensor) -> Linear24Weight:
        dtype = getattr(torch, self._dtype)
        return Linear24Weight(fragments, self.out_features, self.in_features, dtype, True, None, self.compressed)

    def _set_packed(self, packed: Packed24) -> None:
        self.values = nn.Parameter(packed.values, requires_grad=False)
        self.indices = packed.indices
        self.fragments = self.compressed = self.kept_dense = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self._set_packed(self.packed)  # fn may change the device or the dtype
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.fragments is not None:
            values, indices = self.packed
            destination[f"{prefix}values"], destination[f"{prefix}indices"] = values.cpu(), indices.cpu()
            for name in ("fragments", "compressed"):
                destination.pop(f"{prefix}{name}", None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._set_packed(self.packed)
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _name_of(dtype: torch.dtype) -> str:
    """A string in place of the dtype: torch.compile skips the checks of a module that holds nothing but constants,
    tensors and modules, and a dtype is none of these."""
    return str(dtype).removeprefix("torch.")


def frozen_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def _may_have_kernel(packed: Packed24) -> bool:
    values = packed.values
    return values.is_cuda and values.dtype in (torch.bfloat16, torch.float16) and packed.columns % 8 == 0


def tune_once(weight: Linear24Weight) -> None:
    """Measure which kernel is fastest for a weight of this size, the first time that one is met: a few seconds."""
    size = (weight.rows, weight.columns, weight.dtype, weight.fragments.device)
    if size not in _tuned and os.environ.get("SURGEON_TUNE") != "0":
        _tuned.add(size)
        tune_2_4(weight, TUNED_TOKENS)


@functools.cache
def _say_unpacked(device: str, dtype: str) -> None:
    _logger.warning(
        f"2:4 weights are unpacked to dense for {dtype} on {device}: packed ones are smaller in memory and faster "
        "only in bfloat16 and float16 on CUDA, with the CUDA extension (see surgeon info)"
    )
