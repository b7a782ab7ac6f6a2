"""The format of :mod:`surgeon_kernels.gram.symmetric_layout` in Triton kernels; its unpacking."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from surgeon_kernels.gram.symmetric_layout import TILE
from surgeon_kernels.runtime.launch import kind, launch, on_device

_TILE = tl.constexpr(TILE)
# Side of the tile that one program transposes (an estimate).
_BLOCK = 64


@triton.jit
def row_offsets(r: tl.tensor, stride: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:
    """Offset of row ``r``; the offset of ``(r, c)`` is ``row_offsets(r) + column_offsets(c)`` (int64)."""
    r = r.to(tl.int64)
    if PACKED:
        tile = r // _TILE
        return tile * (tile + 1) // 2 * (_TILE * _TILE) + r % _TILE * _TILE
    return r * stride


@triton.jit
def column_offsets(c: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:
    """Offset of column ``c`` (int64), see :func:`row_offsets`."""
    if PACKED:
        return (c // _TILE).to(tl.int64) * (_TILE * _TILE) + c % _TILE
    return c.to(tl.int64)


@triton.jit
def exists(r: tl.tensor, c: tl.tensor, n: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:
    """Mask of the elements ``(r, c)`` that the storage holds: bool ``[len(r), len(c)]``."""
    if PACKED:
        side = (n + _TILE - 1) // _TILE
        return (r // _TILE < side)[:, None] & (c // _TILE <= (r // _TILE)[:, None])
    return (r < n)[:, None] & (c < n)[None, :]


@triton.jit(do_not_specialize=["n"])
def mirror_kernel(
    source: tl.tensor,
    target: tl.tensor,
    n: tl.tensor,
    source_stride: tl.tensor,
    target_stride: tl.tensor,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """``target[r, c] = target[c, r] = source[r, c]`` for ``r >= c``; a dense source is its own target."""
    i, j = tl.program_id(0), tl.program_id(1)
    if j > i:
        return
    r = i * BLOCK + tl.arange(0, BLOCK)
    c = j * BLOCK + tl.arange(0, BLOCK)
    inside = (r < n)[:, None] & (c < n)[None, :]
    offsets = row_offsets(r, source_stride, PACKED)[:, None] + column_offsets(c, PACKED)[None, :]
    block = tl.load(source + offsets, mask=inside & (r[:, None] >= c[None, :]), other=0.0)
    if PACKED:
        lower = r.to(tl.int64)[:, None] * target_stride + c[None, :]
        tl.store(target + lower, block, mask=inside & (r[:, None] >= c[None, :]))
    upper = c.to(tl.int64)[:, None] * target_stride + r[None, :]
    tl.store(target + upper, tl.trans(block), mask=tl.trans(inside) & (c[:, None] < r[None, :]))


def unpack(storage: Tensor, n: int) -> Tensor:
    """The full matrix ``[n, n]`` of a packed storage."""
    full = storage.new_empty(n, n)
    _mirror(storage, full, n, packed=True)
    return full


def mirror_(matrix: Tensor) -> Tensor:
    """Copy the lower triangle of ``matrix`` ``[n, n]`` (unit last stride) onto the upper one."""
    _mirror(matrix, matrix, matrix.shape[0], packed=False)
    return matrix


def _mirror(source: Tensor, target: Tensor, n: int, packed: bool) -> None:
    blocks = -(-n // _BLOCK)
    if blocks == 0:
        return
    strides = source.stride(0), target.stride(0)
    device = source.get_device()
    with on_device(device):
        launch(
            mirror_kernel, (packed, device, kind(source), kind(target), *map(kind, strides)), (blocks, blocks, 1),
            source, target, n, *strides, packed, _BLOCK,
        )  # fmt: skip
