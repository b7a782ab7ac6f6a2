"""Gram accumulation: the sums of outer products that curvature factors are made of."""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def gram_accumulate_(
    out: Tensor, x: Tensor, *, mask: Tensor | None = None, alpha: float = 1.0, ones_column: bool = False
) -> Tensor:
    """Add the Gram matrix of the rows of ``x`` to ``out``, in place::

        out += alpha * Σ_n mask_n x̃_n x̃_nᵀ,    x̃_n = x_n, or [x_n, 1] with ones_column

    Args:
        out: symmetric accumulator ``[C', C']``, float32 or float64, ``C' = C + ones_column``.
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
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if mask is not None:
        # Filled, not indexed: indexing by a mask would wait for the device.
        rows = rows.masked_fill(~mask.reshape(-1, 1), 0.0)
    if rows.is_cuda and rows.dtype in _HALF and out.dtype == torch.float32 and not ones_column:
        # Half-precision products are exact in float32: the tensor cores read x as it is, no upcast copy.
        return out.add_(torch.mm(rows.T, rows, out_dtype=torch.float32), alpha=alpha)
    if ones_column:
        ones = rows.new_ones(len(rows), 1) if mask is None else mask.reshape(-1, 1).to(rows.dtype)
        rows = torch.cat([rows, ones], dim=1)
    return gram_reference_(out, rows, alpha)


def gram_reference_(out: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """``out += alpha * rowsᵀ rows`` computed in ``out``'s dtype; ``rows`` is ``[N, C']``."""
    rows = rows.to(out.dtype)
    return out.addmm_(rows.T, rows, alpha=alpha)


def _check(out: Tensor, x: Tensor, mask: Tensor | None, ones_column: bool) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor [..., C], not {x.dtype} {list(x.shape)}")
    size = x.shape[-1] + ones_column
    if out.shape != (size, size) or out.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"out must be float32 or float64 [{size}, {size}] for x {list(x.shape)}, not {out.dtype} {list(out.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(f"mask must be bool {list(x.shape[:-1])}, not {mask.dtype} {list(mask.shape)}")
