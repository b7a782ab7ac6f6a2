"""Linear layers with a 2:4 weight, ``y = act(x Wᵀ + b)``, that read 9/16 of the dense weight's bytes.

On CUDA a kernel takes W as the sparse operand of the tensor cores, from the layout of
:mod:`surgeon_kernels.sparse24.linear_2_4_layout`. Few tokens: ``mma.sp``, bound by the time to read W. Many tokens, on
Hopper: sparse ``wgmma``, or cuSPARSELt where the caller keeps the weight in its form as well. From 256 tokens on, on
other devices or where the extension was built without ``wgmma``: cuSPARSELt, or a dense product with the weight
unpacked for the call (an estimate: only an H200 was measured). Sums are fp32, added in an order that depends on the
sizes, the device and the kernel that :func:`~surgeon_kernels.sparse24.linear_2_4_tune.tune_2_4` may have chosen: the
same inputs give the same bits. Where there is no CUDA kernel the reference multiplies by the unpacked weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from surgeon_kernels.runtime import extension
from surgeon_kernels.runtime.ops import define
from surgeon_kernels.sparse24.linear_2_4_layout import fragments, from_fragments
from surgeon_kernels.sparse24.pack_2_4 import Packed24, unpack_2_4

# In the order of surgeon::Activation in csrc/sparse24/linear_2_4.h.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
_APPLY: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}


class Linear24Weight(NamedTuple):
    """A 2:4 weight ``[rows, columns]`` in the kernels' layout; made by :func:`prepare_2_4` and not written afterwards.

    ``dense`` is the unpacked weight where the caller chose to keep it, ``compressed`` the weight as cuSPARSELt has it
    where the caller chose that, ``kernel`` whether the CUDA kernel runs. ``fragments`` begin at a multiple of 16 bytes
    then. A kernel starts to read them while the one before it in the stream may still run: who writes to them in place
    must synchronize the device before the next product.
    """

    fragments: Tensor
    rows: int
    columns: int
    dtype: torch.dtype
    kernel: bool
    dense: Tensor | None = None
    compressed: Tensor | None = None

    def packed(self) -> Packed24:
        """The weight back in the library-independent form, bit for bit."""
        return from_fragments(self.fragments, self.rows, self.columns, self.dtype)

    def unpacked(self) -> Tensor:
        """``W`` ``[R, C]``, dense: the one that was kept, else a new one."""
        if self.dense is not None:
            return self.dense
        if self.kernel:
            op = torch.ops.surgeon_kernels.linear_2_4_unpack
            return op(self.fragments, self.rows, self.columns, self.dtype)
        return unpack_2_4(self.packed())

    @property
    def nbytes(self) -> int:
        kept = (self.fragments, self.dense, self.compressed)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)


def prepare_2_4(packed: Packed24, *, keep_dense: bool = False, cusparselt: bool = False) -> Linear24Weight:
    """Rearrange a packed weight for :func:`linear_2_4`, on its device; the first CUDA call may build the kernels.

    The kernel runs where the weight is on a CUDA device and not empty.

    Args:
        packed: bfloat16 or float16 ``[R, C]``, ``C`` divisible by 8.
        keep_dense: keep the dense weight as well (16/9 of the packed one) and multiply by it wherever no sparse kernel
            runs, and in a backward pass, instead of unpacking at every call.
        cusparselt: keep the weight also as cuSPARSELt compresses it (as large as the packed one: together 9/8 of the
            dense weight) and let that library, found beside torch, multiply where it is faster: many tokens, without
            bias and activation. Its plans are made for rounded numbers of tokens, kernels of ours take the rest, and
            never while a CUDA graph is captured: a size that has not run before runs in the graph as without
            cuSPARSELt. No effect where the CUDA kernel does not run.

    Raises:
        TypeError: another dtype.
        ValueError: ``C`` is not divisible by 8; or cuSPARSELt is requested and not found, or ``R`` or ``C`` is not
            divisible by 16.
    """
    if packed.values.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"2:4 kernels take bfloat16 and float16, not {packed.values.dtype}")
    if packed.columns % 8:
        raise ValueError(f"2:4 kernels take widths divisible by 8, not {packed.columns}")
    kernel = packed.values.is_cuda and packed.values.numel() > 0 and extension.available(packed.values.device)
    dense = unpack_2_4(packed) if keep_dense else None
    data = fragments(packed)
    compressed = _compressed(packed) if cusparselt and kernel else None
    if data.is_cuda:
        # A kernel may start reading its weight while the one before it in the stream still runs.
        torch.cuda.current_stream(data.device).synchronize()
    return Linear24Weight(data, packed.rows, packed.columns, packed.values.dtype, kernel, dense, compressed)


def _compressed(packed: Packed24) -> Tensor:
    if not torch.ops.surgeon_kernels.cusparselt_version():
        raise ValueError("cuSPARSELt 0.8 or newer is not found: torch's CUDA wheels bring libcusparseLt.so.0 along")
    if packed.rows % 16 or packed.columns % 16:
        raise ValueError(f"cuSPARSELt takes sizes divisible by 16, not {[packed.rows, packed.columns]}")
    return torch.ops.surgeon_kernels.linear_2_4_compress(unpack_2_4(packed))


def linear_2_4(
    x: Tensor, weight: Linear24Weight | Packed24, bias: Tensor | None = None, *, activation: str = "none"
) -> Tensor:
    """``y = act(x Wᵀ + b)``.

    Args:
        x: ``[..., C]``, any leading shape, in the weight's dtype and on its device.
        weight: a prepared weight, or a packed one, which is unpacked at every call.
        bias: ``[R]`` in the same dtype, or None.
        activation: one of `ACTIVATIONS`, applied in fp32 before rounding by the sparse kernels, else after rounding.

    Returns:
        ``[..., R]``. Gradients flow to ``x`` and ``bias``; the weight is a constant. The backward pass multiplies by
        the dense weight; one that was not kept is unpacked into a temporary of ``2 R C`` bytes.

    Raises:
        ValueError: sizes or devices do not fit, the activation is unknown, or a kernel is to read ``fragments`` that do
            not begin at a multiple of 16 bytes.
        TypeError: dtypes differ.
    """
    _check(x, weight, bias, activation)
    if isinstance(weight, Packed24):
        return _APPLY[activation](_linear_2_4_reference(x, weight, bias))
    if not weight.kernel:
        dense = weight.packed() if weight.dense is None else weight.dense
        y = functional.linear(x, dense, bias) if isinstance(dense, Tensor) else _linear_2_4_reference(x, dense, bias)
        return _APPLY[activation](y)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _APPLY[activation](_Linear24.apply(x, bias, *weight))
    return _kernel(x, weight, bias, activation)


def _linear_2_4_reference(x: Tensor, packed: Packed24, bias: Tensor | None) -> Tensor:
    return functional.linear(x, unpack_2_4(packed), bias)


def _kernel(x: Tensor, weight: Linear24Weight, bias: Tensor | None, activation: str = "none") -> Tensor:
    op = torch.ops.surgeon_kernels.linear_2_4
    return op(x, weight.fragments, bias, weight.rows, ACTIVATIONS.index(activation), weight.compressed, weight.dense)


class _Linear24(torch.autograd.Function):
    """The kernel with its gradients; the fields of the weight come one by one, its tensors as inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
        weight = Linear24Weight(*fields)
        ctx.save_for_backward(weight.fragments, weight.dense)
        ctx.fixed = {name: getattr(weight, name) for name in ("rows", "columns", "dtype", "kernel")}
        return _kernel(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        fragments, dense = ctx.saved_tensors
        weight = Linear24Weight(fragments=fragments, dense=dense, **ctx.fixed)
        dx = dy @ weight.unpacked() if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, *(None for _ in weight)


def _linear_2_4_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    activation: int,
    compressed: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    if dense is None:
        dense = _unpack_cpu(weight, rows, x.shape[-1], x.dtype)
    return _APPLY[ACTIVATIONS[activation]](functional.linear(x, dense, bias))


def _unpack_cpu(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return unpack_2_4(from_fragments(weight, rows, columns, dtype))


define(
    "linear_2_4(Tensor x, Tensor weight, Tensor? bias, int rows, int activation, Tensor? compressed=None,"
    " Tensor? dense=None) -> Tensor",
    fake=lambda x, weight, bias, rows, *_: x.new_empty(*x.shape[:-1], rows),
    cpu=_linear_2_4_cpu,
)
define(
    "linear_2_4_unpack(Tensor weight, int rows, int columns, ScalarType dtype) -> Tensor",
    fake=lambda weight, rows, columns, dtype: weight.new_empty(rows, columns, dtype=dtype),
    cpu=_unpack_cpu,
)


def _check(x: Tensor, weight: Linear24Weight | Packed24, bias: Tensor | None, activation: str) -> None:
    dtype, device = (
        (weight.values.dtype, weight.values.device)
        if isinstance(weight, Packed24)
        else (weight.dtype, weight.fragments.device)
    )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if x.dim() == 0 or x.shape[-1] != weight.columns:
        raise ValueError(f"x must be [..., {weight.columns}], not {list(x.shape)}")
    if bias is not None and bias.shape != (weight.rows,):
        raise ValueError(f"bias must be [{weight.rows}], not {list(bias.shape)}")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} as the weight is, not {tensor.dtype}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the weight on {device}")
