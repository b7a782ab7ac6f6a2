"""Passes over the windows of a run that are made again: on smaller batches, or without windows that hold NaN."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch

from llm_surgeon.errors import BadBatchError, InputError
from llm_surgeon.planning.plan import Plan
from llm_surgeon.shots.resume import note_layout
from llm_surgeon.shots.run import Run

_T = TypeVar("_T")


_NAMES = {
    "calibration": "calibration",
    "held_out": "held-out",
    "step_windows": "gradient step",
    "evaluation": "evaluation",
}


def measured(
    run: Run,
    measure: Callable[[], _T],
    windows: Literal["calibration", "held_out", "step_windows", "evaluation"] = "calibration",
) -> _T:
    """What ``measure``, passes over ``windows`` that change nothing, comes to.

    One of several ranks does not make passes again, in which others would not follow.

    Where the memory of a GPU does not suffice it is called again with half as many windows in a batch, as the rest of
    the run then has; where a batch holds NaN or infinity and such are to be skipped, the rest of the run goes without
    its windows. A line and the report say so.

    Raises:
        OutOfMemoryError: one window is too many.
        BadBatchError: NaN or infinity, and no wish to skip it, or nothing else is left.
    """
    while True:
        try:
            return measure()
        except torch.OutOfMemoryError:
            size = run.plan.batch_size
            if size == 1 or run.ranks.count > 1:
                raise
            said = f"GPU memory ran out in a pass over {size} windows at once: the run goes on with {size // 2}"
            run.plan = dataclasses.replace(run.plan, batch_size=size // 2)
        except BadBatchError as error:
            kept = getattr(run, windows)
            if not run.config.skip_bad_batches or len(error.windows) >= len(kept.input_ids):
                raise
            numbers = run.leave_out(windows, error.windows)
            said = f"{_NAMES[windows]} windows {numbers[0] + 1} to {numbers[-1] + 1} are left out: {error}"
        # Out here nothing holds the tensors of the pass that failed any more.
        free_memory()
        run.say(said)
        note_layout(run)


class NeedsOffload(Exception):
    """Memory ran out where offloading may help: the run is to be gone on with by :attr:`plan`, offloaded."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


@contextmanager
def offloading_at_need(run: Run) -> Iterator[None]:
    """Context manager that raises :class:`NeedsOffload` where the memory of a GPU does not suffice for ``run``.

    Whoever makes the run again from its states, if it has any, finds it offloaded, and without gradient steps. Where
    that does not go with the options, or is so already, the :class:`torch.OutOfMemoryError` itself passes.
    """
    try:
        yield
        return
    except torch.OutOfMemoryError:
        if run.config.offloads or run.ranks.count > 1 or not _goes_offloaded(run):
            raise
    without = ", and there are no gradient steps" if run.config.gradient_steps else ""
    run.say(f"GPU memory ran out: weights and factors wait in main memory from there on (offload cpu){without}")
    note_layout(run, offload="cpu", plan=None)
    raise NeedsOffload(run.plan)


def _goes_offloaded(run: Run) -> bool:
    try:
        run.config.offloaded()
    except InputError:
        return False
    return True


def free_memory() -> None:
    """Give the device back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
