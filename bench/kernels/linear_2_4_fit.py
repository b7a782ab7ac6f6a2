"""Times by which csrc/sparse24/linear_2_4.cpp chooses a kernel, fitted to measured ones; without a GPU.

    python -m bench.kernels.linear_2_4_fit FILE          # the constants, and by how much they miss the fastest kernel
    python -m bench.kernels.linear_2_4_fit FILE --write  # also writes them to csrc/sparse24/linear_2_4_times.h

FILE (default: bench/results/linear_2_4_kernels.csv) has the rows of `python -m bench.kernels.linear_2_4_sample --sample
fit --kernels`; rows of its sample `check`, if there are any, only judge.

A kernel ``k`` computes ``tiles`` tiles of ``units`` units of 128 columns: ``waves`` whole waves of blocks, then, with
``split`` blocks to a tile (split-K), the ``rest`` of the tiles in ``shared`` waves of clusters; on ``mma.sp`` all tiles
are of the latter kind. Estimated, in microseconds::

    a = waves (units u_k + t_k) + shared (⌈units / split⌉ u_k + t_k + c_k) + [waves > 0 and shared > 0] l

    split = 1:        waves = ⌈tiles / blocks⌉,  shared = 0
    split > 1:        waves = ⌊tiles / blocks⌋,  shared = ⌈(tiles mod blocks) / clusters⌉
    the same, mma.sp: waves = 0,                 shared = ⌈tiles / clusters⌉

``u_k`` is a unit of a tile, ``t_k`` a tile's prologue and epilogue, ``c_k`` adding up a cluster's sums, ``l`` a second
launch. The kernel of the least ``a`` is chosen. Measured is more, which is the same for all kernels of a size::

    us = o + n tokens columns + (a⁴ + (m bytes)⁴)^¼

a launch, the norm before the product, and the time to read W's ``bytes``, no less than which it takes. The fit
minimises, over the logarithms of all constants, the sum of squared errors of ``log us`` and, ten times, of what a soft
choice loses against the fastest kernel of each size (chances ``∝ a^-20``). A rough guess draws a little: what no time
says stays there. Then kernels are left out as long as the choice among the rest loses no more time.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.kernels.linear_2_4_sample import Point, summary
from surgeon_kernels.runtime import toolchain

MMA = 4  # kernels on mma.sp, numbered from -4 to -1
KERNELS = 26  # on wgmma.sp
FEW = 16  # up to so many tokens a rule chooses, where none were timed
RELEVANT = 2.0  # times the fastest: no choice depends on slower ones
_DRAWN = 1e-3  # weight of the rough guess, against a squared relative error of 1
# Of the older rows on record, tried with 0.02 to 0.1 and 3 to 100: these lose least on shapes left out of the fit.
_SOFT, _CHOICE = 0.05, 10.0
_LITTLE = 1e-4  # of time: a kernel that saves less is left out
_PARTS = 5  # of the shapes, each judged by the constants of the others
RECORD = Path(__file__).parents[1] / "results" / "linear_2_4_kernels.csv"
HEADER = toolchain.csrc() / "sparse24" / "linear_2_4_times.h"


class Timing(NamedTuple):
    """One kernel, one split, one size."""

    rows: int
    columns: int
    tokens: int
    kernel: int  # on wgmma.sp; negative on mma.sp
    tile_rows: int
    tile_tokens: int
    split: int
    blocks: int  # resident at a time
    clusters: int  # of `split` blocks, resident at a time
    us: float
    dense_us: float = np.nan  # of `F.linear`, of that size
    default_us: float = np.nan  # of the kernel that was chosen by default, of that size
    sample: str = "fit"

    @property
    def size(self) -> Point:
        return Point(self.rows, self.columns, self.tokens)


class Times(NamedTuple):
    """Microseconds of a kernel: ``u_k``, ``t_k`` and ``c_k``."""

    unit: float
    tile: float
    cluster: float


class Constants(NamedTuple):
    """Times of the kernels that may be chosen, and ``l``."""

    kernels: dict[int, Times]
    launch: float


def read_timings(path: Path) -> list[Timing]:
    """Rows of a CSV file; columns that are no field of `Timing` are passed over."""
    kinds = {"us": float, "dense_us": float, "default_us": float, "sample": str}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        names = [name for name in Timing._fields if name in (rows.fieldnames or ())]
        return [Timing(**{name: kinds.get(name, int)(row[name]) for name in names}) for row in rows]


def terms(timing: Timing) -> tuple[int, int, int, bool]:
    """How many ``u_k``, ``t_k``, ``c_k`` and ``l`` the estimate has."""
    units = -(-timing.columns // 128)
    tiles = -(-timing.rows // timing.tile_rows) * -(-timing.tokens // timing.tile_tokens)
    if timing.split == 1:
        waves, shared = -(-tiles // timing.blocks), 0
    elif timing.kernel < 0:
        waves, shared = 0, -(-tiles // timing.clusters)
    else:
        waves, shared = tiles // timing.blocks, -(-(tiles % timing.blocks) // timing.clusters)
    return waves * units + shared * -(-units // timing.split), waves + shared, shared, waves > 0 and shared > 0


def estimate(constants: Constants, timings: Sequence[Timing]) -> np.ndarray:
    """``a`` of each, by which a kernel is chosen; infinite where it may not be."""
    never = Times(np.inf, np.inf, np.inf)
    found = []
    for timing in timings:
        unit, tile, cluster = constants.kernels.get(timing.kernel, never)
        units, tiles, shared, second = terms(timing)
        found.append(units * unit + tiles * tile + (shared and shared * cluster) + second * constants.launch)
    return np.array(found)


def fit(timings: Iterable[Timing]) -> Constants:
    """Constants of all kernels, by the times that are within `RELEVANT` times the fastest of their size."""
    kept = [timing for group in _by_size(timings) for timing in group if timing.us <= RELEVANT * min(_us(group))]
    kernels = sorted({timing.kernel for timing in kept})
    of = torch.tensor([kernels.index(timing.kernel) for timing in kept])
    units, tiles, shared, second = torch.tensor([terms(timing) for timing in kept]).double().T
    size = torch.tensor([(t.tokens * t.columns, t.rows * t.columns * 1.125) for t in kept]).double()
    us = torch.from_numpy(_us(kept)).log()
    numbers = {size: number for number, size in enumerate(dict.fromkeys(timing.size for timing in kept))}
    group = torch.tensor([numbers[timing.size] for timing in kept])
    per_size = torch.zeros(len(numbers)).double()
    lost = (us - per_size.scatter_reduce(0, group, us, "amin", include_self=False)[group]).expm1()
    rough = [_rough(next(timing for timing in kept if timing.kernel == kernel)) for kernel in kernels]
    # l, o, n and m: 2.7 and 1 us, an element of the norm read and written, and a byte, at 4.3 TB/s
    guess = torch.tensor([*sum(rough, ()), 2.7, 1.0, 4 / 4.3e6, 1 / 4.3e6], dtype=torch.float64).log()
    logs = guess.clone().requires_grad_()

    def loss() -> Tensor:
        constants = logs.exp()
        unit, tile, cluster = constants[:-4].view(-1, 3)[of].T
        launch, added, element, byte = constants[-4:]
        a = units * unit + tiles * tile + shared * cluster + second * launch
        all_of = added + element * size[:, 0] + (a**4 + (byte * size[:, 1]) ** 4) ** 0.25
        errors = (all_of.log() - us).square().sum() + _DRAWN * (logs - guess).square().sum()
        score = -a.log() / _SOFT
        most = per_size.scatter_reduce(0, group, score.detach(), "amax", include_self=False)
        chance = (score - most[group]).exp()
        return errors + _CHOICE * (lost * chance / per_size.scatter_add(0, group, chance)[group]).sum()

    optimizer = torch.optim.LBFGS(
        [logs],
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    optimizer.step(step)
    found = logs.detach().exp().tolist()
    times = {kernel: Times(*found[3 * i : 3 * i + 3]) for i, kernel in enumerate(kernels)}
    return Constants(times, found[-4])


def losses(constants: Constants, timings: Iterable[Timing]) -> dict[Point, float]:
    """By how much the kernel chosen by ``constants`` is slower than the fastest, relative, for every size."""
    groups = {group[0].size: (_us(group), estimate(constants, group)) for group in _by_size(timings)}
    return {
        size: us[estimated.argmin()] / us.min() - 1 if np.isfinite(estimated.min()) else np.inf
        for size, (us, estimated) in groups.items()
    }


def lean(constants: Constants, timings: Sequence[Timing]) -> Constants:
    """The constants without kernels that save no time, in the mean over all sizes; one after the other."""
    groups = _by_size(timings)
    us, estimated, kernels = (np.full((len(groups), max(map(len, groups))), np.inf) for _ in range(3))
    for row, group in enumerate(groups):
        us[row, : len(group)] = _us(group) / min(_us(group))
        estimated[row, : len(group)] = estimate(constants, group)
        kernels[row, : len(group)] = [timing.kernel for timing in group]

    def mean(kept: Collection[int]) -> float:
        allowed = np.where(np.isin(kernels, list(kept)), estimated, np.inf)
        chosen = np.take_along_axis(us, allowed.argmin(axis=1, keepdims=True), axis=1)
        return float(np.where(np.isfinite(allowed.min(axis=1)), chosen[:, 0], np.inf).mean()) - 1

    kept, present = set(constants.kernels), mean(constants.kernels)
    while len(kept) > 1:
        least, kernel = min((mean(kept - {kernel}), kernel) for kernel in kept)
        if least > present + _LITTLE:
            break
        kept.remove(kernel)
        present = min(present, least)
    return Constants({kernel: constants.kernels[kernel] for kernel in sorted(kept)}, constants.launch)


def losses_left_out(timings: Sequence[Timing]) -> dict[Point, float]:
    """`losses` on each part of the shapes by the constants fitted to the other parts."""
    shapes = sorted({timing.size[:2] for timing in timings})
    if len(shapes) < 2:
        raise ValueError("losses on shapes left out of the fit need timings of two shapes")
    found: dict[Point, float] = {}
    for first in range(min(_PARTS, len(shapes))):
        left_out = shapes[first::_PARTS]
        others = [timing for timing in timings if timing.size[:2] not in left_out]
        found |= losses(lean(fit(others), others), [timing for timing in timings if timing.size[:2] in left_out])
    return found


def in_force(source: str) -> Constants:
    """The constants of csrc/sparse24/linear_2_4_times.h, of this text."""
    (table,) = re.findall(r"kTimes\[kKernelCount\] = {(.*?)};", source, re.DOTALL)
    rows = [[float(value) / 1000 for value in row.split(",")] for row in re.findall(r"{(.*?)}", table)]
    if len(rows) != MMA + KERNELS:
        raise ValueError(f"kTimes has {len(rows)} rows for {MMA + KERNELS} kernels")
    launch = float(re.findall(r"kLaunchTime = (\d+);", source)[0]) / 1000
    return Constants({index - MMA: Times(*row) for index, row in enumerate(rows) if row[0]}, launch)


def source(constants: Constants, timings: Sequence[Timing]) -> str:
    """What csrc/sparse24/linear_2_4_times.h has between its marks, in nanoseconds; ``timings`` are the fitted ones."""
    lost = losses(constants, timings).values()
    rows = [constants.kernels.get(kernel, Times(0, 0, 0)) for kernel in range(-MMA, KERNELS)]
    return "\n".join(
        [
            "// Fitted by it. Of the times in bench/results/linear_2_4_kernels.csv they choose kernels",
            f"// {_mean(lost):.1%} slower than the fastest (mean; {max(lost):.0%} worst).",
            "constexpr Times24 kTimes[kKernelCount] = {",
            *("    {" + ", ".join(f"{1000 * time:.0f}" for time in row) + "}," for row in rows),
            "};",
            f"constexpr float kLaunchTime = {1000 * constants.launch:.0f};  // of a second launch",
            f"constexpr int kFewTokens = {0 if min(timing.tokens for timing in timings) <= FEW else FEW};"
            "  // up to so many choose by a rule, not by time",
        ]
    )


def written(header: str, constants: Constants, timings: Sequence[Timing]) -> str:
    """The header's text with other constants."""
    before, rest = header.split("// clang-format off\n")
    after = rest.split("// clang-format on\n")[1]
    return f"{before}// clang-format off\n{source(constants, timings)}\n// clang-format on\n{after}"


