"""The multi-shot loop: curvature -> costs -> selection -> update -> weights, once per shot (Algorithm 1)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from llm_surgeon.config.methods import method
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import Curvature, estimate_curvature
from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import NumericalError
from llm_surgeon.methods.costs import element_costs, row_column_costs
from llm_surgeon.methods.gradient_steps import direction, held_out, mean_gradients, step
from llm_surgeon.methods.select import Selection, select_elements, select_rows_columns
from llm_surgeon.methods.two_terms import PairedCurvature, compensate_by_pairs, paired_costs
from llm_surgeon.methods.update import remove, remove_and_compensate
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.offload import PinnedMemory, compute_device, offloaded
from llm_surgeon.models.passes import mean_loss, to_list
from llm_surgeon.planning.plan import make_plan
from llm_surgeon.progress import Progress
from llm_surgeon.report.schema import GradientStep, ShotReport, SolverTrace
from surgeon_kernels import WeightCosts

T = TypeVar("T")


class ShotLoop:
    """Prunes ``decoder`` in place, a part of the sparsity in each shot (``schedule`` in :class:`PruneConfig`).

    Args:
        model: the causal LM that ``decoder`` is part of.
        calibration: windows the curvature and the losses are measured on.
        config: what to prune and how.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, calibration: Calibration, config: PruneConfig, progress: Progress
    ) -> None:
        self.model, self.decoder, self.calibration = model, decoder, calibration
        self.correction_data = calibration  # what low-rank corrections learn from
        self.held_out: Calibration | None = None  # what the whole run's cost is measured on
        self.held_out_losses: list[float] = []  # before pruning, and after it
        self.steps_data = held_out(calibration) if config.gradient_steps else None
        self.config, self.progress = config, progress
        self.method = method(config.method)
        self.device = compute_device(model, config)
        self.offload = config.offload == "cpu"
        self.plan = make_plan(model, decoder, config)
        self.batch_size = self.plan.batch_size
        self.selections: list[Selection] = []
        self.reports: list[ShotReport] = []
        self._before_update: Callable[[], object] = lambda: None
        self._dense_weights: dict[str, Tensor] = {}  # [W | b] before the first shot, where later ones need it
        self._memory, self._factor_memory = PinnedMemory(), PinnedMemory()  # for a run, for a shot
        self._paired: PairedCurvature | None = None  # of the shot that is running, with kron_rank 2

    def run(self, before_update: Callable[[], object] = lambda: None) -> None:
        """Run every shot; ``selections`` then holds what is pruned and ``reports`` what each shot did.

        ``before_update`` is called whenever weights are about to be changed.

        Raises:
            NumericalError: NaN or infinity, or a factor that is not positive definite; the layer is named.
        """
        self._before_update = before_update
        with closing(self._memory), closing(self._factor_memory), self._offloaded():
            self.selections = [self._nothing(linear) for linear in self.decoder.linears]
            self._measure_held_out()
            self._run()
            with self._as_pruned():
                self._measure_held_out()

    def _as_pruned(self) -> AbstractContextManager[None]:
        """Lets the model compute what it will once it is finished."""
        return nullcontext()

    def _measure_held_out(self) -> None:
        if self.held_out is not None:
            self.progress.phase("held-out loss")
            tokens = self.batch_size * self.calibration.input_ids.shape[1]
            batch_size = max(1, tokens // self.held_out.input_ids.shape[1])
            self.held_out_losses.append(mean_loss(self.model, self.held_out, batch_size))

    def _offloaded(self) -> AbstractContextManager[None]:
        return offloaded(self.model, self.decoder, self.device) if self.offload else nullcontext()

    def _run(self) -> None:
        assert self.config.shots is not None
        self.progress.shots(self.config.shots)
        for index in range(1, self.config.shots + 1):
            self.progress.shot(index)
            self._shot(index)
            if index > 1:
                self._record_loss_after(self.reports[-2], self.reports[-1].loss_before)
        with self._phase("measure loss", self.reports[-1].seconds):
            self._record_loss_after(self.reports[-1], mean_loss(self.model, self.calibration, self.batch_size))

    def finish(self) -> None:
        """What remains to be done to the model once every shot went well: nothing, where weights stay as zeros."""

    def _shot(self, index: int) -> None:
        config = self.config
        assert config.sparsity is not None and config.shots is not None
        target = config.sparsity * (1.0 - (1.0 - index / config.shots) ** config.schedule)
        seconds: dict[str, float] = {}
        curvature, factors, threshold, predicted = None, None, None, None
        traces: list[SolverTrace] = []
        self._factor_memory.reuse()
        with self._phase("curvature", seconds):
            if not self.method.curvature:
                loss = mean_loss(self.model, self.calibration, self.batch_size)
            else:
                curvature = self._estimate(index)
                loss = curvature.loss
                keep = self.plan.inverses_bytes > 0
                factors = DampedFactors(curvature, config, self.decoder.linears, self.device, keep_inverses=keep)
                if config.kron_rank == 2:
                    self._paired = PairedCurvature(
                        self.decoder, config, curvature, functools.partial(self._estimate, index)
                    )
        if self.method.sweep is not None:
            with self._phase("update", seconds):
                self._before_update()
                sweep = self.method.function("sweep")
                masks = sweep(self.model, self.decoder, self.calibration, config, progress=self.progress.step)
            self.selections = [Selection(masks[linear.name]) for linear in self.decoder.linears]
        else:
            with self._phase("selection", seconds):
                threshold = self._select(target, factors)
            with self._phase("update", seconds):
                self._before_update()
                predicted, traces = self._update(factors)
        steps: list[GradientStep] = []
        if config.gradient_steps:
            assert factors is not None
            with self._phase("gradient steps", seconds):
                steps = self._gradient_steps(factors)
        self._correct(index, seconds)
        self.reports.append(
            ShotReport(
                index=index,
                target_sparsity=target,
                sparsity=self._sparsity(),
                threshold=threshold,
                loss_before=loss,
                predicted_increase=predicted,
                seconds=seconds,
                solver=traces,
                jitter=factors.jitter if factors is not None else {},
                gradient_steps=steps,
                correction_rank=index * config.lora_rank,
            )
        )

    def _correct(self, index: int, seconds: dict[str, float]) -> None:
        """Train a low-rank correction after shot ``index`` and absorb it."""
        if self.config.lora_rank:
            with self._phase("correction", seconds):
                from llm_surgeon.recovery.correct import correct  # brings peft and Trainer: only where they are used

                correct(self.model, self.decoder, self.correction_data, self.config, index, self.progress)

    def _estimate(self, index: int) -> Curvature:
        kept_apart = self.offload or self.config.curvature_layers is not None
        return estimate_curvature(
            self.model,
            self.decoder,
            self.calibration,
            batch_size=self.batch_size,
            fisher=self.config.fisher,
            seed=self.config.seed + index,  # sampled labels are fresh in every shot
            gradients=self.method.gradients,
            checkpoint_activations=self.plan.checkpoint_activations,
            blocks_per_pass=self.plan.blocks_per_pass,
            store=self._factor_memory.store if kept_apart else None,
            progress=self.progress.step,
        )

    def _select(self, target: float, factors: DampedFactors | None) -> float | None:
        """Choose what is pruned after this shot; the global threshold, where there is one."""
        if self.config.pattern.kind == "rows-columns":
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
            around = self._around(linear, weight)
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
            gradients = mean_gradients(self.model, self.decoder, for_gradients, max(1, self.batch_size // 2))
            self._each_linear(towards)
            taken.append(step(self.model, self.decoder.linears, directions, for_lengths, self.batch_size, follow))
            if taken[-1].length == 0.0:
                break
        return taken

    def _selected(self) -> Iterator[tuple[PrunableLinear, Selection]]:
        return zip(self.decoder.linears, self.selections, strict=True)

    def _around(self, linear: PrunableLinear, weight: Tensor) -> Tensor:
        """What an update starts from: the ``weight`` of the last shot, or the dense one."""
        if not self.config.around_dense_weights:
            return weight
        if linear.name not in self._dense_weights:
            own = weight.to(linear.weight.dtype)
            self._dense_weights[linear.name] = self._memory.copy(own) if self.offload else own
            return weight
        return self._dense_weights[linear.name].to(self.device, non_blocking=True).to(weight.dtype)

    def _nothing(self, linear: PrunableLinear) -> Selection:
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
        results = []
        for done, linear in enumerate(self.decoder.linears):
            self.progress.step(done, len(self.decoder.linears), linear.name)
            results.append(function(linear))
        return results

    @contextmanager
    def _phase(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        self.progress.phase(name)
        begun = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - begun

    def _sparsity(self) -> float:
        removed = sum(to_list([selection.pruned.count_nonzero() for selection in self.selections]))
        return removed / sum(selection.pruned.numel() for selection in self.selections)

    @staticmethod
    def _record_loss_after(report: ShotReport, loss: float | None) -> None:
        if loss is not None and report.loss_before is not None:
            report.measured_increase = loss - report.loss_before
