"""An iteration of :class:`surgeon_kernels.masked_cg.MaskedCG` around its product, in three passes on CUDA.

The operator of one product is scaled to a unit diagonal, ``L̂ = L / √(diag L diag Lᵀ)``, and with it ``R``, ``X`` and
``D``, so that ``S = 1``. Then the product's operands, ``D`` among them, are in float16, which rounds as TF32 does in
half of the time (see :mod:`surgeon_kernels.kron_product`): kept is ``D / b`` with ``b >= max |D|``. Of several products
the diagonals have no such scaling; these are in TF32, and ``D / b`` is in float32.

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

from surgeon_kernels.kron_product import mm_half, scaled, scaled_parts
from surgeon_kernels.low_rank import LowRankCorrection
from surgeon_kernels.masked_cg import MaskedCG, Terms, tf32

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
def preconditioned(r, row_scales, column_scales, rows, columns, row, c, inside, TERMS: tl.constexpr):
    """``S∘R`` at these entries; ``1 / S = Σ_i diag(L_i)_row diag(M_i)_c``, or 1 for the scaled operator of one term."""
    if TERMS > 1:
        s = tl.load(row_scales + row) * tl.load(column_scales + c, mask=inside, other=1.0)
        for i in tl.static_range(1, TERMS):
            s += tl.load(row_scales + i * rows + row) * tl.load(column_scales + i * columns + c, mask=inside, other=0.0)
        r = r / s
    return r


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
    bounds,
    new_energies,
    largest,
    k,
    rows,
    columns,
    blocks,
    units,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
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
    x,
    source,
    direction,
    free,
    row_scales,
    column_scales,
    curvatures,
    new_energies,
    largest,
    energies,
    bounds,
    decreases,
    k,
    rows,
    columns,
    blocks,
    units,
    TERMS: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
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


class FusedCG(MaskedCG):
    """:class:`~surgeon_kernels.masked_cg.MaskedCG` by these kernels; the same inputs give the same bits."""

    operands = torch.float16  # of the product, where it is one

    def __init__(
        self,
        terms: Terms,
        free: Tensor,
        residual: Tensor,
        correction: LowRankCorrection | None = None,
        *,
        resident: int = _RESIDENT,
        block: int = _BLOCK,
        warps: int = _WARPS,
    ) -> None:
        residual = residual.contiguous()
        self._terms, self._residual, self._x = terms, residual, torch.zeros_like(residual)
        self._free, self._warps, self._correction = free.contiguous().view(torch.uint8), warps, correction
        rows, columns = residual.shape
        self._block = min(block, triton.next_power_of_2(columns))
        blocks = triton.cdiv(columns, self._block)
        self._sizes = (rows, columns, blocks, rows * blocks)
        device = residual.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if residual.is_cuda else 2
        self._programs = min(rows * blocks, resident * processors)
        self._curvatures, self._new_energies = torch.empty(2, self._programs + 1, dtype=torch.float64, device=device)
        self._largest = torch.empty(self._programs + 1, device=device)
        self._row_scales = torch.stack([L.diagonal() for L, _ in terms])  # [terms, R]
        self._column_scales = torch.stack([M.diagonal() for _, M in terms])  # [terms, C]
        if len(terms) == 1:
            (L, M), g, a = terms[0], self._row_scales[0].rsqrt(), self._column_scales[0].rsqrt()
            self._scaled = scaled_parts(L, g, g, 1)[0], scaled_parts(M, a, a, 1)[0]
            self._row_scales, self._column_scales = g, a  # of X; R has their inverses'
            z = scaled(residual, g, a, out=residual)
            if correction is not None:
                left, right, _ = correction.factors(residual)
                z = torch.addmm(residual, left, right.T).masked_fill_(~free, 0.0)
        else:
            z = residual / (self._row_scales.T @ self._column_scales)
        dtype = self.operands if len(terms) == 1 else residual.dtype
        energy, bound = (residual * z).sum(dtype=torch.float64), torch.linalg.vector_norm(z, torch.inf)
        self._energies, self._bounds = energy[None], bound.double()[None]
        self._direction = torch.empty_like(z, dtype=dtype)
        torch.mul(z, 1 / bound.clamp_min(torch.finfo(z.dtype).tiny), out=self._direction)
        self._half = torch.empty_like(self._direction)
        self._image = torch.empty_like(residual) if correction is None else z  # which is needed no more

    @property
    def x(self) -> Tensor:
        return self._unscaled(self._x, self._row_scales, self._column_scales)

    @property
    def residual(self) -> Tensor:
        return self._unscaled(self._residual, 1 / self._row_scales, 1 / self._column_scales)

    def _unscaled(self, of: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return of if len(self._terms) > 1 else scaled(of, rows, columns)

    def run(self, iterations: int) -> list[float]:
        self._energies, self._bounds = (
            torch.cat([values[-1:], values.new_empty(iterations)]) for values in (self._energies, self._bounds)
        )
        decreases = self._energies.new_zeros(iterations)
        for k in range(iterations):
            with tf32():
                self._multiply()
            self._finish(k, decreases)
        return decreases.tolist()

    def _multiply(self) -> None:
        """The image of the direction."""
        if len(self._terms) == 1:
            L, M = self._scaled
            mm_half(L, self._direction, self._half)
            mm_half(self._half, M, self._image)
            return
        for i, (L, M) in enumerate(self._terms):
            torch.mm(L, self._direction, out=self._half)
            torch.addmm(self._image, self._half, M, beta=float(i > 0), out=self._image)

    def _finish(self, k: int, decreases: Tensor) -> None:
        """The rest of iteration ``k``, once the product is there."""
        rows, columns, blocks, units = self._sizes
        constants = {"BLOCK": self._block, "num_warps": self._warps}
        grid = (self._programs,)
        with torch.cuda.device_of(self._x):
            curvature_kernel[grid](self._direction, self._image, self._curvatures, columns, blocks, units, **constants)
            constants |= {"TERMS": len(self._terms), "PARTS": triton.next_power_of_2(self._programs + 1)}
            residual_kernel[grid](
                self._residual,
                self._image,
                self._free,
                self._row_scales,
                self._column_scales,
                self._curvatures,
                self._energies,
                self._bounds,
                self._new_energies,
                self._largest,
                k,
                rows,
                columns,
                blocks,
                units,
                **constants,
            )
            if self._correction is not None:
                self._correct(self._correction)
            direction_kernel[grid](
                self._x,
                self._residual if self._correction is None else self._image,
                self._direction,
                self._free,
                self._row_scales,
                self._column_scales,
                self._curvatures,
                self._new_energies,
                self._largest,
                self._energies,
                self._bounds,
                decreases,
                k,
                rows,
                columns,
                blocks,
                units,
                CORRECTED=self._correction is not None,
                **constants,
            )

    def _correct(self, correction: LowRankCorrection) -> None:
        """Put ``Z`` in the image's place, and what it adds to the energy and its largest entry to the parts."""
        left, right, self._new_energies[-1] = correction.factors(self._residual)
        torch.addmm(self._residual, left, right.T, out=self._image)
        torch.linalg.vector_norm(self._image, torch.inf, out=self._largest[-1])
