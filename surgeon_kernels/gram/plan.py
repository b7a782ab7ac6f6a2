"""The plan of a Gram product: its launch configuration, and the schedule of its tiles over persistent programs.

Tiles of the lower triangle are computed whole in as many waves of programs as pays; the tiles of the last, partial wave
are split along the tokens (split-K), and a second kernel adds their partial sums up.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch

# These three and `step` below: chosen by hand so that estimates come close to what `python -m bench.kernels.gram
# --tune` prints beside them, measured on an H200; `--fit` fits them anew and judges both. By the times in
# bench/results/gram_kernels.csv these choose configurations 1.4 % slower than the fastest (mean of the sizes with a
# choice; 27 % worst), the fit to them 0.0 % (0.7 %). But that leaves out the host's share, and knows only the splits
# that these choose.
# Prologue and epilogue of a unit of work (the tile's read and write among them), in steps of block_k tokens.
_UNIT_COST = 10
# Microseconds of the second launch that adds up partial sums, the host's share included, and the bytes it reads in one.
_REDUCTION_COST = 15.0
_REDUCTION_BYTES = 4e6
# The most partial sums of one tile (an estimate): bounds the workspace and the time of adding them up.
MAX_SPLITS = 16
# The sums of tf32x3 are rounded after every step.
_UNLIMITED = 1 << 30


class GramConfig(NamedTuple):
    """Launch configuration: a program multiplies ``[block_m, block_k] x [block_k, block_n]`` at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs_per_sm: int
    descriptors: bool  # loads through TMA tensor descriptors (from sm_90 on), else through pointers
    precision: str = "tf32"  # of float32 operands; 16-bit ones are exact
    # Steps that the tensor cores sum by themselves (the promotion interval). They truncate, so that the error grows
    # with the number of steps; additions of runs are rounded.
    run: int = 128
    in_registers: bool = False  # where runs are added up, if there is room for a second block; else in the output
    step: float = 0.5  # microseconds of one such product, with every program at work

    @property
    def longest(self) -> int:
        """The most steps of a unit of work."""
        return _UNLIMITED if self.in_registers else self.run


_WIDE = GramConfig(128, 256, 64, 8, 3, 1, True, step=0.63)
_SQUARE = GramConfig(128, 128, 64, 8, 4, 1, True, run=16, in_registers=True, step=0.36)
_AMPERE = GramConfig(128, 128, 32, 8, 3, 1, False, run=32, in_registers=True, step=0.5)
_AMPERE_TF32 = GramConfig(128, 64, 32, 8, 2, 1, False, "tf32x3", _UNLIMITED, step=2.0)
# By major compute capability and type of x; where there are several, the one whose schedule takes the least time by the
# figures above. Those of sm_90 are the fastest of `python -m bench.kernels.gram --tune` on an H200, the others
# estimates. 128x256 blocks feed wgmma at the least shared-memory and L2 traffic per product, but a small matrix has too
# few of them. tf32x3 splits its operands in registers, which leaves room for less. Major 12 has Ampere's instructions
# and a block of at most 99 KiB.
CONFIGS: dict[tuple[int, torch.dtype], list[GramConfig]] = {
    (9, torch.bfloat16): [_WIDE, _SQUARE],
    (9, torch.float16): [_WIDE, _SQUARE],
    (9, torch.float32): [GramConfig(128, 64, 32, 4, 3, 2, True, "tf32x3", _UNLIMITED, step=2.4)],
    (8, torch.bfloat16): [_AMPERE],
    (8, torch.float16): [_AMPERE],
    (8, torch.float32): [_AMPERE_TF32],
    (10, torch.bfloat16): [_WIDE, _SQUARE],
    (10, torch.float16): [_WIDE, _SQUARE],
    (10, torch.float32): [_AMPERE_TF32],
    (12, torch.bfloat16): [_AMPERE],
    (12, torch.float16): [_AMPERE],
    (12, torch.float32): [_AMPERE_TF32],
}
# Fewer rows are not worth a kernel (an estimate), and the last digit of tf32x3 would show.
LEAST_TOKENS = 64
# Multiplications, tokens x columns², that are worth the launches for a dense matrix (an estimate). Of 16-bit operands
# they are more: cuBLAS, too, adds such a product to the output in one call.
_LEAST_WORK = 1 << 32
LEAST_HALF_WORK = 1 << 34
# Widths that are no multiple of 8 excepted: cuBLAS has no fast product for them, but the one it has sums in short
# runs, as only the configurations that add runs up in registers do.


