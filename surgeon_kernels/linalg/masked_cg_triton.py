"""The kernels of :class:`surgeon_kernels.linalg.masked_cg.FusedCG`: an iteration around its product, in three passes.

Each pass is one kernel whose programs add up their part of an inner product in float64; the next kernel's programs
all add up the parts, in the same order, and so know the scalar without another launch and without the host::

    curvature   c = b² Σ D∘Q                                                 reads D, Q               6 bytes an entry
    residual    R ← free ∘ (R - l b Q),  Z = S∘R,  e' = Σ R∘Z,  max |Z|      reads R, Q, free         13
    direction   X ← X + l b D,  b' = max |Z| + (e'/e) b,  D ← (Z + (e'/e) b D) / b'   reads R, D, X   16

With a correction ``Z``, ``R`` plus a product of two thin matrices, is put in the place of ``Q`` between the last two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries of a row that a program takes at once, its warps, and programs a multiprocessor holds at a time: best or
# within 2 % of it at 4096 x 4096 and 11008 x 4096 on an H200, by `python -m bench.kernels.joint_update --tune`.
_BLOCK, _WARPS, _RESIDENT = 1024, 8, 4


@triton.jit
def block_of(
    unit: tl.tensor, columns: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Row, columns and (int64) offset of a unit of work: ``BLOCK`` entries of one row of a contiguous matrix."""
    row = unit // blocks
    c = unit % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, c, row.to(tl.int64) * columns + c, c < columns


@triton.jit
def total(parts: tl.tensor, count: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    """Sum of the first ``count`` of ``parts``."""
    i = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + i, mask=i < count, other=0.0), 0)


@triton.jit
def length(energy: tl.tensor, curvature: tl.tensor) -> tl.tensor:
    """``l = e / c``, 0 once either has vanished: nothing moves any more."""
    return tl.where((energy > 0.0) & (curvature > 0.0), energy / curvature, 0.0)


@triton.jit
def preconditioned(
    r: tl.tensor,
    row_scales: tl.tensor,
    column_scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row: tl.tensor,
    c: tl.tensor,
    inside: tl.tensor,
    TERMS: tl.constexpr,
) -> tl.tensor:
    """``S∘R`` at these entries; ``1 / S = Σ_i diag(L_i)_row diag(M_i)_c``, or 1 for the scaled operator of one term."""
    if TERMS > 1:
        s = tl.load(row_scales + row) * tl.load(column_scales + c, mask=inside, other=1.0)
        for i in tl.static_range(1, TERMS):
            s += tl.load(row_scales + i * rows + row) * tl.load(column_scales + i * columns + c, mask=inside, other=0.0)
        r = r / s
    return r


