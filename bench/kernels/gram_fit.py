"""Times by which surgeon_kernels/gram/plan.py chooses a configuration and splits work, fitted to measured ones.

A program multiplies ``steps`` blocks one after the other, in ``units`` units of work with a prologue and an epilogue
each; a second launch adds up partial sums of so many ``bytes``, where there are any. Estimated, in microseconds::

    (steps + units U) s_c + [bytes > 0] r + bytes / B

``s_c`` is a step of configuration c, ``U`` a unit's prologue and epilogue in steps, ``r`` the second launch, ``B`` the
bytes that it reads in a microsecond. For a given ``U`` this is linear in ``s``, ``r`` and ``1 / B``: the fit takes the
``U`` of the least sum of squared relative errors.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from surgeon_kernels.gram import plan

UNIT_COSTS = np.arange(0, 61) / 2  # tried


class Timing(NamedTuple):
    """A row of bench/results/gram_kernels.csv: one configuration, one size."""

    tokens: int
    columns: int
    dtype: str
    config: str
    steps: int
    units: int
    bytes: int
    us: float


class Constants(NamedTuple):
    step: dict[str, float]  # of each dtype and configuration
    unit: float
    launch: float
    bandwidth: float


def read_timings(path: Path) -> list[Timing]:
    """Rows of a CSV file; columns that are no field of `Timing` are passed over."""
    kinds = {"dtype": str, "config": str, "us": float}
    with path.open(newline="") as file:
        return [
            Timing(**{name: kinds.get(name, int)(row[name]) for name in Timing._fields}) for row in csv.DictReader(file)
        ]


def estimate(constants: Constants, timing: Timing) -> float:
    """Microseconds."""
    reduction = constants.launch + timing.bytes / constants.bandwidth if timing.bytes else 0.0
    return (timing.steps + timing.units * constants.unit) * constants.step[name(timing)] + reduction


def fit(timings: Sequence[Timing]) -> Constants:
    """Constants of the least squared relative errors."""
    names = sorted({name(timing) for timing in timings})
    us = np.array([timing.us for timing in timings])
    best: tuple[float, float, np.ndarray] | None = None
    for unit in UNIT_COSTS:
        terms = np.zeros((len(timings), len(names) + 2))
        for row, timing in zip(terms, timings, strict=True):
            row[names.index(name(timing))] = timing.steps + timing.units * unit
            row[-2:] = timing.bytes > 0, timing.bytes
        terms /= us[:, None]
        solution = np.linalg.lstsq(terms, np.ones(len(us)), rcond=None)[0]
        squares = float(((terms @ solution - 1) ** 2).sum())
        if best is None or squares < best[0]:
            best = squares, float(unit), solution
    assert best is not None
    _, unit, solution = best
    bandwidth = 1 / solution[-1] if solution[-1] > 0 else float("inf")
    return Constants(dict(zip(names, solution[:-2].tolist(), strict=True)), unit, float(solution[-2]), bandwidth)


def in_force(major: int = 9) -> Constants:
    """The constants that surgeon_kernels/gram/plan.py chooses by, on devices of capability ``major``."""
    steps = {
        f"{str(dtype).removeprefix('torch.')} {label(config)}": config.step
        for (of, dtype), configs in plan.CONFIGS.items()
        for config in configs
        if of == major
    }
    return Constants(steps, plan._UNIT_COST, plan._REDUCTION_COST, plan._REDUCTION_BYTES)


def losses(constants: Constants, timings: Sequence[Timing]) -> list[float]:
    """By how much the configuration chosen by ``constants`` is slower than the fastest, relative, for every size that
    has several that they know."""
    groups: dict[tuple[object, ...], list[Timing]] = {}
    for timing in timings:
        if name(timing) in constants.step:
            groups.setdefault(timing[:3], []).append(timing)
    return [
        min(group, key=lambda timing: estimate(constants, timing)).us / min(timing.us for timing in group) - 1
        for group in groups.values()
        if len(group) > 1
    ]


def report(timings: Sequence[Timing]) -> str:
    """The constants as surgeon_kernels/gram/plan.py has them, and their errors."""
    found = fit(timings)
    errors = np.abs([estimate(found, timing) / timing.us - 1 for timing in timings])
    lost, lost_now = losses(found, timings), losses(in_force(), timings)
    steps = "".join(f"step of {name}: {step:.2f}\n" for name, step in found.step.items())
    return (
        f"{steps}_UNIT_COST = {found.unit:g}\n_REDUCTION_COST = {found.launch:.1f}\n"
        f"_REDUCTION_BYTES = {found.bandwidth:.1e}\n{len(timings)} times; relative error {np.median(errors):.1%} "
        f"(median), {np.percentile(errors, 95):.1%} (95th percentile); the configuration chosen is slower than the "
        f"fastest by {np.mean(lost):.1%} (mean), {max(lost):.1%} (worst); by the constants in force "
        f"{np.mean(lost_now):.1%} (mean), {max(lost_now):.1%} (worst)"
    )


def label(config: plan.GramConfig) -> str:
    """Blocks, warps, stages, programs a multiprocessor and run of a configuration, as rows have them.

    With an r where runs are added up in registers.
    """
    return "x".join(map(str, (*config[:6], config.run))) + "r" * config.in_registers


def name(timing: Timing) -> str:
    return f"{timing.dtype} {timing.config}"