def report(constants: Constants, timings: Sequence[Timing]) -> str:
    """The constants, and what the choice by them loses and gains: on sizes of the fit, left out of it, and to check."""
    fitted = [timing for timing in timings if timing.sample == "fit"]
    check = [timing for timing in timings if timing.sample == "check"]
    judged = [("of the fit", fitted, losses(constants, fitted)), ("left out of it", fitted, losses_left_out(fitted))]
    if check:
        judged += [("to check", check, losses(constants, check))]
    lines = [source(constants, fitted), f"{len(constants.kernels)} kernels, {len(fitted)} times"]
    for name, of, lost in judged:
        chosen = {size: loss for size, loss in lost.items() if np.isfinite(loss)}
        lines.append(
            f"sizes {name}: {_mean(chosen.values()):.1%} slower than the fastest (mean; {max(chosen.values()):.0%} "
            f"worst), {len(lost) - len(chosen)} of {len(lost)} without a kernel that was timed"
        )
        fastest = {group[0].size: (min(_us(group)), group[0]) for group in _by_size(of)}
        dense = {size: one.dense_us / us for size, (us, one) in fastest.items() if np.isfinite(one.dense_us)}
        if dense:
            lines.append("speedups over dense\n" + summary({size: dense[size] / (1 + chosen[size]) for size in chosen}))
    if all(np.isnan(timing.default_us) for timing in fitted):
        lost = losses(in_force(HEADER.read_text()), fitted).values()
        lines.append(f"by the constants in force: {_mean(lost):.1%} (mean), {max(lost):.0%} (worst)")
    else:
        defaults = {timing.size: timing.dense_us / timing.default_us for timing in fitted}
        lines.append("speedups of the default choice when these were timed\n" + summary(defaults))
    return "\n".join(lines)


