"""An iteration of :class:`surgeon_kernels.masked_cg.MaskedCG` around its product, in three passes on CUDA.

Each pass is one kernel whose programs add up their part of an inner product in float64; the next kernel's programs
all add up the parts, in the same order, and so know the scalar without another launch and without the host::

    curvature   c = Σ D∘Q                                   reads D, Q               8 bytes an entry
    residual    R ← free ∘ (R - l Q),  e' = Σ S∘R²          reads R, Q, free         13
    direction   X ← X + l D,  D ← S∘R + (e'/e) D            reads R, D, X            20
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from surgeon_kernels.masked_cg import MaskedCG

# Entries of a row that a program takes at once, its warps, and programs a multiprocessor holds at a time: best or
# within 2 % of it at 4096 x 4096 and 11008 x 4096 on an H200 (`bench/joint_update.py --tune`).
_BLOCK, _WARPS, _RESIDENT = 1024, 8, 4


@triton.jit
def block_of(unit, columns, blocks, BLOCK: tl.constexpr):
    """Row, columns and (int64) offset of a unit of work: ``BLOCK`` entries of one row of a contiguous matrix."""
    row = unit // blocks
    c = unit % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, c, row.to(tl.int64) * columns + c, c < columns


@triton.jit
def total(parts, count, PARTS: tl.constexpr):
    i = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + i, mask=i < count, other=0.0), 0)


@triton.jit
def length(energy, curvature):
    """``l = e / c``, 0 once either has vanished: nothing moves any more."""
    return tl.where((energy > 0.0) & (curvature > 0.0), energy / curvature, 0.0)


@triton.jit
def diagonal(row_scales, column_scales, rows, columns, row, c, inside, TERMS: tl.constexpr):
    """``1 / S`` at these entries: ``Σ_i diag(L_i)_row diag(M_i)_c``."""
    s = tl.load(row_scales + row) * tl.load(column_scales + c, mask=inside, other=1.0)
    for i in tl.static_range(1, TERMS):
        s += tl.load(row_scales + i * rows + row) * tl.load(column_scales + i * columns + c, mask=inside, other=0.0)
    return s


@triton.jit
def curvature_kernel(direction, image, curvatures, columns, blocks, units, BLOCK: tl.constexpr):
    sum = tl.zeros([BLOCK], tl.float64)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        _, _, at, inside = block_of(unit, columns, blocks, BLOCK)
        d = tl.load(direction + at, mask=inside, other=0.0)
        q = tl.load(image + at, mask=inside, other=0.0)
        sum += d.to(tl.float64) * q.to(tl.float64)
    tl.store(curvatures + tl.program_id(0), tl.sum(sum, 0))


@triton.jit
def residual_kernel(
    residual,
    image,
    free,
    row_scales,
    column_scales,
    curvatures,
    energies,
    new_energies,
    k,
    rows,
    columns,
    blocks,
    units,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    step = length(tl.load(energies + k), total(curvatures, tl.num_programs(0), PARTS)).to(tl.float32)
    sum = tl.zeros([BLOCK], tl.float64)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row, c, at, inside = block_of(unit, columns, blocks, BLOCK)
        r = tl.load(residual + at, mask=inside, other=0.0)
        q = tl.load(image + at, mask=inside, other=0.0)
        is_free = tl.load(free + at, mask=inside, other=0) != 0
        r = tl.where(is_free, r - step * q, 0.0)
        tl.store(residual + at, r, mask=inside)
        s = diagonal(row_scales, column_scales, rows, columns, row, c, inside, TERMS)
        sum += r.to(tl.float64) * (r / s).to(tl.float64)
    tl.store(new_energies + tl.program_id(0), tl.sum(sum, 0))


@triton.jit
def direction_kernel(
    x,
    residual,
    direction,
    row_scales,
    column_scales,
    curvatures,
    new_energies,
    energies,
    decreases,
    k,
    rows,
    columns,
    blocks,
    units,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    before, after = tl.load(energies + k), total(new_energies, tl.num_programs(0), PARTS)
    step64 = length(before, total(curvatures, tl.num_programs(0), PARTS))
    step = step64.to(tl.float32)
    ratio = tl.where(step64 > 0.0, after / before, 0.0).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(energies + k + 1, after)
        tl.store(decreases + k, 0.5 * step64 * before)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row, c, at, inside = block_of(unit, columns, blocks, BLOCK)
        d = tl.load(direction + at, mask=inside, other=0.0)
        r = tl.load(residual + at, mask=inside, other=0.0)
        tl.store(x + at, tl.load(x + at, mask=inside, other=0.0) + step * d, mask=inside)
        s = diagonal(row_scales, column_scales, rows, columns, row, c, inside, TERMS)
        tl.store(direction + at, r / s + ratio * d, mask=inside)


class Passes:
    """The three kernels on the tensors of one solver."""

    def __init__(
        self, solver: MaskedCG, *, resident: int = _RESIDENT, block: int = _BLOCK, warps: int = _WARPS
    ) -> None:
        # The solver's tensors, not the solver: only the garbage collector would free the two if each held the other.
        self.x, self.residual, self.direction, self.image = solver.x, solver.residual, solver.direction, solver.image
        self.free, self.terms, self.warps = solver.free.view(torch.uint8), len(solver.terms), warps
        rows, columns = solver.x.shape
        self.block = min(block, triton.next_power_of_2(columns))
        blocks = triton.cdiv(columns, self.block)
        self.sizes = (rows, columns, blocks, rows * blocks)
        device = solver.x.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if solver.x.is_cuda else 2
        self.programs = min(rows * blocks, resident * processors)
        self.curvatures, self.new_energies = torch.empty(2, self.programs, dtype=torch.float64, device=device)
        self.row_scales, self.column_scales = solver.row_scales.contiguous(), solver.column_scales.contiguous()

    def begin(self, iterations: int, energy: Tensor) -> None:
        """Room for the scalars of so many iterations, the first of which starts from ``energy``."""
        self.energies = energy.new_empty(iterations + 1)
        self.energies[0] = energy
        self.decreases = energy.new_zeros(iterations)

    def finish(self, k: int) -> None:
        """The rest of iteration ``k``, once the product is there."""
        rows, columns, blocks, units = self.sizes
        constants = {"BLOCK": self.block, "num_warps": self.warps}
        with torch.cuda.device_of(self.x):
            curvature_kernel[(self.programs,)](
                self.direction, self.image, self.curvatures, columns, blocks, units, **constants
            )
            constants |= {"TERMS": self.terms, "PARTS": triton.next_power_of_2(self.programs)}
            residual_kernel[(self.programs,)](
                self.residual,
                self.image,
                self.free,
                self.row_scales,
                self.column_scales,
                self.curvatures,
                self.energies,
                self.new_energies,
                k,
                rows,
                columns,
                blocks,
                units,
                **constants,
            )
            direction_kernel[(self.programs,)](
                self.x,
                self.residual,
                self.direction,
                self.row_scales,
                self.column_scales,
                self.curvatures,
                self.new_energies,
                self.energies,
                self.decreases,
                k,
                rows,
                columns,
                blocks,
                units,
                **constants,
            )