@triton.jit
def curvature_kernel(
    direction: tl.tensor,
    image: tl.tensor,
    curvatures: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    units: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Part of ``c / b²``, see above: the direction is kept over ``b``."""
    sum = tl.zeros([BLOCK], tl.float64)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        _, _, at, inside = block_of(unit, columns, blocks, BLOCK)
        d = tl.load(direction + at, mask=inside, other=0.0)
        q = tl.load(image + at, mask=inside, other=0.0)
        sum += d.to(tl.float64) * q.to(tl.float64)
    tl.store(curvatures + tl.program_id(0), tl.sum(sum, 0))


@triton.jit
def residual_kernel(
    residual: tl.tensor,
    image: tl.tensor,
    free: tl.tensor,
    row_scales: tl.tensor,
    column_scales: tl.tensor,
    curvatures: tl.tensor,
    energies: tl.tensor,
    bounds: tl.tensor,
    new_energies: tl.tensor,
    largest: tl.tensor,
    k: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    units: tl.tensor,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Second pass over some entries: ``R``, and parts of ``e'`` and ``max |Z|``."""
    bound = tl.load(bounds + k)
    curvature = total(curvatures, tl.num_programs(0), PARTS) * bound * bound
    step = (length(tl.load(energies + k), curvature) * bound).to(tl.float32)
    sum = tl.zeros([BLOCK], tl.float64)
    most = tl.zeros([BLOCK], tl.float32)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row, c, at, inside = block_of(unit, columns, blocks, BLOCK)
        r = tl.load(residual + at, mask=inside, other=0.0)
        q = tl.load(image + at, mask=inside, other=0.0)
        is_free = tl.load(free + at, mask=inside, other=0) != 0
        r = tl.where(is_free, r - step * q, 0.0)
        tl.store(residual + at, r, mask=inside)
        z = preconditioned(r, row_scales, column_scales, rows, columns, row, c, inside, TERMS)
        sum += r.to(tl.float64) * z.to(tl.float64)
        most = tl.maximum(most, tl.abs(z))
    tl.store(new_energies + tl.program_id(0), tl.sum(sum, 0))
    tl.store(largest + tl.program_id(0), tl.max(most, 0))


@triton.jit
def direction_kernel(
    x: tl.tensor,
    source: tl.tensor,
    direction: tl.tensor,
    free: tl.tensor,
    row_scales: tl.tensor,
    column_scales: tl.tensor,
    curvatures: tl.tensor,
    new_energies: tl.tensor,
    largest: tl.tensor,
    energies: tl.tensor,
    bounds: tl.tensor,
    decreases: tl.tensor,
    k: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    blocks: tl.tensor,
    units: tl.tensor,
    TERMS: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Third pass over some entries: ``X`` and ``D``; the first program keeps ``e'``, ``b'`` and ``½ l e``."""
    # A correction adds one part.
    before, after = tl.load(energies + k), total(new_energies, tl.num_programs(0) + CORRECTED, PARTS)
    bound = tl.load(bounds + k)
    step64 = length(before, total(curvatures, tl.num_programs(0), PARTS) * bound * bound)
    step = (step64 * bound).to(tl.float32)
    ratio = tl.where(step64 > 0.0, after / before * bound, 0.0)
    i = tl.arange(0, PARTS)
    most = tl.max(tl.load(largest + i, mask=i < tl.num_programs(0) + CORRECTED, other=0.0), 0)
    new_bound = most.to(tl.float64) + ratio
    inverse = tl.where(new_bound > 0.0, 1.0 / new_bound, 0.0).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(energies + k + 1, after)
        tl.store(bounds + k + 1, new_bound)
        tl.store(decreases + k, 0.5 * step64 * before)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row, c, at, inside = block_of(unit, columns, blocks, BLOCK)
        d = tl.load(direction + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(source + at, mask=inside, other=0.0)
        tl.store(x + at, tl.load(x + at, mask=inside, other=0.0) + step * d, mask=inside)
        if CORRECTED:
            z = tl.where(tl.load(free + at, mask=inside, other=0) != 0, z, 0.0)
        else:
            z = preconditioned(z, row_scales, column_scales, rows, columns, row, c, inside, TERMS)
        d = (z + ratio.to(tl.float32) * d) * inverse
        tl.store(direction + at, d.to(direction.dtype.element_ty), mask=inside)


class Passes:
    """The three passes over matrices ``[rows, columns]`` and the partial sums that they hand to each other.

    Attributes:
        curvatures, new_energies, largest: the programs' parts of ``c / b²``, ``e'`` and ``max |Z|``; of the two latter
            the last one is a correction's.
    """

    def __init__(
        self,
        shape: torch.Size,
        terms: int,
        device: torch.device,
        *,
        resident: int = _RESIDENT,
        block: int = _BLOCK,
        warps: int = _WARPS,
    ) -> None:
        rows, columns = shape
        block = min(block, triton.next_power_of_2(columns))
        blocks = triton.cdiv(columns, block)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        programs = min(rows * blocks, resident * processors)
        self._grid, self._sizes = (programs,), (rows, columns, blocks, rows * blocks)
        self._sums = {"BLOCK": block, "num_warps": warps}
        self._constants = self._sums | {"TERMS": terms, "PARTS": triton.next_power_of_2(programs + 1)}
        self.curvatures, self.new_energies = torch.empty(2, programs + 1, dtype=torch.float64, device=device)
        self.largest = torch.empty(programs + 1, device=device)

    def curvature(self, direction: Tensor, image: Tensor) -> None:
        curvature_kernel[self._grid](direction, image, self.curvatures, *self._sizes[1:], **self._sums)

    def residual(
        self,
        residual: Tensor,
        image: Tensor,
        free: Tensor,
        scales: tuple[Tensor, Tensor],
        energies: Tensor,
        bounds: Tensor,
        k: int,
    ) -> None:
        residual_kernel[self._grid](
            residual, image, free, *scales, self.curvatures, energies, bounds, self.new_energies, self.largest,
            k, *self._sizes, **self._constants,
        )  # fmt: skip

    def direction(
        self,
        x: Tensor,
        source: Tensor,
        direction: Tensor,
        free: Tensor,
        scales: tuple[Tensor, Tensor],
        energies: Tensor,
        bounds: Tensor,
        decreases: Tensor,
        k: int,
        *,
        corrected: bool,
    ) -> None:
        """``source`` is ``R``, or ``Z`` where it is corrected."""
        direction_kernel[self._grid](
            x, source, direction, free, *scales, self.curvatures, self.new_energies, self.largest,
            energies, bounds, decreases, k, *self._sizes, CORRECTED=corrected, **self._constants,
        )  # fmt: skip
