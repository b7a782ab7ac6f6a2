"""Shots that prune single weights, or rows and columns, to zeros."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from llm_surgeon.checkpoint.states import State, part
from llm_surgeon.methods.select import Selection, select_elements, select_rows_columns
from llm_surgeon.methods.stay_dense import choose_dense, loss_of_pattern
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.shots.anchors import AnchorWeights
from llm_surgeon.shots.block_updates import adopted, arrived
from llm_surgeon.shots.curvature import ShotCurvature
from llm_surgeon.shots.gradient_steps import GradientSteps
from llm_surgeon.shots.reconstruct import fit_to_dense
from llm_surgeon.shots.run import Run, Shot
from llm_surgeon.shots.sequential import SequentialUpdates
from llm_surgeon.shots.updates import Updates


class WeightShots:
    """Prunes single weights, or whole rows and columns, which stay as zeros.

    Curvature -> costs -> selection -> update -> weights, a layer at a time; costs share one global threshold where
    those of layers compare. A method that sweeps through the layers selects while it updates, and so does the last
    shot's sequential update, within as many weights of each layer.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.method = run, run.config, run.config.method_record
        self.selections: list[Selection] = []
        self._dense: list[Tensor] = []  # weights before pruning, where the rest is fitted to what these compute
        self._stay_dense: list[bool] | None = None  # of every linear, where some do
        self._predicted: dict[str, float] = {}  # increase of every linear by the shots so far
        self._memory, self._shot_memory = PinnedMemory(), PinnedMemory()  # for a run, for a shot
        self._curvature = ShotCurvature(run, self._shot_memory)
        anchors = AnchorWeights(run, self._memory)
        self._anchors, self._updates = anchors, Updates(run, self._curvature, anchors)
        self._sweep = SequentialUpdates(run, self._curvature, anchors, self._shot_memory)
        self._steps = GradientSteps(run, anchors) if self.config.gradient_steps else None

    def removal(self) -> str:
        total = self.run.decoder.weights
        least = "" if self.config.structure_record.single_weights else "at least "
        return f"{least}{round(self.config.removed_fraction * total):,} of {total:,} weights"

    def begin(self, resources: ExitStack) -> None:
        resources.callback(self._memory.close)
        resources.callback(self._shot_memory.close)
        linears = self.run.decoder.linears
        self.selections = [self._empty_selection(linear) for linear in linears]
        self._dense = [linear.matrix(linear.weight.dtype) for linear in linears if self.config.reconstruct]
        if self._steps is not None:
            self._steps.begin()

    def pruned(self) -> AbstractContextManager[None]:
        return nullcontext()

    def measure(self, shot: Shot) -> float:
        return self._curvature.estimate(shot.index, sweeps=self._sweeps(shot), selects=self._selects(shot))

    def select(self, shot: Shot) -> None:
        target = shot.report.target_sparsity
        if not self._selects(shot):
            return
        if self.config.structure_record.single_weights:
            costs = self._curvature.costs()
            previous = [selection.pruned for selection in self.selections]
            out = previous if self.config.offloads else None
            if self.config.dense_fraction and self._stay_dense is None:
                self._stay_dense = self._choose_dense()
            found = select_elements(costs, previous, self.config, target, out, self._stay_dense)
            if self._stay_dense is not None:  # whole linears do: not just the fraction that was asked for
                sizes = [linear.weight.numel() for linear in self.run.decoder.linears]
                pruned = sum(size for size, stays in zip(sizes, self._stay_dense, strict=True) if not stays)
                shot.report.target_sparsity = self.config.sparsity * shot.fraction * pruned / sum(sizes)
        else:
            line_costs = list(self.run.each_linear(self._curvature.line_costs))
            found = select_rows_columns(line_costs, self.selections, self.config, target)
        self.selections, shot.report.threshold = found

    def update(self, shot: Shot) -> None:
        run, report = self.run, shot.report
        if self.method.sweep is not None:
            sweep = self.method.function("sweep")
            masks = sweep(run.model, run.decoder, run.calibration, self.config, progress=run.progress.step)
            self.selections = [Selection(masks[linear.name]) for linear in run.decoder.linears]
            return
        updates = self._sweep if self._sweeps(shot) else self._updates
        self.selections = updates.write(self.selections, report)
        # A sweep makes dense again what shots before it changed.
        former, increases = self._predicted, report.layer_increases
        if self._sweeps(shot) and report.predicted_increase is not None:
            report.predicted_increase -= sum(former.values())
            increases |= {name: value - former.get(name, 0.0) for name, value in increases.items()}
        self._predicted = former | {name: former.get(name, 0.0) + value for name, value in increases.items()}
        if self._steps is not None and self._sweeps(shot) == self.config.sequential:
            shot.phase("gradient steps")
            report.gradient_steps = self._steps.take(self.selections, self._curvature.after_update())
        if self._curvature.factors is not None:
            for jitters in run.ranks.everyones(self._curvature.factors.jitter):
                for name, jitter in jitters.items():
                    report.jitter[name] = max(jitter, report.jitter.get(name, 0.0))
        self._curvature.free()  # what follows needs the memory
        if self.config.reconstruct and shot.last:
            shot.phase("reconstruction")
            fit_to_dense(run, self.selections, self._dense)
            self._dense.clear()

    def state(self) -> State:
        arrived(self.run)
        linears = self.run.decoder.linears
        tensors = self.run.weights() | part("anchor", self._anchors.state())
        for linear, selection in zip(linears, self.selections, strict=True):
            tensors |= part(linear.name, selection.packed())
        return State(tensors, {"predicted": self._predicted, "stay_dense": self._stay_dense})

    def restore(self, state: State) -> None:
        linears, in_place = self.run.decoder.linears, self.config.offloads
        if self.config.around_dense_weights:
            self._anchors.restore(linears, state.part("anchor"))
        self.run.write_weights(state)
        for index, (linear, former) in enumerate(zip(linears, self.selections, strict=True)):
            packed, device = state.part(linear.name), former.pruned.device
            new = Selection.unpacked(packed, (linear.rows, linear.columns), device)
            self.selections[index] = adopted(former, new, in_place=in_place)
        self._predicted, self._stay_dense = state.note["predicted"], state.note["stay_dense"]

    def finish(self) -> None:
        """Zeros stay where weights were."""

    def _choose_dense(self) -> list[bool]:
        def loss(linear: PrunableLinear) -> float:
            factors = self._curvature.factors_of(linear)
            assert factors is not None
            return loss_of_pattern(linear, factors, self.config)

        linears = self.run.decoder.linears
        sizes = [linear.weight.numel() for linear in linears]
        return choose_dense(list(self.run.each_linear(loss)), sizes, self.config.dense_fraction)

    def _sweeps(self, shot: Shot) -> bool:
        return self.config.sequential and shot.last

    def _selects(self, shot: Shot) -> bool:
        """True where costs are compared before the update; of N:M a sweep knows how many weights go, unless some
        linears stay dense."""
        known = self._sweeps(shot) and self.config.structure_record.m > 0 and not self.config.dense_fraction
        return self.method.sweep is None and not known

    def _empty_selection(self, linear: PrunableLinear) -> Selection:
        """The start of a run: on the device, or in main memory where that keeps the weights."""
        offload = self.config.offloads
        device = torch.device("cpu") if offload else self.run.plan.device
        if not self.config.structure_record.single_weights:
            rows, columns = (torch.zeros(n, dtype=torch.bool, device=device) for n in (linear.rows, linear.columns))
            return Selection.of_rows_columns(rows, columns)
        if offload:
            return Selection(self._memory.empty((linear.rows, linear.columns), torch.bool).zero_())
        return Selection(torch.zeros(linear.rows, linear.columns, dtype=torch.bool, device=device))
