"""The shot loop for coupled groups: weights become zero shot by shot, and go for good at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_surgeon.config.prune import GRADIENT_IMPORTANCES, PruneConfig
from llm_surgeon.curvature.estimate import Curvature, estimate_curvature
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.models.passes import mean_loss
from llm_surgeon.progress import Progress
from llm_surgeon.report.schema import ShotReport
from llm_surgeon.shots.weights import ShotLoop
from llm_surgeon.structures.costs import DimensionCosts, kronecker_costs
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.find.dimensions import find_dimensions
from llm_surgeon.structures.importance import WeightGradients, group_importance, weight_gradients
from llm_surgeon.structures.narrowing import allowed
from llm_surgeon.structures.reconstruct import reconstruct
from llm_surgeon.structures.remove.groups import narrow, undone
from llm_surgeon.structures.select import check_reachable, select_groups
from surgeon_kernels import NotPositiveDefiniteError, damp, objective, rows_columns_update, spd_inverse


class GroupLoop(ShotLoop):
    """Removes neurons and heads: costs and compensation in the linear that reads them, rows of the producers free.

    Only the consumers' factors are needed, so only theirs are estimated.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, calibration: Calibration, config: PruneConfig, progress: Progress
    ) -> None:
        self.dimensions = [_alone(dimension) for dimension in reachable_dimensions(model, decoder, config)]
        self._consumers = Decoder(decoder.blocks, [dimension.consumer for dimension in self.dimensions])
        super().__init__(model, decoder, calibration, config, progress)
        self.removed = [
            torch.zeros(d.groups, d.parts, dtype=torch.bool, device=d.columns.device) for d in self.dimensions
        ]
        # Targets are computed without dropout, whatever mode the model is in.
        self._dense = [copy.deepcopy(block).eval() for block in decoder.blocks] if config.reconstruct else []
        self._generator = torch.Generator().manual_seed(config.seed)

    def finish(self) -> None:
        """Take what is zero out of the model."""
        narrow(self.model, self.decoder, list(zip(self.dimensions, self.removed, strict=True)))

    def _shot(self, index: int) -> None:
        config = self.config
        assert config.sparsity is not None and config.shots is not None
        share = config.sparsity * (1.0 - (1.0 - index / config.shots) ** config.schedule)
        seconds: dict[str, float] = {}
        jitter: dict[str, float] = {}
        with self._phase("curvature", seconds):
            loss, curvature, gradients = self._measure(index)
        with self._phase("selection", seconds):
            costs = [
                self._costs(dimension, removed, curvature, gradients, jitter)
                for dimension, removed in self._each_dimension()
            ]
            weights = sum(selection.pruned.numel() for selection in self.selections)
            target, final = (math.ceil(part * weights - 1e-6) for part in (share, config.sparsity))
            self.removed, threshold = select_groups(self.dimensions, costs, self.removed, config, target, final)
            self.selections = self._as_selections()
        with self._phase("update", seconds):
            self._before_update()
            increases = [
                self._update_dimension(dimension, removed, curvature) for dimension, removed in self._each_dimension()
            ]
        curvature = gradients = None  # what follows needs the memory
        if config.reconstruct and index == config.shots:
            with self._phase("reconstruction", seconds):
                self._reconstruct()
        self._correct(index, seconds)
        self.reports.append(
            ShotReport(
                index=index,
                target_sparsity=share,
                sparsity=self._sparsity(),
                threshold=threshold,
                loss_before=loss,
                predicted_increase=sum(increases) if config.importance == "kronecker" else None,
                seconds=seconds,
                jitter=jitter,
                correction_rank=index * config.lora_rank,
            )
        )

    def _reconstruct(self) -> None:
        reconstruct(
            self.model,
            self.decoder,
            self._dense,
            {dimension.kind for dimension in self.dimensions},
            self.calibration,
            damping=self.config.damp_a,
            batch_size=self.batch_size,
            progress=self.progress.step,
        )

    def _measure(self, index: int) -> tuple[float, Curvature | None, WeightGradients | None]:
        """The loss, the consumers' factors and the weights' gradients, where they are needed."""
        config, curvature, gradients = self.config, None, None
        if config.importance == "kronecker" or config.update == "joint":
            curvature = estimate_curvature(
                self.model,
                self._consumers,
                self.calibration,
                batch_size=self.batch_size,
                fisher=config.fisher,
                seed=config.seed + index,
                gradients=config.importance == "kronecker",
                checkpoint_activations=self.plan.checkpoint_activations,
                progress=self.progress.step,
            )
        if config.importance in GRADIENT_IMPORTANCES:
            weights = [linear.module.get_parameter("weight") for linear in self.decoder.linears]
            gradients = weight_gradients(self.model, weights, self.calibration, self.progress.step)
        if curvature is not None:
            return curvature.loss, curvature, gradients
        if gradients is not None:
            return gradients.loss, None, gradients
        return mean_loss(self.model, self.calibration, self.batch_size), None, None

    def _costs(
        self,
        dimension: Dimension,
        removed: Tensor,
        curvature: Curvature | None,
        gradients: WeightGradients | None,
        jitter: dict[str, float],
    ) -> DimensionCosts:
        config, consumer = self.config, dimension.consumer
        if config.importance != "kronecker":
            return group_importance(dimension, config.importance, gradients, self._generator)
        assert curvature is not None and config.damp_g is not None
        G, A = curvature.factors(consumer)
        assert G is not None
        # What is gone cannot compensate, though its inputs may live on in other heads of its group.
        gone = dimension.removed_columns(removed)
        A[: len(gone), : len(gone)].masked_fill_(gone[:, None] | gone, 0.0)
        A[len(gone) :, : len(gone)].masked_fill_(gone, 0.0)
        A[: len(gone), len(gone) :].masked_fill_(gone[:, None], 0.0)
        try:
            a = spd_inverse(A, config.damp_a, name=f"A of {consumer.name}")
        except NotPositiveDefiniteError as error:
            raise NumericalError(str(error)) from error
        if a.jitter:
            jitter[consumer.name] = a.jitter
        return kronecker_costs(dimension, consumer.matrix(A.dtype), damp(G, config.damp_g), a.inverse, removed)

    def _update_dimension(self, dimension: Dimension, removed: Tensor, curvature: Curvature | None) -> float:
        """Zero the removed parts, compensate in the consumer; the predicted increase of the loss, where G is known."""
        consumer, config = dimension.consumer, self.config
        G, A = (None, None) if curvature is None else curvature.factors(consumer)
        weight = consumer.matrix(torch.float32 if A is None else A.dtype)
        columns = torch.zeros_like(weight[0], dtype=torch.bool)
        columns[: consumer.columns] = dimension.removed_columns(removed)
        if config.update == "none":
            delta = torch.where(columns, -weight, torch.zeros_like(weight))
        else:
            assert A is not None
            no_rows = torch.zeros_like(weight[:, 0], dtype=torch.bool)
            try:
                damped = damp(A, config.damp_a)
                delta = rows_columns_update(weight, None, damped, no_rows, columns, name=consumer.name)
            except NotPositiveDefiniteError as error:
                raise NumericalError(f"update of {consumer.name}: {error}") from error
        if not bool(torch.isfinite(delta).all()):
            raise NumericalError(f"update of {consumer.name} holds NaN or infinity: raise damp_a")
        consumer.write((weight + delta).masked_fill(columns, 0.0))
        for producer, rows in dimension.removed_rows(removed):
            matrix = producer.matrix(weight.dtype)
            producer.write(matrix.masked_fill(rows[:, None], 0.0))
        return 0.0 if G is None or A is None else objective(delta, G, A)

    def _as_selections(self) -> list[Selection]:
        """What is gone, as rows and columns of every linear."""
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

    def _each_dimension(self) -> Iterator[tuple[Dimension, Tensor]]:
        for done, pair in enumerate(zip(self.dimensions, self.removed, strict=True)):
            self.progress.step(done, len(self.dimensions), pair[0].consumer.name)
            yield pair