def _rough(timing: Timing) -> Times:
    """Shared memory's traffic at 128 bytes a cycle of 1.8 GHz, as in `linear_2_4_sample.rough_us`."""
    rows, tokens = timing.tile_rows, timing.tile_tokens
    unit = (rows / 64 * tokens * 2 + tokens * 2 + 2.25 * rows) / 1800
    return Times(unit * max(1, timing.blocks / 132), 1.7, 2 + rows * tokens * 8e-5)


def _mean(lost: Iterable[float]) -> float:
    return float(np.mean([*lost]))


def _us(timings: Iterable[Timing]) -> np.ndarray:
    return np.array([timing.us for timing in timings])


def _by_size(timings: Iterable[Timing]) -> list[list[Timing]]:
    """Timings of the same rows, columns and tokens together: a kernel is chosen among these."""
    groups: dict[Point, list[Timing]] = {}
    for timing in timings:
        groups.setdefault(timing.size, []).append(timing)
    return list(groups.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=RECORD)
    parser.add_argument("--write", action="store_true", help="to csrc/sparse24/linear_2_4_times.h")
    options = parser.parse_args()
    timings = read_timings(options.file)
    fitted = [timing for timing in timings if timing.sample == "fit"]
    constants = lean(fit(fitted), fitted)
    print(report(constants, timings))
    if options.write:
        HEADER.write_text(written(HEADER.read_text(), constants, fitted))


if __name__ == "__main__":
    main()
