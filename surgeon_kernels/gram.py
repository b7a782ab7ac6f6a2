"""Gram accumulation: the sums of outer products that curvature factors are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon_kernels.gram_plan import GramConfig, choose
from surgeon_kernels.symmetric import SymmetricAccumulator
from surgeon_kernels.triton_support import has_kernels

_HALF = (torch.bfloat16, torch.float16)


def gram_accumulate_(
    out: Tensor | SymmetricAccumulator,
    x: Tensor,
    *,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    ones_column: bool = False,
) -> Tensor | SymmetricAccumulator:
    """Add the Gram matrix of the rows of ``x`` to ``out``, in place::

        out += alpha * Σ_n mask_n x̃_n x̃_nᵀ,    x̃_n = x_n, or [x_n, 1] with ones_column

    On CUDA devices with a tuned configuration a Triton kernel computes the lower triangle only and adds it to ``out``
    in the same pass. It reads ``x`` where it lies if rows are contiguous and aligned to 16 bytes and there is neither
    a mask nor a column of ones; otherwise an aligned copy is made first, in one pass. The same inputs give the same
    bits.

    Args:
        out: symmetric ``[C', C']``, float32 or float64, ``C' = C + ones_column``: a tensor, or a
            :class:`SymmetricAccumulator`, which takes half the memory and is the faster one.
        x: rows ``[..., C]`` of any leading shape and strides, any floating dtype.
        mask: bool ``[...]``, the leading shape of ``x``; rows where it is False (padding) count for nothing,
            whatever they hold.
        alpha: scale of the sum.
        ones_column: append a constant 1 to every row: the input that a bias multiplies.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(out, x, mask, ones_column)
    rows, mask = _rows(x, mask)
    if rows.shape[0] == 0:
        return out
    config = kernel_config(out, rows, ones_column)
    if config is not None:
        _accumulate_with_kernel(out, rows, mask, alpha, ones_column, config)
        return out
    if mask is not None:
        # Filled, not indexed: indexing by a mask would wait for the device.
        rows = rows.masked_fill(~mask[:, None], 0.0)
    if ones_column:
        ones = rows.new_ones(len(rows), 1) if mask is None else mask[:, None].to(rows.dtype)
        rows = torch.cat([rows, ones], dim=1)
    if isinstance(out, SymmetricAccumulator):
        out.add_gram_reference_(rows, alpha)
        return out
    if rows.is_cuda and rows.dtype in _HALF and out.dtype == torch.float32:
        # Half-precision products are exact in float32: the tensor cores read x as it is, no upcast copy.
        return out.add_(torch.mm(rows.T, rows, out_dtype=torch.float32), alpha=alpha)
    return gram_reference_(out, rows, alpha)


def gram_reference_(out: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """``out += alpha * rowsᵀ rows`` computed in ``out``'s dtype; ``rows`` is ``[N, C']``."""
    rows = rows.to(out.dtype)
    return out.addmm_(rows.T, rows, alpha=alpha)


def kernel_config(out: Tensor | SymmetricAccumulator, rows: Tensor, ones_column: bool = False) -> GramConfig | None:
    """The Triton kernel's configuration for these operands, None where PyTorch computes the product."""
    if not (rows.is_cuda and has_kernels()):
        return None
    if isinstance(out, Tensor) and (out.stride(1) != 1 or out.stride(0) < out.shape[1]):
        return None
    major, _ = torch.cuda.get_device_capability(rows.device)
    return choose(rows.shape[1] + ones_column, rows.dtype, out.dtype, major)


def _accumulate_with_kernel(
    out: Tensor | SymmetricAccumulator,
    rows: Tensor,
    mask: Tensor | None,
    alpha: float,
    ones_column: bool,
    config: GramConfig,
) -> None:
    from surgeon_kernels import gram_triton, symmetric_triton

    if mask is not None or ones_column or not gram_triton.readable(rows):
        rows = gram_triton.gather_rows(rows, mask, ones_column)
    if isinstance(out, SymmetricAccumulator):
        gram_triton.accumulate_(out.storage, out.n, rows, alpha, config, packed=True)
    else:
        gram_triton.accumulate_(out, out.shape[0], rows, alpha, config, packed=False)
        symmetric_triton.mirror_(out)


def _rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x`` as ``[N, C]`` and the mask as ``[N]``, rows in the order of memory: any order will do, this needs no copy."""
    leading = sorted(range(x.dim() - 1), key=lambda d: -x.stride(d))
    rows = x.permute(*leading, -1).reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows, None if mask is None else mask.permute(leading).reshape(-1)


def _check(out: Tensor | SymmetricAccumulator, x: Tensor, mask: Tensor | None, ones_column: bool) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [..., C], not {x.dtype} {list(x.shape)}")
    size = x.shape[-1] + ones_column
    shape = (out.n, out.n) if isinstance(out, SymmetricAccumulator) else out.shape
    if shape != (size, size) or out.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"out must be float32 or float64 [{size}, {size}] for x {list(x.shape)}, not {out.dtype} {list(shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(f"mask must be bool {list(x.shape[:-1])}, not {mask.dtype} {list(mask.shape)}")
