"""Which Gram kernel runs, with which blocks, and in which order its programs take the lower triangle's tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Cost of one more unit of work (prologue, read and write of the block), in steps of block_k tokens.
_UNIT_COST = 4
# The most partial sums of one tile: bounds the workspace and the time of adding them up.
_MAX_SPLITS = 16


class GramConfig(NamedTuple):
    """Launch configuration: a program multiplies ``[block_m, block_k] x [block_k, block_n]`` at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs_per_sm: int
    descriptors: bool  # loads through TMA tensor descriptors (sm_90), else through pointers
    precision: str = "tf32"  # of float32 operands; 16-bit ones are exact


_WIDE = GramConfig(128, 256, 64, 8, 3, 1, True)
_SQUARE = GramConfig(128, 128, 64, 8, 4, 1, True)
_AMPERE = GramConfig(128, 128, 32, 8, 3, 1, False)
# By major compute capability and type of x: configurations for matrices of at least so many columns, largest first.
# Chosen by `bench/gram.py --tune`. 128x256 blocks feed wgmma at the least shared-memory and L2 traffic per product,
# but a small matrix has too few of them. tf32x3 splits its operands in registers, which leaves room for less.
CONFIGS: dict[tuple[int, torch.dtype], list[tuple[int, GramConfig]]] = {
    (9, torch.bfloat16): [(3072, _WIDE), (2048, _SQUARE)],
    (9, torch.float16): [(3072, _WIDE), (2048, _SQUARE)],
    (9, torch.float32): [(2048, GramConfig(128, 64, 32, 4, 3, 2, True, "tf32x3"))],
    (8, torch.bfloat16): [(2048, _AMPERE)],
    (8, torch.float16): [(2048, _AMPERE)],
    (8, torch.float32): [(2048, GramConfig(128, 64, 32, 8, 2, 1, False, "tf32x3"))],
}
# Fewer rows are not worth a kernel, and the last digit of tf32x3 would show.
_LEAST_TOKENS = 64


def choose(
    n: int, tokens: int, dtype: torch.dtype, out_dtype: torch.dtype, major: int, *, packed: bool
) -> GramConfig | None:
    """The kernel's configuration for the ``n x n`` Gram matrix of ``tokens`` rows on compute capability ``major``.

    None stands for the PyTorch path: float64 on either side, architectures without a tuned configuration, and small
    products, whose time is that of their launches.
    """
    if out_dtype != torch.float32 or tokens < _LEAST_TOKENS:
        return None
    fitting = [config for least, config in CONFIGS.get((major, dtype), []) if n >= least]
    if not fitting:
        return None
    # With the addresses of a dense output, wide blocks run out of registers.
    return fitting[0] if packed else fitting[-1]


class Unit(NamedTuple):
    """Steps ``first..last`` of one block; ``slot`` is a place in the workspace, or -1 to add to the output."""

    row: int
    column: int
    first: int
    last: int
    slot: int


class Schedule(NamedTuple):
    units: list[Unit]  # in the order in which programs take them
    reductions: list[tuple[int, int, int]]  # row, column and first slot of every block computed in parts
    splits: int  # parts of each of those


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


def schedule(n: int, steps: int, config: GramConfig, programs: int) -> Schedule:
    """Work of ``programs`` persistent programs on an ``n x n`` Gram matrix of ``steps`` steps of tokens.

    Blocks are computed whole in as many rounds of ``programs`` as pays; the rest, which would leave programs idle, is
    split along the tokens into parts whose sums are added up afterwards, always in the same order.
    """
    order = blocks_in_order(n, config)
    whole, splits = _split(len(order), steps, programs)
    units = [Unit(row, column, 0, steps, -1) for row, column in order[:whole]]
    reductions = []
    bounds = [steps * part // splits for part in range(splits + 1)]
    for index, (row, column) in enumerate(order[whole:]):
        reductions.append((row, column, index * splits))
        units += [Unit(row, column, bounds[p], bounds[p + 1], index * splits + p) for p in range(splits)]
    return Schedule(units, reductions, splits)


def _split(blocks: int, steps: int, programs: int) -> tuple[int, int]:
    """How many blocks to compute whole, and into how many parts to split each of the others: the cheapest way."""
    rounds = -(-blocks // programs)
    best, choice = float(rounds * (steps + _UNIT_COST)), (blocks, 1)
    for whole_rounds in range(max(0, rounds - 3), rounds):
        rest = blocks - whole_rounds * programs
        for splits in range(2, min(_MAX_SPLITS, steps) + 1):
            part_rounds = -(-rest * splits // programs)
            # The parts' sums are written, read and added by a second launch.
            cost = (
                whole_rounds * (steps + _UNIT_COST)
                + part_rounds * (-(-steps // splits) + _UNIT_COST)
                + _UNIT_COST
                + 0.5 * rest * splits / programs
            )
            if cost < best:
                best, choice = cost, (whole_rounds * programs, splits)
    return choice
