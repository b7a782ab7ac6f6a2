"""Trials: one pruning of one model each, named in words, run on several devices, and told in rows.

A structure reads ``"2:4"`` or ``"groups 20%"``. A method may be followed by options that differ from the defaults:
``"surgeon joint, swaps 2, schedule 1.5"``.
"""

from __future__ import annotations

import argparse
import csv
import gc
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.end_to_end.admm import ADMM
from llm_surgeon import InputError, PruneConfig, PruneReport, prune
from llm_surgeon.config.methods import method as record
from llm_surgeon.config.prune import GRADIENT_IMPORTANCES
from llm_surgeon.data.calibration import Calibration

Row = dict[str, Any]

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "l-obd": {"method": "l-obd"},
    "k-obd": {"method": "k-obd"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt sequential": {"method": "sparsegpt", "update": "sequential"},
    "admm": {"method": ADMM.name},
    "admm sequential": {"method": ADMM.name, "update": "sequential"},
    "surgeon": {"method": "surgeon"},
    "surgeon none": {"method": "surgeon", "update": "none"},
    "surgeon independent": {"method": "surgeon", "update": "independent"},
    "surgeon chunked": {"method": "surgeon", "update": "chunked"},
    "surgeon joint": {"method": "surgeon", "update": "joint", "gradient_steps": 0},
    "surgeon sequential": {"method": "surgeon", "update": "sequential", "gradient_steps": 0},
    # Of coupled groups, by LLM-Pruner's importances: alike in every layer, as its default is, or over the whole model.
    **{
        f"{importance}{suffix}": {"importance": importance, "allocation": allocation}
        for importance in (*GRADIENT_IMPORTANCES, "magnitude", "random")
        for suffix, allocation in ((" local", "local"), (" global", "global"))
    },
}
TRIAL_FIELDS = ("model", "structure", "method", "seed")
_ABOUT = ("device", "torch", "transformers", "commit")


def method_options(method: str) -> dict[str, Any]:
    """Options of the configuration, of ``"method, option value, option value"``."""
    name, *changes = method.split(", ")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METHODS)}")
    try:
        return METHODS[name] | {option: yaml.safe_load(value) for option, value in map(str.split, changes)}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{method!r}: after a comma and a space comes 'option value'") from error


def structure_options(structure: str) -> dict[str, Any]:
    """Options of the configuration, of ``"2:4"`` or ``"groups 20%"``."""
    match = re.fullmatch(r"(\S+)(?: ([0-9.]+)%)?", structure)
    if match is None:
        raise argparse.ArgumentTypeError(f"{structure!r} is neither a structure nor 'structure percent%'")
    return {"structure": match[1]} | ({} if match[2] is None else {"sparsity": float(match[2]) / 100})


def known_method(text: str) -> str:
    """``text``, if it names a method."""
    method_options(text)
    return text


