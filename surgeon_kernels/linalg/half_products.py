"""Products of 16-bit matrices on CUDA devices whose sums are in float32 whatever PyTorch's switches allow."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

# Elements that rows are padded to multiples of: of 16 bits, the 16 bytes that cuBLAS's fast kernels need rows to begin
# at multiples of; and multiplications from which on operands that do not are copied (an estimate).
_ROW, _COPIED_FROM = 8, 2**27

# Of float16 and of bfloat16, whether partial sums may be rounded and whether cuBLASLt may split sums; and whether
# float16 may be summed in float16.
_Switches = tuple[tuple[bool, bool], tuple[bool, bool], bool]
_PINNED: _Switches = ((False, True), (False, True), False)

_lock = threading.Lock()
_inside = 0
_before = _PINNED


def addmm_half_(out: Tensor, A: Tensor, B: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """``out = beta out + alpha A B`` of float16 or bfloat16 matrices on a CUDA device, see :func:`float32_sums`.

    Large matrices whose rows are not aligned, a bias making their number odd, are copied to such first: the kernels for
    the others take several times as long.

    Args:
        out: ``[m, n]``, of the dtype of ``A`` ``[m, k]`` and ``B`` ``[k, n]``, or float32. With ``beta = 0`` it
            is not read.
    """
    if A.shape[0] * A.shape[1] * B.shape[1] < _COPIED_FROM:
        return _addmm_(out, A, B, beta, alpha)
    into = out if _is_aligned(out) else aligned_empty(out.shape, out.dtype, out.device)
    if into is not out and beta:
        into.copy_(out)
    _addmm_(into, aligned(A), aligned(B), beta, alpha)
    return out if into is out else out.copy_(into)


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any values whose rows begin at multiples of 16 bytes: a view of one that is up to 7 columns wider."""
    width = -(-shape[-1] // _ROW) * _ROW
    return torch.empty(*shape[:-1], width, dtype=dtype, device=device)[..., : shape[-1]]


def padded(x: Tensor) -> Tensor:
    """A matrix, or a copy of it with zeros after its rows and columns, up to multiples of 8."""
    below, behind = (-side % _ROW for side in x.shape)
    return functional.pad(x, (0, behind, 0, below)) if below or behind else x


def aligned(x: Tensor) -> Tensor:
    """A matrix, or a copy of it whose rows (columns, of a transposed one) begin at multiples of 16 bytes."""
    if _is_aligned(x):
        return x
    transposed = x.stride(0) == 1
    rows = x.T if transposed else x
    copy = aligned_empty(rows.shape, x.dtype, x.device).copy_(rows)
    return copy.T if transposed else copy


def _is_aligned(x: Tensor) -> bool:
    along, across = sorted(x.stride())
    return along == 1 and across * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def _addmm_(out: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float) -> Tensor:
    if out.dtype == A.dtype:
        with float32_sums():
            return torch.addmm(out, A, B, beta=beta, alpha=alpha, out=out)
    # Partial sums are rounded to the output's dtype at most: here float32, and holding the switches would
    # cost the host more than a small product.
    summed_in_half = A.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    with float32_sums() if summed_in_half else nullcontext():
        return torch.addmm(out, A, B, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


class float32_sums(ContextDecorator):
    """Holds ``torch.backends.cuda.matmul``'s ``allow_fp16_reduced_precision_reduction``, its sibling of bfloat16 and
    ``allow_fp16_accumulation`` at False, and restores them on exit: a context manager, or a decorator of functions.

    They belong to the process: meanwhile products that other threads launch sum in float32 as well. Of several threads
    in here the last to leave restores them; assignments to them meanwhile are lost. One around several products
    costs the host less than one around each.
    """

    def __enter__(self) -> None:
        global _inside, _before
        with _lock:
            if _inside == 0:
                _before = _switches()
                _switch(_PINNED)
            _inside += 1

    def __exit__(self, *error: object) -> None:
        global _inside
        with _lock:
            _inside -= 1
            if _inside == 0:
                _switch(_before)


def _switches() -> _Switches:
    allowed = torch.backends.cuda.matmul
    return (
        (allowed.allow_fp16_reduced_precision_reduction, allowed.allow_fp16_reduced_precision_reduction_split_k),
        (allowed.allow_bf16_reduced_precision_reduction, allowed.allow_bf16_reduced_precision_reduction_split_k),
        allowed.allow_fp16_accumulation,
    )


def _switch(values: _Switches) -> None:
    allowed = torch.backends.cuda.matmul
    allowed.allow_fp16_reduced_precision_reduction = values[0]
    allowed.allow_bf16_reduced_precision_reduction = values[1]
    allowed.allow_fp16_accumulation = values[2]
