"""Layout of packed 2:4 weights for the kernels of :mod:`surgeon_kernels.sparse24.linear_2_4`: their registers' order.

The sparse tensor-core instructions ``mma.sp.m16n8k32`` and ``wgmma.sp.m64nNk32`` (16 bits, PTX ISA) take a tile of
16 rows by 32 columns of W from the 32 lanes of a warp. Lane ``4 g + t`` holds, two values to a register,

    register 0: row g,     columns 4 t      .. 4 t + 3         register 1: row g + 8, the same columns
    register 2: row g,     columns 4 t + 16 .. 4 t + 19        register 3: row g + 8, the same columns

and of the 2-bit positions, two lanes of every four hold 32 bits: the lower half for row ``g``, the upper for row
``g + 8``, in lane ``t = 0`` for columns 0 .. 15, in ``t = 1`` for 16 .. 31. A second tile has its positions in lanes
``t = 2, 3`` of the same register. So a unit of 16 rows by 128 columns, four tiles, is 2304 bytes in a row::

    values [tile 4][lane 32][register 4][2] of 16 bits, positions [lane 32][register 2] of 32 bits

which a warp reads in four loads of 16 bytes a lane and one of 8, all coalesced. Units of the same 16 rows follow each
other. Rows and columns past the end of W are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from surgeon_kernels.sparse24.pack_2_4 import Packed24

UNIT_ROWS, UNIT_COLUMNS, UNIT_BYTES = 16, 128, 2304
_PAD_POSITIONS = 0x44  # positions 0 and 1 in both groups of a byte: two equal positions would be undefined


def fragments(packed: Packed24) -> Tensor:
    """The weight as uint8 ``[ceil(R / 16), ceil(C / 128), 2304]``; ``values`` must have 16 bits, ``C % 8 == 0``."""
    values, indices = packed.values, packed.indices
    R, half = values.shape
    row_pad, column_pad = -R % UNIT_ROWS, -2 * half % UNIT_COLUMNS
    if row_pad or column_pad:
        values = functional.pad(values.view(torch.int16), (0, column_pad // 2, 0, row_pad))
        indices = functional.pad(indices, (0, column_pad // 8, 0, row_pad), value=_PAD_POSITIONS)
    blocks, units = values.shape[0] // UNIT_ROWS, values.shape[1] * 2 // UNIT_COLUMNS
    # [block, half of rows, g, unit, tile, half of columns, t, 4 bytes]
    v = values.view(torch.uint8).view(blocks, 2, 8, units, 4, 2, 4, 4).permute(0, 3, 4, 2, 6, 5, 1, 7)
    # [block, half of rows, g, unit, register, tile of two, half of columns, 2 bytes]
    e = indices.view(blocks, 2, 8, units, 2, 2, 2, 2).permute(0, 3, 2, 5, 6, 4, 1, 7)
    return torch.cat((v.reshape(blocks, units, 2048), e.reshape(blocks, units, 256)), dim=2)


def from_fragments(data: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Packed24:
    """The inverse of :func:`fragments`."""
    blocks, units = data.shape[:2]
    v = data[:, :, :2048].view(dtype).reshape(blocks, units, 4, 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)
    e = data[:, :, 2048:].reshape(blocks, units, 8, 2, 2, 2, 2, 2).permute(0, 6, 2, 1, 5, 3, 4, 7)
    values = v.reshape(blocks * UNIT_ROWS, units * UNIT_COLUMNS // 2)[:rows, : columns // 2].contiguous()
    indices = e.reshape(blocks * UNIT_ROWS, units * UNIT_COLUMNS // 8)[:rows, : columns // 8].contiguous()
    return Packed24(values, indices)
