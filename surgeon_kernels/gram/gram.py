"""Gram accumulation: the sums of outer products that curvature factors are made of."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from surgeon_kernels.gram.plan import LEAST_HALF_WORK, LEAST_TOKENS, GramConfig, choose
from surgeon_kernels.gram.symmetric import SymmetricAccumulator
from surgeon_kernels.gram.symmetric_layout import TILE, tiles_per_side
from surgeon_kernels.linalg.half_products import addmm_half_
from surgeon_kernels.runtime.triton_support import has_kernels

_HALF = (torch.bfloat16, torch.float16)
# Rows of tiles that PyTorch multiplies at once on a GPU (an estimate): a single one is too little for it, and what a
# panel computes above the diagonal is wasted.
_PANEL = 8


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
    in the same pass, reading ``x`` where it lies. Rows that are not aligned to 16 bytes or have a mask are copied
    first, at the speed of memory, because the kernel's operands go from memory to the tensor cores without passing
    through registers, where they could be masked. Products with a column of ones are sums of columns, computed apart:
    the product is as wide as ``x``. Small products are cuBLAS's (:func:`surgeon_kernels.gram.plan.choose` is the rule).
    The same inputs give the same bits.

    Args:
        out: symmetric ``[C', C']``, float32 or float64, ``C' = C + ones_column``: a tensor, or a
            :class:`SymmetricAccumulator`, which takes half the memory and is the faster one.
        x: rows ``[..., C]`` of any leading shape and strides, any floating dtype.
        mask: bool ``[...]``, the leading shape of ``x``; rows where it is False (padding) are left out,
            NaN or not.
        alpha: scale of the sum.
        ones_column: append a constant 1 to every row: the input that a bias multiplies.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(out, x, mask, ones_column)
    rows, mask = _rows(x, mask)
    tokens, columns = rows.shape
    target, packed = (out.storage, out.packed) if isinstance(out, SymmetricAccumulator) else (out, False)
    if tokens == 0 or columns + ones_column == 0:
        return out
    config = kernel_config(target, rows, packed, ones_column)
    if config is not None:
        _accumulate_with_kernel(target, rows, mask, float(alpha), ones_column, config, packed)
        if out is target:
            from surgeon_kernels.gram.symmetric_triton import mirror_

            mirror_(target)
        return out
    rows = _prepare(rows, mask, ones_column)
    if rows.requires_grad:
        rows = rows.detach()  # results are written to out, which autograd does not follow
    if packed:
        packed_gram_reference_(target, rows, alpha)
    elif rows.is_cuda and rows.dtype in _HALF and target.dtype == torch.float32:
        # Half-precision products are exact in float32: the tensor cores read x as it is, no upcast copy.
        addmm_half_(target, rows.T, rows, alpha=alpha)
    else:
        gram_reference_(target, rows, alpha)
    return out


class GramProduct(NamedTuple):
    """Arguments of one :func:`gram_accumulate_`."""

    out: Tensor | SymmetricAccumulator
    x: Tensor
    mask: Tensor | None = None
    ones_column: bool = False


def gram_accumulate_each_(products: Sequence[GramProduct], *, alpha: float = 1.0) -> None:
    """:func:`gram_accumulate_` of every product, in order where they share an output.

    Small ones of 16-bit rows, as many each, are computed by one kernel: a launch for each, of the inputs of a decoder
    block's linears, say, would not fill a GPU.

    Raises:
        ValueError: as :func:`gram_accumulate_`.
    """
    for product in products:
        _check(*product)
    groups: dict[tuple[Any, ...], list[GramProduct]] = {}
    turns: dict[int, int] = {}
    for product in products:
        target = _storage(product.out)
        turn = turns[target.data_ptr()] = turns.get(target.data_ptr(), 0) + 1
        x, mask = _rows(product.x, product.mask)
        product = GramProduct(product.out, x, mask, product.ones_column)
        group = (turn, x.dtype, len(x), x.device) if _grouped(product) else (turn, len(groups))
        groups.setdefault(group, []).append(product)
    for group in sorted(groups, key=lambda group: group[0]):
        _accumulate_group(groups[group], float(alpha))


def _storage(out: Tensor | SymmetricAccumulator) -> Tensor:
    return out.storage if isinstance(out, SymmetricAccumulator) else out


def _grouped(product: GramProduct) -> bool:
    """The rule for one launch with others: small products, but for those of a mask and ones."""
    out, x, mask, ones_column = product
    packed = isinstance(out, SymmetricAccumulator) and out.packed
    if packed or not (x.is_cuda and x.dtype in _HALF and has_kernels()) or (mask is not None and ones_column):
        return False
    from surgeon_kernels.gram import gram_group_triton

    tokens, columns = x.shape
    if columns == 0 or tokens < LEAST_TOKENS or tokens * columns**2 >= LEAST_HALF_WORK or _properties(x.device)[0] < 8:
        return False
    return gram_group_triton.fits(_storage(out), x)


def _accumulate_group(group: Sequence[GramProduct], alpha: float) -> None:
    """Add products, of several all by the one kernel."""
    if len(group) == 1:
        out, x, mask, ones_column = group[0]
        gram_accumulate_(out, x, mask=mask, alpha=alpha, ones_column=ones_column)
        return
    from surgeon_kernels.gram import gram_group_triton, gram_rows_triton, gram_triton
    from surgeon_kernels.gram.symmetric_triton import mirror_

    for start in range(0, len(group), gram_group_triton.CAPACITY):
        chunk = group[start : start + gram_group_triton.CAPACITY]
        rows = [
            x if mask is None and gram_triton.readable(x) else gram_rows_triton.gather_rows(x, mask)
            for _, x, mask, _ in chunk
        ]
        outs = [_storage(product.out) for product in chunk]
        gram_group_triton.accumulate_(outs, rows, [product.ones_column for product in chunk], alpha)
        for product in chunk:
            if isinstance(product.out, Tensor):
                mirror_(product.out)


def gram_reference_(out: Tensor, rows: Tensor, alpha: float) -> Tensor:
    """``out += alpha * rowsᵀ rows`` computed in ``out``'s dtype; ``rows`` is ``[N, C']``."""
    rows = rows.to(out.dtype)
    return out.addmm_(rows.T, rows, alpha=alpha)


def packed_gram_reference_(storage: Tensor, rows: Tensor, alpha: float, *, panel: int | None = None) -> None:
    """``S += alpha rowsᵀ rows`` in the packed format, ``panel`` rows of tiles at a time; ``rows`` ``[N, n]``.

    In the storage's dtype; on CUDA devices 16-bit rows are multiplied as they are and summed in float32. Panels are of
    one row on the CPU and of :data:`_PANEL` on a GPU unless said otherwise.
    """
    n = rows.shape[1]
    side = tiles_per_side(n)
    half = rows.is_cuda and rows.dtype in _HALF and storage.dtype == torch.float32
    if not half:
        rows = rows.to(storage.dtype)
    if n < side * TILE:
        rows = functional.pad(rows, (0, side * TILE - n))
    panel = panel or (_PANEL if rows.is_cuda else 1)
    for start in range(0, side, panel):
        end = min(start + panel, side)
        left, right = rows[:, start * TILE : end * TILE].T, rows[:, : end * TILE]
        product = storage.new_empty(left.shape[0], right.shape[1])  # [(end - start) TILE, end TILE]
        if half:
            addmm_half_(product, left, right, beta=0.0)
        else:
            torch.mm(left, right, out=product)
        for i, tiles in enumerate(product.split(TILE), start):
            first = i * (i + 1) // 2
            lower = tiles[:, : (i + 1) * TILE].unflatten(1, (i + 1, TILE))
            storage[first : first + i + 1].add_(lower.transpose(0, 1), alpha=alpha)


def kernel_config(target: Tensor, rows: Tensor, packed: bool, ones_column: bool = False) -> GramConfig | None:
    """The Triton kernel's configuration for these operands, None where PyTorch computes the product."""
    if not (rows.is_cuda and has_kernels()) or target.stride(-1) != 1:
        return None
    tokens, columns = rows.shape
    major, processors = _properties(rows.device)
    return choose(columns, tokens, rows.dtype, target.dtype, major, packed, ones_column, processors)


