"""Predicted loss against sparsity, without pruning: of every linear, and of the model as a whole."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.errors import InputError
from llm_surgeon.isolation import isolated
from llm_surgeon.methods.select import Selection, select_elements
from llm_surgeon.methods.update import remove_and_compensate
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.shots.curvature import ShotCurvature
from llm_surgeon.shots.retries import measured
from llm_surgeon.shots.run import Run
from surgeon_kernels import WeightCosts

# Single weights, chosen once and solved for roughly: their cost is told, not their values.
_OPTIONS: dict[str, Any] = {
    "structure": "unstructured", "update": "joint", "shots": 1, "swaps": 0, "gradient_steps": 0, "max_iterations": 8,
}  # fmt: skip
# Options of a run that its sensitivity has, too.
_SHARED = (
    "damp_g", "damp_a", "min_kept", "samples", "seqlen", "skip_bad_batches", "seed", "batch_size",
    "checkpoint_activations", "compute_dtype", "fisher", "tolerance",
)  # fmt: skip
# Hundredths of all weights up to which a sparsity is looked for, where the least kept of a layer allows so many.
_MOST = 95


def sensitivity_options(**options: Any) -> PruneConfig:
    """Options of the run that :func:`measure_sensitivity` takes."""
    return PruneConfig(**_OPTIONS, **options)


@dataclass(frozen=True)
class LayerSensitivity:
    """Predicted increases of the loss, nats per token, by pruning this linear alone to each of the sparsities."""

    name: str
    kind: str
    depth: int
    weights: int
    increases: list[float]


@dataclass(frozen=True)
class Sensitivity:
    """Predicted increases of ``model``, at ``sparsities`` of single weights of each layer."""

    model: str
    sparsities: list[float]
    layers: list[LayerSensitivity]

    def by(self, attribute: str) -> dict[Any, list[float]]:
        """Sums over the layers that share ``attribute`` ("kind" or "depth"), in execution order."""
        sums: dict[Any, list[float]] = {}
        for layer in self.layers:
            former = sums.get(getattr(layer, attribute), [0.0] * len(self.sparsities))
            sums[getattr(layer, attribute)] = [a + b for a, b in zip(former, layer.increases, strict=True)]
        return sums

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False, ensure_ascii=False)


@isolated()
def measure_sensitivity(run: Run, sparsities: Sequence[float]) -> Sensitivity:
    """Predict what each linear of ``run``, by :func:`sensitivity_options`, would cost at each of ``sparsities``.

    The others compensate by the joint update, as :func:`~llm_surgeon.methods.update.remove_and_compensate` does. No
    weight changes.
    """
    with evaluation_mode(run.model):
        predicted = _Predicted(run)
        layers = [
            LayerSensitivity(linear.name, linear.kind, linear.depth, linear.rows * linear.columns, increases)
            for linear, increases in zip(
                run.decoder.linears,
                run.each_linear(lambda linear: [predicted.alone(linear, sparsity) for sparsity in sparsities]),
                strict=True,
            )
        ]
    return Sensitivity(getattr(run.model.config, "_name_or_path", ""), list(sparsities), layers)


@isolated()
def sparsity_for(run: Run, target_loss: float) -> tuple[float, float]:
    """The largest sparsity, in hundredths, that is predicted to raise the loss by at most ``target_loss``, and by what.

    All linears share a threshold, and the rest is solved for once by the joint update: several shots, a sequential
    update and gradient steps cost less than that.

    Raises:
        InputError: one hundredth of the weights costs more.
    """
    config = sensitivity_options(**{name: getattr(run.config, name) for name in _SHARED})
    run = dataclasses.replace(run, config=config)
    with evaluation_mode(run.model):
        predicted = _Predicted(run)
        found, low, high = 0.0, 0, min(_MOST, math.floor(100 * (1 - config.min_kept) + 1e-6)) + 1
        while high - low > 1:
            middle = (low + high) // 2
            increase = predicted.together(middle / 100)
            if increase <= target_loss:
                low, found = middle, increase
            else:
                high, least = middle, increase
    if low == 0:
        raise InputError(f"target_loss {target_loss:g}: 1% of the weights is predicted to cost {least:.2g} already")
    return low / 100, found


class _Predicted:
    """Predicted increases, from one estimate of the curvature of the dense model."""

    def __init__(self, run: Run) -> None:
        self._run, self._curvature = run, ShotCurvature(run, PinnedMemory())
        run.progress.phase("curvature")
        measured(run, lambda: self._curvature.estimate(1, sweeps=False, selects=True))
        run.progress.phase("costs")
        names = [linear.name for linear in run.decoder.linears]
        self._costs: dict[str, WeightCosts] = dict(zip(names, self._curvature.costs(), strict=True))
        run.progress.phase("predicted loss")

    def alone(self, linear: PrunableLinear, sparsity: float) -> float:
        """Of pruning one linear alone."""
        (selection,) = self._select([linear], sparsity)
        return self._increase(linear, selection)

    def together(self, sparsity: float) -> float:
        """Of pruning all linears, where one threshold is left by all."""
        linears = self._run.decoder.linears
        chosen = dict(zip((linear.name for linear in linears), self._select(linears, sparsity), strict=True))
        return sum(self._run.each_linear(lambda linear: self._increase(linear, chosen[linear.name])))

    def _select(self, linears: Sequence[PrunableLinear], sparsity: float) -> list[Selection]:
        device = self._run.plan.device
        nothing = [torch.zeros(linear.rows, linear.columns, dtype=torch.bool, device=device) for linear in linears]
        costs = [self._costs[linear.name] for linear in linears]
        return select_elements(costs, nothing, self._run.config, sparsity)[0]

    def _increase(self, linear: PrunableLinear, selection: Selection) -> float:
        factors = self._curvature.factors_of(linear)
        assert factors is not None
        weight = linear.matrix(device=self._run.plan.device)
        update = remove_and_compensate(weight, selection, factors, self._run.config, linear.name)
        return float(factors.predicted_increase(update.delta))
