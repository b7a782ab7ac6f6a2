"""Steps along the natural gradient after a shot's update."""

from __future__ import annotations

from torch import Tensor

from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError
from llm_surgeon.methods.gradient_steps import direction, split_windows, step
from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.step_objective import StepObjective
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.dense_weights import DenseWeights
from llm_surgeon.report.schema import GradientStep
from llm_surgeon.shots.anchors import AnchorWeights
from llm_surgeon.shots.retries import measured
from llm_surgeon.shots.run import Run


class GradientSteps:
    """Steps of the kept weights, which ``anchors``, that later shots start from, take, too."""

    def __init__(self, run: Run, anchors: AnchorWeights) -> None:
        self._run, self._anchors = run, anchors
        self._windows()  # are there enough?
        self._dense: DenseWeights | None = None

    def begin(self) -> None:
        """Keep the weights of the dense model, where it is the target."""
        run = self._run
        if run.config.gradient_target == "dense":
            self._dense = DenseWeights(run.decoder)
        if run.step_windows is not None and run.config.skip_bad_batches:  # else NaN would be met after an update
            measured(run, lambda: run.loss(run.step_windows), "step_windows")

    def take(self, selections: list[Selection], factors: DampedFactors) -> list[GradientStep]:
        """Take as many steps as are asked for, or until none helps."""
        run, linears = self._run, self._run.decoder.linears
        try:
            for_gradients, for_lengths = self._windows()
        except InputError:
            run.say("too few windows are left for gradient steps")
            return []
        objective = StepObjective(
            run.model,
            run.decoder,
            run.plan.batch_size,
            dense=self._dense,
            dtype=run.compute_dtype,
            checkpoint_activations=run.plan.checkpoint_activations,
        )
        pruned = {
            linear.name: selection.with_bias(linear.columns + linear.has_bias)
            for linear, selection in zip(linears, selections, strict=True)
        }

        def towards(linear: PrunableLinear) -> Tensor:
            gradient = gradients.pop(linear.name).to(run.plan.device)
            found = direction(gradient, pruned[linear.name], factors.of(linear), run.config.max_iterations)
            return found.to(linear.weight)

        taken: list[GradientStep] = []
        for _ in range(run.config.gradient_steps):
            gradients = objective.gradients(for_gradients)
            directions = dict(zip((linear.name for linear in linears), run.each_linear(towards), strict=True))
            first = {"first": taken[-1].length} if taken else {}
            taken.append(step(linears, directions, lambda: objective.mean(for_lengths), self._anchors.follow, **first))
            if taken[-1].length == 0.0:
                break
        return taken

    def _windows(self) -> tuple[Calibration, Calibration]:
        """Those for gradients and those for lengths."""
        run = self._run
        if run.step_windows is None:
            return split_windows(run.calibration, run.config.gradient_samples)
        return run.calibration, run.step_windows