@functools.cache
def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def _accumulate_with_kernel(
    target: Tensor, rows: Tensor, mask: Tensor | None, alpha: float, ones_column: bool, config: GramConfig, packed: bool
) -> None:
    """Add to the lower triangle of ``target``."""
    from surgeon_kernels.gram import gram_rows_triton, gram_triton

    tokens, columns = rows.shape
    if mask is not None or not gram_triton.readable(rows):
        rows = gram_rows_triton.gather_rows(rows, mask)
    if ones_column:  # apart: the product need not be wider than x
        gram_rows_triton.add_column_sums_(target, rows, mask, alpha, packed)
    gram_triton.accumulate_(
        target, rows, alpha, gram_triton.plan(columns, tokens, rows.dtype, packed, config, rows.device)
    )


def _prepare(rows: Tensor, mask: Tensor | None, ones_column: bool) -> Tensor:
    """Masked rows with their ones for PyTorch's product: ``[N, C']``."""
    if mask is not None:
        # Filled, not indexed: indexing by a mask is a host sync.
        rows = rows.masked_fill(~mask[:, None], 0.0)
    if ones_column:
        ones = rows.new_ones(len(rows), 1) if mask is None else mask[:, None].to(rows.dtype)
        rows = torch.cat([rows, ones], dim=1)
    return rows


def _rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x`` as ``[N, C]`` and the mask as ``[N]``, in the order of memory: of any order, this one needs no copy."""
    if x.dim() == 2:
        return x, mask
    if x.is_contiguous() and (mask is None or mask.is_contiguous()):
        return x.view(x.shape[:-1].numel(), x.shape[-1]), None if mask is None else mask.view(-1)
    strides = x.stride()
    leading = sorted(range(x.dim() - 1), key=lambda d: -strides[d])
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
    if x.device != out.device or (mask is not None and mask.device != x.device):
        devices = ", ".join(str(t.device) for t in (out, x, mask) if t is not None)
        raise ValueError(f"out, x and mask must be on one device, not {devices}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(f"mask must be bool {list(x.shape[:-1])}, not {mask.dtype} {list(mask.shape)}")
