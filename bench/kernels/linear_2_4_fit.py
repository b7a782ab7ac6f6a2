"""Times by which csrc/sparse24/linear_2_4.cpp chooses a kernel for many tokens, fitted to measured ones.

A kernel ``k`` computes ``tiles`` tiles of ``units`` units of 128 columns: ``waves`` whole waves of blocks, then, with
``split`` blocks to a tile (split-K), the ``rest`` of the tiles in waves of clusters. Estimated, in microseconds::

    split = 1:  ⌈tiles / blocks⌉ (units u_k + t)
    split > 1:  waves (units u_k + t) + [waves > 0] l + ⌈rest / clusters⌉ (⌈units / split⌉ u_k + t + c_k)

which is linear in ``u_k`` (a unit of a tile), ``c_k`` (adding up a cluster's sums), ``t`` (prologue and epilogue of a
tile) and ``l`` (a second launch). The fit minimises the sum of squared relative errors.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from surgeon_kernels.runtime import toolchain

KERNELS = 6  # of Wgmma24 in csrc/sparse24/linear_2_4.h
RELEVANT = 2.0  # times the fastest: no choice depends on slower ones


class Timing(NamedTuple):
    """A row of bench/results/linear_2_4_kernels.csv: one kernel, one split, one size."""

    rows: int
    columns: int
    tokens: int
    kernel: int  # of Wgmma24
    tile_rows: int
    tile_tokens: int
    split: int
    blocks: int  # resident at a time
    clusters: int  # of `split` blocks, resident at a time
    us: float


class Constants(NamedTuple):
    """Microseconds: ``u_k``, ``c_k``, ``t`` and ``l``."""

    unit: np.ndarray
    cluster: np.ndarray
    tile: float
    launch: float


class Errors(NamedTuple):
    """Errors on shapes left out of the fit: of the times, and of the choice by them, relative to the fastest kernel."""

    median: float
    percentile_95: float
    mean_loss: float
    worst_loss: float


def read_timings(path: Path) -> list[Timing]:
    """Rows of a CSV file; columns that are no field of `Timing` are passed over."""
    with path.open(newline="") as file:
        kinds = Timing.__annotations__
        return [
            Timing(**{name: float(row[name]) if name == "us" else int(row[name]) for name in kinds})
            for row in csv.DictReader(file)
        ]


def terms(timing: Timing) -> np.ndarray:
    """Factors ``[2 KERNELS + 2]`` of ``u``, ``c``, ``t`` and ``l`` in the estimated time."""
    units = -(-timing.columns // 128)
    tiles = -(-timing.rows // timing.tile_rows) * -(-timing.tokens // timing.tile_tokens)
    found = np.zeros(2 * KERNELS + 2)
    if timing.split == 1:
        waves = -(-tiles // timing.blocks)
        found[timing.kernel], found[-2] = waves * units, waves
        return found
    waves, rest = divmod(tiles, timing.blocks)
    shared = -(-rest // timing.clusters)
    found[timing.kernel] = waves * units + shared * -(-units // timing.split)
    found[KERNELS + timing.kernel] = shared
    found[-2:] = waves + shared, waves > 0
    return found


def estimate(constants: Constants, timings: Sequence[Timing]) -> np.ndarray:
    """Microseconds of each."""
    solution = np.concatenate([constants.unit, constants.cluster, [constants.tile, constants.launch]])
    return np.array([terms(timing) for timing in timings]) @ solution


def fit(timings: Iterable[Timing]) -> Constants:
    """Constants of the least squared relative errors, of the times that are within `RELEVANT` times the fastest."""
    kept = [timing for group in _by_size(timings) for timing in group if timing.us <= RELEVANT * min(_us(group))]
    us = _us(kept)
    solution = np.linalg.lstsq(np.array([terms(each) for each in kept]) / us[:, None], np.ones(len(us)), rcond=None)[0]
    return Constants(solution[:KERNELS], solution[KERNELS:-2], float(solution[-2]), float(solution[-1]))


def in_force(source: str) -> Constants:
    """The constants that csrc/sparse24/linear_2_4.cpp, of this text, chooses by."""
    found = {name: _numbers(source, rf"{name}\[kWgmmaCount\] = {{(.*?)}}") for name in ("kUnitTime", "kClusterTime")}
    tile, launch = (_numbers(source, rf"{name} = (\d+)[,;]")[0] for name in ("kTileTime", "kLaunchTime"))
    return Constants(found["kUnitTime"], found["kClusterTime"], tile, launch)


def losses(constants: Constants, timings: Sequence[Timing]) -> list[float]:
    """By how much the kernel chosen by ``constants`` is slower than the fastest, relative, for every size."""
    groups = [(_us(group), estimate(constants, group)) for group in _by_size(timings)]
    return [us[estimated.argmin()] / us.min() - 1 for us, estimated in groups]


def errors(timings: Sequence[Timing]) -> Errors:
    """Errors on each shape ``[rows, columns]`` by the constants fitted to the other ones."""
    shapes = sorted({timing[:2] for timing in timings})
    if len(shapes) < 2:
        raise ValueError("errors on a shape left out of the fit need timings of two shapes")
    relative, lost = [], []
    for shape in shapes:
        constants = fit(timing for timing in timings if timing[:2] != shape)
        own = [timing for timing in timings if timing[:2] == shape]
        lost.extend(losses(constants, own))
        for group in _by_size(own):
            us, estimated = _us(group), estimate(constants, group)
            relevant = us <= RELEVANT * us.min()
            relative.extend(np.abs(estimated / us - 1)[relevant])
    return Errors(
        float(np.median(relative)), float(np.percentile(relative, 95)), float(np.mean(lost)), float(np.max(lost))
    )


def report(timings: Sequence[Timing]) -> str:
    """The constants as csrc/sparse24/linear_2_4.cpp has them, in nanoseconds, and their errors."""
    constants, found = fit(timings), errors(timings)
    lost = losses(in_force((toolchain.csrc() / "sparse24" / "linear_2_4.cpp").read_text()), timings)
    unit = ", ".join(f"{1000 * time:.0f}" for time in constants.unit)
    cluster = ", ".join(f"{1000 * time:.0f}" for time in constants.cluster)
    return (
        f"constexpr float kUnitTime[kWgmmaCount] = {{{unit}}};\n"
        f"constexpr float kClusterTime[kWgmmaCount] = {{{cluster}}};\n"
        f"constexpr float kTileTime = {1000 * constants.tile:.0f}, kLaunchTime = {1000 * constants.launch:.0f};\n"
        f"{len(timings)} times; on shapes left out of the fit: relative error {found.median:.1%} (median), "
        f"{found.percentile_95:.1%} (95th percentile); the kernel chosen is slower than the fastest by "
        f"{found.mean_loss:.1%} (mean), {found.worst_loss:.1%} (worst); by the constants in force "
        f"{np.mean(lost):.1%} (mean), {max(lost):.1%} (worst)"
    )


def _numbers(source: str, pattern: str) -> np.ndarray:
    """Nanoseconds in the text that ``pattern`` finds, as microseconds."""
    (text,) = re.findall(pattern, source)
    return np.array([float(number) / 1000 for number in text.split(",")])


def _us(timings: Iterable[Timing]) -> np.ndarray:
    return np.array([timing.us for timing in timings])


def _by_size(timings: Iterable[Timing]) -> list[list[Timing]]:
    """Timings of the same rows, columns and tokens together: a kernel is chosen among these."""
    groups: dict[tuple[int, ...], list[Timing]] = {}
    for timing in timings:
        groups.setdefault(timing[:3], []).append(timing)
    return list(groups.values())