def reachable_dimensions(model: Any, decoder: Decoder, config: PruneConfig) -> list[Dimension]:
    """What groups can leave.

    Raises:
        InputError: ``config`` cannot be met there. UnsupportedModelError: the model cannot be smaller, which is tried.
    """
    if config.skipped_layers and max(config.skipped_layers) >= len(decoder.blocks):
        raise InputError(
            f"skip_layers names block {max(config.skipped_layers)}, and the model has {len(decoder.blocks)}"
        )
    dimensions = find_dimensions(model, decoder)
    check_reachable(dimensions, config, sum(x.rows * x.columns for x in decoder.linears))
    with undone(model):
        narrow(model, decoder, _smallest_step(dimensions, config))
    return dimensions


def _smallest_step(dimensions: list[Dimension], config: PruneConfig) -> list[tuple[Dimension, Tensor]]:
    """Every dimension with the fewest groups that may leave it; without ``uniform`` those of the last block stay."""
    last = max(dimension.depth for dimension in dimensions)
    removed = []
    for dimension in dimensions:
        parts = torch.zeros(dimension.groups, dimension.parts, dtype=torch.bool, device=dimension.columns.device)
        sizes = range(dimension.groups - 1, 0, -1) if config.uniform or dimension.depth < last else ()
        left = next((size for size in sizes if allowed(dimension, config, size, dimension.parts)), dimension.groups)
        parts[left:] = True
        removed.append((dimension, parts))
    return removed


def _alone(dimension: Dimension) -> Dimension:
    """With a factor A of the consumer's own, whatever other linear reads the same input."""
    return replace(dimension, consumer=replace(dimension.consumer, input_group=dimension.consumer.name))
