"""Shots that remove coupled groups: weights become zero shot by shot, and go for good at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from llm_surgeon.checkpoint.states import State, part
from llm_surgeon.config.prune import GRADIENT_IMPORTANCES
from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.curvature.factors import DampedFactor, DampedFactors, KroneckerFactors, numerical_errors
from llm_surgeon.errors import NumericalError
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.shots.anchors import AnchorWeights
from llm_surgeon.shots.gradient_steps import GradientSteps
from llm_surgeon.shots.reconstruct import fit_to_dense
from llm_surgeon.shots.run import Run, Shot
from llm_surgeon.structures.costs import DimensionCosts, kronecker_costs
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.importance import WeightGradients, group_importance, weight_gradients
from llm_surgeon.structures.reachable import reachable_dimensions
from llm_surgeon.structures.remove.groups import remove_groups
from llm_surgeon.structures.select import select_groups
from surgeon_kernels import damp, objective, rows_columns_update

T = TypeVar("T")


class GroupShots:
    """Removes neurons and heads: costs and compensation in the linear that reads them, rows of the producers free.

    Only the consumers' factors are needed, so only theirs are estimated.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.decoder = run, run.config, run.decoder
        dimensions = reachable_dimensions(run.model, run.decoder, run.config)
        self.dimensions = [_with_own_factor(dimension) for dimension in dimensions]
        self._consumers = Decoder(run.decoder.blocks, [dimension.consumer for dimension in self.dimensions])
        self.removed = [
            torch.zeros(d.groups, d.parts, dtype=torch.bool, device=d.columns.device) for d in self.dimensions
        ]
        self.selections: list[Selection] = []
        self._dense: list[Tensor] = []  # weights before pruning, where the rest is fitted to what these compute
        # All shots go on from the last one's weights: no anchors move.
        anchors = AnchorWeights(run, PinnedMemory())
        self._steps = GradientSteps(run, anchors) if run.config.gradient_steps else None
        self._owners = run.owners_of(self._consumers)
        self._generator = torch.Generator().manual_seed(run.config.seed)
        # Of the shot that is under way:
        self._curvature: Curvature | None = None
        self._gradients: WeightGradients | None = None

    def removal(self) -> str:
        total = self.decoder.weights
        return f"at least {round(self.config.sparsity * total):,} of {total:,} weights"

    def begin(self, resources: ExitStack) -> None:
        self.selections = self._as_selections()
        if self._steps is not None:
            self._steps.begin()
        linears = self.decoder.linears if self.config.reconstruct else []
        self._dense = [linear.matrix(linear.weight.dtype) for linear in linears]

    def pruned(self) -> AbstractContextManager[None]:
        return nullcontext()

    def measure(self, shot: Shot) -> float:
        """Estimate the consumers' factors and the weights' gradients, where they are needed; the loss."""
        run, config = self.run, self.config
        if config.importance == "kronecker" or config.update == "joint":
            gradients = config.importance == "kronecker"
            self._curvature = run.curvature(shot.index, self._consumers, gradients=gradients, owners=self._owners)
        if config.importance in GRADIENT_IMPORTANCES:
            weights = [linear.module.get_parameter("weight") for linear in self.decoder.linears]
            self._gradients = weight_gradients(run.model, weights, run.calibration, run.progress.step)
        found = self._curvature or self._gradients
        return run.loss() if found is None else found.loss

    def select(self, shot: Shot) -> None:
        if self.config.importance == "kronecker":
            found = list(self._each_dimension(self._costs))
            costs = [cost for cost, _ in found]
            jitters = zip(self._consumers.linears, found, strict=True)
            shot.report.jitter |= {linear.name: jitter for linear, (_, jitter) in jitters if jitter}
        else:
            options = self.config.importance, self._gradients, self._generator
            costs = [group_importance(dimension, *options) for dimension in self.dimensions]
        weights = sum(selection.pruned.numel() for selection in self.selections)
        sparsities = (shot.report.target_sparsity, self.config.sparsity)
        target, final = (math.ceil(sparsity * weights - 1e-6) for sparsity in sparsities)
        self.removed, shot.report.threshold = select_groups(
            self.dimensions, costs, self.removed, self.config, target, final
        )
        self.selections = self._as_selections()

    def update(self, shot: Shot) -> None:
        increases = list(self._each_dimension(self._update_consumer))
        self.run.publish(self._consumers.linears, self._owners)
        for dimension, removed in zip(self.dimensions, self.removed, strict=True):
            for producer, rows in dimension.removed_rows(removed):
                producer.write(producer.matrix().masked_fill(rows[:, None], 0.0))
        if self.config.importance == "kronecker":
            shot.report.predicted_increase = sum(increases)
            names = (dimension.consumer.name for dimension in self.dimensions)
            shot.report.layer_increases = dict(zip(names, increases, strict=True))
        self._curvature = self._gradients = None  # what follows needs the memory
        if self.config.reconstruct and shot.last:
            shot.phase("reconstruction")
            fit_to_dense(self.run, self.selections, self._dense)
            self._dense.clear()
        if self._steps is not None and shot.last:
            shot.phase("gradient steps")
            shot.report.gradient_steps = self._steps.take(self.selections, self._factors())

    def _factors(self) -> DampedFactors:
        """Factors of all linears, where nothing but zeros has gone yet."""
        found = self.run.curvature(self.config.shots, owners=self.run.owners)
        return DampedFactors(found, self.config, self.run.own_linears, self.run.plan.device)

    def state(self) -> State:
        removed = {str(index): mask.clone() for index, mask in enumerate(self.removed)}
        drawn = {"generator": self._generator.get_state()}
        return State({**self.run.weights(), **part("removed", removed), **drawn}, {})

    def restore(self, state: State) -> None:
        self.run.write_weights(state)
        removed = state.part("removed")
        self.removed = [removed[str(index)].to(mask.device) for index, mask in enumerate(self.removed)]
        self._generator.set_state(state.tensors["generator"])
        self.selections = self._as_selections()

    def finish(self) -> None:
        """Take what is zero out of the model."""
        remove_groups(self.run.model, self.decoder, list(zip(self.dimensions, self.removed, strict=True)))

    def _costs(self, dimension: Dimension, removed: Tensor) -> tuple[DimensionCosts, float]:
        """Costs of a dimension's groups, and the jitter that a factorisation needed for them."""
        config, consumer = self.config, dimension.consumer
        assert self._curvature is not None
        G, A = self._curvature.factors(consumer)
        assert G is not None
        # What is gone cannot compensate, though its inputs may live on in other heads of its group.
        gone = dimension.removed_columns(removed)
        A[: len(gone), : len(gone)].masked_fill_(gone[:, None] | gone, 0.0)
        A[len(gone) :, : len(gone)].masked_fill_(gone, 0.0)
        A[: len(gone), len(gone) :].masked_fill_(gone[:, None], 0.0)
        a = DampedFactor.checked(A, config.damp_a, f"A of {consumer.name}")
        factors = KroneckerFactors(DampedFactor(G, config.damp_g), a)
        return kronecker_costs(dimension, consumer.matrix(A.dtype), factors, removed), a.jitter

    def _update_consumer(self, dimension: Dimension, removed: Tensor) -> float:
        """Zero what the consumer reads of removed parts, the others compensating; the predicted increase of the loss,
        where G is known."""
        consumer, config = dimension.consumer, self.config
        G, A = (None, None) if self._curvature is None else self._curvature.factors(consumer)
        weight = consumer.matrix(torch.float32 if A is None else A.dtype)
        columns = torch.zeros_like(weight[0], dtype=torch.bool)
        columns[: consumer.columns] = dimension.removed_columns(removed)
        if config.update == "none":
            delta = torch.where(columns, -weight, torch.zeros_like(weight))
        else:
            assert A is not None
            no_rows = torch.zeros_like(weight[:, 0], dtype=torch.bool)
            with numerical_errors(f"update of {consumer.name}"):
                damped = damp(A, config.damp_a)
                delta = rows_columns_update(weight, None, damped, no_rows, columns, name=consumer.name)
        if not bool(torch.isfinite(delta).all()):
            raise NumericalError(f"update of {consumer.name} holds NaN or infinity: raise damp_a")
        consumer.write((weight + delta).masked_fill(columns, 0.0))
        return 0.0 if G is None or A is None else objective(delta, G, A)

    def _as_selections(self) -> list[Selection]:
        """Rows and columns of every linear that are gone."""
        rows, columns = {}, {}
        for linear in self.decoder.linears:
            device = linear.module.get_parameter("weight").device
            rows[linear.name] = torch.zeros(linear.rows, dtype=torch.bool, device=device)
            columns[linear.name] = torch.zeros(linear.columns, dtype=torch.bool, device=device)
        for dimension, removed in zip(self.dimensions, self.removed, strict=True):
            columns[dimension.consumer.name] |= dimension.removed_columns(removed)
            for producer, mask in dimension.removed_rows(removed):
                rows[producer.name] |= mask
        return [Selection.of_rows_columns(rows[x.name], columns[x.name]) for x in self.decoder.linears]

    def _each_dimension(self, function: Callable[[Dimension, Tensor], T]) -> Iterator[T]:
        """``function`` of every dimension and what is removed of it, by the owner of its consumer."""
        pairs = zip(self.dimensions, self.removed, strict=True)
        return self.run.each_owned(pairs, lambda pair: pair[0].consumer, lambda pair: function(*pair), self._owners)


def _with_own_factor(dimension: Dimension) -> Dimension:
    """With a factor A of the consumer's own, whatever other linear reads the same input."""
    return replace(dimension, consumer=replace(dimension.consumer, input_group=dimension.consumer.name))