@functools.lru_cache(maxsize=1024)
def choose(
    columns: int,
    tokens: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    major: int,
    packed: bool,
    ones_column: bool = False,
    processors: int = 132,
) -> GramConfig | None:
    """The kernel's configuration for the Gram matrix of ``tokens`` rows on multiprocessors of capability ``major``.

    None stands for the PyTorch path: float64 on either side, architectures without a tuned configuration, and small
    products.
    """
    if out_dtype != torch.float32 or tokens < LEAST_TOKENS:
        return None
    n = columns + ones_column
    half = dtype != torch.float32
    unaligned = half and n % 8 > 0
    if not packed and tokens * n * n < (LEAST_HALF_WORK if half and not unaligned else _LEAST_WORK):
        return None
    best, least = None, math.inf
    for config in CONFIGS.get((major, dtype), []):
        if config.block_n > 128 and (unaligned or not packed):
            continue  # with the addresses of a dense output, or a second block, wide blocks run out of registers
        blocks = _number_of_blocks(columns, config.block_m, config.block_n)
        time = _split(blocks, -(-tokens // config.block_k), config, processors * config.programs_per_sm).time
        if time < least:
            best, least = config, time
    return best


class Unit(NamedTuple):
    """Steps ``first..last`` of one block; ``slot`` is its partial sum's in the workspace, or one of the two below."""

    row: int
    column: int
    first: int
    last: int
    slot: int


ADD = -1  # to the output
IDLE = -2  # nothing to do


class Schedule(NamedTuple):
    """Work of persistent programs on one Gram matrix, made by :func:`schedule`."""

    units: list[Unit]  # in the order in which programs take them
    reductions: list[tuple[int, int, int]]  # row, column and first slot of every block computed in parts
    splits: int  # parts of each of those
    time: float  # microseconds, estimated


def blocks_in_order(n: int, config: GramConfig) -> list[tuple[int, int]]:
    """Blocks ``(row, column)`` that touch the lower triangle.

    Bands of 2048 rows are walked column by column: the blocks in flight at one time then form roughly a square, which
    reads the fewest different columns of x, and so mostly hits L2.
    """
    rows = -(-n // config.block_m)
    band = max(1, 2048 // config.block_m)
    order = []
    for start in range(0, rows, band):
        end = min(start + band, rows)
        for column in range(-(-min(end * config.block_m, n) // config.block_n)):
            order += [
                (row, column) for row in range(start, end) if column * config.block_n < (row + 1) * config.block_m
            ]
    return order


@functools.lru_cache(maxsize=1024)
def _number_of_blocks(n: int, block_m: int, block_n: int) -> int:
    return sum(-(-min((row + 1) * block_m, -(-n // block_n) * block_n) // block_n) for row in range(-(-n // block_m)))


def schedule(n: int, steps: int, config: GramConfig, programs: int) -> Schedule:
    """Work of ``programs`` persistent programs on an ``n x n`` Gram matrix of ``steps`` steps of tokens.

    Program ``p`` takes units ``p``, ``p + programs`` and so on. Blocks are computed whole in as many rounds of
    ``programs`` as pays, in runs of at most ``config.longest`` steps that one program adds to the output one after the
    other. The remaining blocks, which would leave programs idle, are split along the tokens into parts whose sums are
    added up afterwards, always in the same order.
    """
    order = blocks_in_order(n, config)
    whole, splits, time = _split(len(order), steps, config, programs)
    runs = _ranges(steps, -(-steps // config.longest))
    units = []
    for start in range(0, whole, programs):
        blocks = order[start : min(start + programs, whole)]
        idle = programs - len(blocks) if len(runs) > 1 else 0  # the next run of a block is for the same program
        for first, last in runs:
            units += [Unit(row, column, first, last, ADD) for row, column in blocks]
            units += [Unit(0, 0, 0, 0, IDLE)] * idle
    reductions = []
    for index, (row, column) in enumerate(order[whole:]):
        reductions.append((row, column, index * splits))
        parts = _ranges(steps, splits)
        units += [Unit(row, column, first, last, index * splits + p) for p, (first, last) in enumerate(parts)]
    return Schedule(units, reductions, splits, time)


def _ranges(steps: int, parts: int) -> list[tuple[int, int]]:
    bounds = [steps * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))


class _Split(NamedTuple):
    whole: int  # blocks to compute whole
    splits: int  # parts of each of the others
    time: float  # microseconds


def _split(blocks: int, steps: int, config: GramConfig, programs: int) -> _Split:
    """The fastest split of ``blocks`` among programs, by the estimated time."""
    rounds = -(-blocks // programs)
    whole_time = (steps + -(-steps // config.longest) * _UNIT_COST) * config.step
    best = _Split(blocks, 1, rounds * whole_time)
    for whole_rounds in range(max(0, rounds - 3), rounds):
        rest = blocks - whole_rounds * programs
        for splits in range(max(2, -(-steps // config.longest)), min(MAX_SPLITS, steps) + 1):
            part_rounds = -(-rest * splits // programs)
            part_time = (-(-steps // splits) + _UNIT_COST) * config.step
            # The parts' sums are written, read and added.
            read_bytes = 4 * rest * splits * config.block_m * config.block_n
            reduction_time = _REDUCTION_COST + read_bytes / _REDUCTION_BYTES
            time = whole_rounds * whole_time + part_rounds * part_time + reduction_time
            if time < best.time:
                best = _Split(whole_rounds * programs, splits, time)
    return best
