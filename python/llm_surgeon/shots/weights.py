"""Shots that prune single weights, or rows and columns, to zeros."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from llm_surgeon.config.methods import method
from llm_surgeon.curvature.estimate import Curvature, estimate_curvature
from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.errors import NumericalError
from llm_surgeon.methods.costs import element_costs, row_column_costs
from llm_surgeon.methods.gradient_steps import direction, held_out, mean_gradients, step
from llm_surgeon.methods.select import Selection, select_elements, select_rows_columns
from llm_surgeon.methods.two_terms import PairedCurvature, compensate_by_pairs, paired_costs
from llm_surgeon.methods.update import remove, remove_and_compensate
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.models.passes import to_list
from llm_surgeon.report.schema import GradientStep, SolverTrace
from llm_surgeon.shots.runner import Run, Shot
from surgeon_kernels import WeightCosts

T = TypeVar("T")


class WeightShots:
    """Prunes single weights, or whole rows and columns, which stay as zeros.

    Curvature -> costs -> selection -> update -> weights, a layer at a time; a global threshold where costs of layers
    can be compared.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.decoder, self.device = run, run.config, run.decoder, run.plan.device
        self.method = method(run.config.method)
        self.selections: list[Selection] = []
        self.offload = run.config.offload == "cpu"
        self.steps_data = held_out(run.calibration) if run.config.gradient_steps else None
        self._memory, self._factor_memory = PinnedMemory(), PinnedMemory()  # for a run, for a shot
        self._dense_weights: dict[str, Tensor] = {}  # [W | b] before the first shot, where later ones need it
        # Of the shot that is under way:
        self._factors: DampedFactors | None = None
        self._paired: PairedCurvature | None = None  # with kron_rank 2

    def removal(self) -> str:
        total = sum(linear.rows * linear.columns for linear in self.decoder.linears)
        assert self.config.sparsity is not None
        least = "" if self.config.pattern.single_weights else "at least "
        return f"{least}{round(self.config.sparsity * total):,} of {total:,} weights"

    def begin(self, resources: ExitStack) -> None:
        resources.callback(self._memory.close)
        resources.callback(self._factor_memory.close)
        self.selections = [self._empty_selection(linear) for linear in self.decoder.linears]

    def pruned(self) -> AbstractContextManager[None]:
        return nullcontext()

    def measure(self, shot: Shot) -> float:
        config = self.config
        self._factor_memory.reuse()
        if not self.method.curvature:
            return self.run.loss()
        curvature = self._estimate(shot.index)
        keep = self.run.plan.inverses_bytes > 0
        self._factors = DampedFactors(curvature, config, self.decoder.linears, self.device, keep_inverses=keep)
        if config.kron_rank == 2:
            again = functools.partial(self._estimate, shot.index)
            self._paired = PairedCurvature(self.decoder, config, curvature, again)
        return curvature.loss

    def select(self, shot: Shot) -> None:
        if self.method.sweep is None:
            shot.report.threshold = self._select(shot.report.target_sparsity, self._factors)

    def update(self, shot: Shot) -> None:
        run, factors = self.run, self._factors
        if self.method.sweep is None:
            shot.report.predicted_increase, shot.report.solver = self._update(factors)
        else:
            sweep = self.method.function("sweep")
            masks = sweep(run.model, self.decoder, run.calibration, self.config, progress=run.progress.step)
            self.selections = [Selection(masks[linear.name]) for linear in self.decoder.linears]
        if factors is not None:
            if self.config.gradient_steps:
                shot.phase("gradient steps")
                shot.report.gradient_steps = self._gradient_steps(factors)
            shot.report.jitter = factors.jitter
        self._factors = self._paired = None  # what follows needs the memory

    def finish(self) -> None:
        """Zeros stay where weights were."""

    def _estimate(self, index: int) -> Curvature:
        kept_apart = self.offload or self.config.curvature_layers is not None
        return estimate_curvature(
            self.run.model,
            self.decoder,
            self.run.calibration,
            batch_size=self.run.plan.batch_size,
            fisher=self.config.fisher,
            seed=self.config.seed + index,  # sampled labels are fresh in every shot
            gradients=self.method.gradients,
            checkpoint_activations=self.run.plan.checkpoint_activations,
            blocks_per_pass=self.run.plan.blocks_per_pass,
            store=self._factor_memory.store if kept_apart else None,
            progress=self.run.progress.step,
        )

    def _select(self, target: float, factors: DampedFactors | None) -> float | None:
        """Choose what is pruned after this shot; the global threshold, where there is one."""
        if not self.config.pattern.single_weights:
            line_costs = self._each_linear(lambda linear: row_column_costs(linear, self.method, factors))
            self.selections, threshold = select_rows_columns(line_costs, self.selections, self.config, target)
        else:
            paired = self._paired
            costs = self._each_linear(
                lambda linear: (
                    element_costs(linear, self.method, factors)
                    if paired is None
                    else WeightCosts(paired_costs(linear, paired.of(linear)))
                )
            )
            previous = [selection.pruned for selection in self.selections]
            out = previous if self.offload else None
            self.selections, threshold = select_elements(costs, previous, self.config, target, out)
        return threshold

    def _update(self, factors: DampedFactors | None) -> tuple[float | None, list[SolverTrace]]:
        """Write every layer's new weights; the predicted increase of the loss (where G is known), solver traces."""
        selection_of = {linear.name: selection for linear, selection in self._selected()}
        traces: list[SolverTrace] = []
        increases: dict[str, Tensor] = {}

        def update(linear: PrunableLinear) -> None:
            weight, selection = linear.matrix(device=self.device), selection_of[linear.name].to(self.device)
            around = self._anchor_weight(linear, weight)
            known = None if factors is None or not self.method.gradients else factors.of(linear)
            if factors is None or known is None or self.config.update == "none":
                new = remove(weight, selection)
            else:
                if self._paired is None:
                    new = remove_and_compensate(around, selection, known, self.config, linear.name)
                else:
                    new = compensate_by_pairs(around, selection, self._paired.of(linear), self.config)
                factors.note_jitter(linear, new.jitter)
            if new.selection is not selection:  # exchanges changed it
                if self.offload:
                    mask = selection_of[linear.name].pruned
                    mask.copy_(new.selection.pruned, non_blocking=mask.is_pinned())
                else:
                    selection_of[linear.name] = new.selection
            linear.write(new.weight)
            if new.objective:
                traces.append(SolverTrace(linear.name, new.objective, new.gap, new.bound))
            if known is not None:
                increases[linear.name] = known.predicted_increase(new.delta)
                if around is not weight:
                    increases[linear.name] -= known.predicted_increase(weight - around)

        self._each_linear(update)
        self.selections = list(selection_of.values())
        # Read back together: the host runs ahead of the device.
        predicted = to_list(list(increases.values()))
        for name, increase in zip(increases, predicted, strict=True):
            if not math.isfinite(increase):
                raise NumericalError(f"update of {name} holds NaN or infinity: raise damp_g or damp_a")
        return (sum(predicted) if increases else None), traces

    def _gradient_steps(self, factors: DampedFactors) -> list[GradientStep]:
        """Steps along the natural gradient; the weights that later shots start from take them, too."""
        assert self.steps_data is not None
        for_gradients, for_lengths = self.steps_data
        batch_size = self.run.plan.batch_size
        pruned = {linear.name: s.with_bias(linear.columns + linear.has_bias) for linear, s in self._selected()}
        directions: dict[str, Tensor] = {}

        def towards(linear: PrunableLinear) -> None:
            gradient = gradients.pop(linear.name).to(self.device)
            found = direction(gradient, pruned[linear.name], factors.of(linear), self.config.max_iterations)
            directions[linear.name] = found.to(linear.weight)

        def follow(linear: PrunableLinear, change: Tensor) -> None:
            if linear.name in self._dense_weights:
                self._dense_weights[linear.name] -= change.to(self.device)

        taken: list[GradientStep] = []
        for _ in range(self.config.gradient_steps):
            # Weights that need gradients keep their inputs: half as many windows at once.
            gradients = mean_gradients(self.run.model, self.decoder, for_gradients, max(1, batch_size // 2))
            self._each_linear(towards)
            taken.append(step(self.run.model, self.decoder.linears, directions, for_lengths, batch_size, follow))
            if taken[-1].length == 0.0:
                break
        return taken

    def _selected(self) -> Iterator[tuple[PrunableLinear, Selection]]:
        return zip(self.decoder.linears, self.selections, strict=True)

    def _anchor_weight(self, linear: PrunableLinear, weight: Tensor) -> Tensor:
        """What an update starts from: the ``weight`` of the last shot, or the dense one."""
        if not self.config.around_dense_weights:
            return weight
        if linear.name not in self._dense_weights:
            own = weight.to(linear.weight.dtype)
            self._dense_weights[linear.name] = self._memory.copy(own) if self.offload else own
            return weight
        return self._dense_weights[linear.name].to(self.device, non_blocking=True).to(weight.dtype)

    def _empty_selection(self, linear: PrunableLinear) -> Selection:
        """The empty selection a run starts from: on the device, or in main memory where that keeps the weights."""
        device = torch.device("cpu") if self.offload else self.device
        if not self.config.pattern.single_weights:
            return Selection.of_rows_columns(
                torch.zeros(linear.rows, dtype=torch.bool, device=device),
                torch.zeros(linear.columns, dtype=torch.bool, device=device),
            )
        if self.offload:
            return Selection(self._memory.empty((linear.rows, linear.columns), torch.bool).zero_())
        return Selection(torch.zeros(linear.rows, linear.columns, dtype=torch.bool, device=device))

    def _each_linear(self, function: Callable[[PrunableLinear], T]) -> list[T]:
        return [function(linear) for linear in self.run.each(self.decoder.linears, lambda linear: linear.name)]
