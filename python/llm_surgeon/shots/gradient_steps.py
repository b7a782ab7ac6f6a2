"""Steps along the natural gradient after a shot's update."""

from __future__ import annotations

from torch import Tensor

from llm_surgeon.curvature.factors import DampedFactors
from llm_surgeon.methods.gradient_steps import direction, mean_gradients, split_windows, step
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.report.schema import GradientStep
from llm_surgeon.shots.anchors import AnchorWeights
from llm_surgeon.shots.run import Run


class GradientSteps:
    """Steps of the kept weights, which ``anchors``, that later shots start from, take, too."""

    def __init__(self, run: Run, anchors: AnchorWeights) -> None:
        self._run, self._anchors = run, anchors
        self._for_gradients, self._for_lengths = split_windows(run.calibration)

    def take(self, selections: list[Selection], factors: DampedFactors) -> list[GradientStep]:
        """Take as many steps as are asked for, or until none helps."""
        run, batch_size = self._run, self._run.plan.batch_size
        linears = run.decoder.linears
        pruned = {
            linear.name: selection.with_bias(linear.columns + linear.has_bias)
            for linear, selection in zip(linears, selections, strict=True)
        }
        directions: dict[str, Tensor] = {}

        def towards(linear: PrunableLinear) -> None:
            gradient = gradients.pop(linear.name).to(run.plan.device)
            found = direction(gradient, pruned[linear.name], factors.of(linear), run.config.max_iterations)
            directions[linear.name] = found.to(linear.weight)

        taken: list[GradientStep] = []
        for _ in range(run.config.gradient_steps):
            # Weights that need gradients keep their inputs: half as many windows at once.
            gradients = mean_gradients(run.model, run.decoder, self._for_gradients, max(1, batch_size // 2))
            run.each_linear(towards)
            taken.append(step(run.model, linears, directions, self._for_lengths, batch_size, self._anchors.follow))
            if taken[-1].length == 0.0:
                break
        return taken