def known_structure(text: str) -> str:
    """``text``, if it names a structure."""
    try:
        PruneConfig(**structure_options(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def plan(models: Iterable[str], structures: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """Every combination that is defined, all of a seed together; what needs no data does not depend on the seed.

    Raises:
        InputError: options that do not go with the method or the structure.
    """
    trials: list[tuple[str, str, str, int]] = []
    for model in models:
        trials.append((model, "none", "dense", 0))
        for seed in seeds:
            for structure in structures:
                for method in methods:
                    of_structure = structure_options(structure)
                    try:
                        config = PruneConfig(**of_structure, **METHODS[method.split(", ")[0]])
                    except InputError:
                        continue
                    PruneConfig(**of_structure, **method_options(method))
                    if seed == seeds[0] or record(config.method).needs != "nothing":
                        trials.append((model, structure, method, seed))
    return [dict(zip(TRIAL_FIELDS, trial, strict=True)) for trial in trials]


def run_trial(model: torch.nn.Module, trial: Row, windows: Callable[[], Calibration]) -> tuple[PruneReport | None, Row]:
    """Prune ``model`` in place as the ``trial`` says: the report, none of the dense model, and columns of the row."""
    report, iterations, begun = None, [0], time.perf_counter()
    if trial["method"] != "dense":
        options = {**method_options(trial["method"]), **structure_options(trial["structure"])}
        report = prune(model, windows(), config=PruneConfig(**options, seed=trial["seed"]))
        iterations = [trace.iterations for shot in report.shots for trace in shot.solver] or [0]
    return report, {
        "shots": 0 if report is None else len(report.shots),
        "sparsity": f"{0.0 if report is None else report.sparsity:.5f}",
        "solver_iterations": f"{sum(iterations) / len(iterations):.1f}",
        "seconds": f"{time.perf_counter() - begun:.1f}",
    }


def results(run: Callable[[Row, str], Row], trials: Sequence[Row], devices: Sequence[str]) -> Iterator[Row]:
    """Row of every trial as it ends; one process for each of ``devices`` works them off, this one if it is alone."""
    if len(devices) == 1:
        _bind(devices)
        yield from (_run_bound(run, trial) for trial in trials)
        return
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.SimpleQueue()
    for device in devices:
        queue.put([device])
    with ProcessPoolExecutor(len(devices), spawn, _bind_next, (queue,)) as pool:
        for done in as_completed([pool.submit(_run_bound, run, trial) for trial in trials]):
            yield done.result()


_device = "cpu"  # of this process


def _bind(devices: Sequence[str]) -> None:
    global _device
    (_device,) = devices
    if torch.device(_device).index is not None:
        torch.cuda.set_device(_device)


def _bind_next(queue: Any) -> None:
    _bind(queue.get())


def _run_bound(run: Callable[[Row, str], Row], trial: Row) -> Row:
    row = run(trial, _device)
    gc.collect()  # models refer to themselves
    if torch.device(_device).type == "cuda":
        torch.cuda.empty_cache()
    return row


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def undone(trials: Sequence[Row], rows: Iterable[Row]) -> list[Row]:
    """``trials`` that have no row yet."""
    fields = list(trials[0]) if trials else []
    done = {_key(row, fields) for row in rows}
    return [trial for trial in trials if _key(trial, fields) not in done]


def _key(trial: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(trial[field]) for field in fields)


def summarise(
    trials: Iterable[Row], path: Path, fields: Sequence[str], columns: Mapping[str, Callable[[list[Row]], Any]]
) -> None:
    """Table of one row for trials that agree in ``fields``, in a file and on the screen.

    ``columns`` are made of such trials, by their seeds in order; device, versions and commit are the first one's.
    """
    order = ["dense", *METHODS]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for trial in sorted(trials, key=lambda t: int(t["seed"])):
        groups.setdefault(_key(trial, fields), []).append(trial)

    def place(group: list[Row]) -> tuple[Any, ...]:
        others = [group[0][field] for field in fields if field != "method"]
        return *others, order.index(group[0]["method"].split(", ")[0]), group[0]["method"]

    rows = [
        {
            **{field: group[0][field] for field in fields},
            **{name: column(group) for name, column in columns.items()},
            **{key: group[0][key] for key in _ABOUT},
        }
        for group in sorted(groups.values(), key=place)
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*fields, *columns, *_ABOUT], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*list(row.values())[: -len(_ABOUT)], sep=" | ")


def first(key: str) -> Callable[[list[Row]], Any]:
    return lambda group: group[0][key]


def mean(key: str, digits: int) -> Callable[[list[Row]], str]:
    """Column of means, empty where no trial has a value."""

    def of(group: list[Row]) -> str:
        values = [float(trial[key]) for trial in group if trial[key] != ""]
        return f"{sum(values) / len(values):.{digits}f}" if values else ""

    return of


def by_seed(key: str) -> Callable[[list[Row]], str]:
    return lambda group: " ".join(str(trial[key]) for trial in group)
