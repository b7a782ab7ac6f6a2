"""What an update makes of the linears, block by block: kept in the run's states, or taken from there."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_surgeon.checkpoint.states import State, part
from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.update import Written, checked_increases
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.report.decode import decode
from llm_surgeon.report.schema import ShotReport, SolverTrace
from llm_surgeon.shots.run import Run


class BlockUpdates:
    """Selections, traces and predicted increases of an update that goes through the linears of ``run``."""

    def __init__(self, run: Run, selections: list[Selection], report: ShotReport) -> None:
        self._run, self._report = run, report
        self._selection_of = {x.name: selection for x, selection in zip(run.decoder.linears, selections, strict=True)}
        self._increases: dict[str, Tensor] = {}
        self._linears: defaultdict[int, list[PrunableLinear]] = defaultdict(list)
        for linear in run.decoder.linears:
            self._linears[linear.depth].append(linear)
        self._taken: dict[int, bool] = {}
        self._notes: dict[str, dict[str, Any]] = {}  # by linear, of the block under way

    def selection(self, linear: PrunableLinear) -> Selection:
        """What is to go of a linear, or has gone."""
        return self._selection_of[linear.name]

    def add(self, linear: PrunableLinear, new: Written) -> None:
        """Take note of a linear that has its new weights."""
        trace = SolverTrace(linear.name, new.objective, new.gap, new.bound) if new.objective else None
        selection = self.selection(linear) if new.pruned is None else Selection(new.pruned)
        self._note(linear, selection, new.increase, new.jitter, trace)
        self._notes[linear.name] = {"jitter": new.jitter, "trace": None if trace is None else dataclasses.asdict(trace)}
        if len(self._notes) == len(self._linears[linear.depth]):
            if self._run.states.keeps:
                self._run.states.put_block(linear.depth, self._state(linear.depth))
            self._notes = {}

    def taken(self, depth: int, before: Callable[[PrunableLinear], object] = lambda _: None) -> bool:
        """Write the new weights of a block that an interrupted run has updated already, once; False of others.

        ``before`` is called for its linears while they have the weights that they had.
        """
        if depth not in self._taken:
            state = self._run.states.block(depth)
            self._taken[depth] = state is not None
            if state is not None:
                for linear in self._linears[depth]:
                    before(linear)
                self._take(self._linears[depth], state)
        return self._taken[depth]

    def finish(self) -> list[Selection]:
        """What is pruned now; the report has the predicted increase."""
        self._run.states.settle()
        self._report.layer_increases = checked_increases(self._increases)
        if self._increases:
            self._report.predicted_increase = sum(self._report.layer_increases.values())
        return list(self._selection_of.values())

    def _take(self, linears: list[PrunableLinear], state: State) -> None:
        self._run.write_weights(state)
        increases, by_name = state.part("increase"), {linear.name: linear for linear in linears}
        for name, note in state.note.items():
            linear = by_name[name]
            packed = state.part(name)
            selection = Selection.unpacked(packed, (linear.rows, linear.columns), self._run.plan.device)
            trace = decode(SolverTrace | None, note["trace"], "trace")
            self._note(linear, selection, increases.get(name), note["jitter"], trace)

    def _note(
        self,
        linear: PrunableLinear,
        selection: Selection,
        increase: Tensor | None,
        jitter: float,
        trace: SolverTrace | None,
    ) -> None:
        if selection is not self._selection_of[linear.name]:
            self._selection_of[linear.name] = adopted(
                self._selection_of[linear.name], selection, in_place=self._run.config.offloads
            )
        if increase is not None:
            self._increases[linear.name] = increase
        if jitter > 0.0:
            self._report.jitter[linear.name] = jitter
        if trace is not None:
            self._report.solver.append(trace)

    def _state(self, depth: int) -> State:
        arrived(self._run)
        increases = {name: self._increases[name] for name in self._notes if name in self._increases}
        tensors = self._run.weights(depth) | part("increase", increases)
        for name in self._notes:
            tensors |= part(name, self._selection_of[name].packed())
        return State(tensors, self._notes)


def arrived(run: Run) -> None:
    """Wait until masks are in main memory that were :func:`adopted` there, where they can be read on the CPU."""
    if run.config.offloads and run.plan.device.type == "cuda":
        torch.cuda.current_stream(run.plan.device).synchronize()


def adopted(former: Selection, new: Selection, *, in_place: bool) -> Selection:
    """The new selection of a linear; ``in_place``, of single weights, in the former one's mask in main memory."""
    if not in_place or former.rows is not None:
        return new
    former.pruned.copy_(new.pruned, non_blocking=former.pruned.is_pinned())
    return former
