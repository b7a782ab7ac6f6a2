"""First-order and weight-only importance of coupled groups, as in LLM-Pruner (Ma et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.loss import differentiable_loss, finite_loss
from llm_surgeon.models.passes import evaluation_mode, frozen, run_model
from llm_surgeon.models.repeatable import repeatable
from llm_surgeon.structures.costs import DimensionCosts
from llm_surgeon.structures.find.dimension import Dimension


@dataclass(frozen=True)
class WeightGradients:
    """Gradients of the mean token loss with respect to weights, by parameter.

    Attributes:
        loss: the mean loss; mean: of the gradients of all sequences; square: mean of their squares.
    """

    loss: float
    mean: dict[nn.Parameter, Tensor]
    square: dict[nn.Parameter, Tensor]


def weight_gradients(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    calibration: Calibration,
    progress: Callable[[int, int], None] | None = None,
) -> WeightGradients:
    """Mean and mean square, over the calibration sequences, of each sequence's gradient of its mean token loss.

    Raises:
        BadBatchError: a loss is NaN or infinite.
    """
    ranks = calibration.ranks
    chosen = list(parameters)
    mean = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in chosen}
    square = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in chosen}
    total, samples = 0.0, len(calibration.input_ids)
    with frozen(model), evaluation_mode(model), repeatable(), torch.enable_grad():
        for parameter in chosen:
            parameter.requires_grad_(True)
        for done, (ids, mask) in enumerate(calibration.batches(1, chosen[0].device), 1):
            loss = differentiable_loss(run_model(model, ids, mask).logits, ids, mask, "mean")
            gradients = torch.autograd.grad(loss, chosen)
            for parameter, gradient in zip(chosen, gradients, strict=True):
                mean[parameter].add_(gradient, alpha=1 / samples)
                square[parameter].addcmul_(gradient, gradient, value=1 / samples)
            total += finite_loss(loss, done, samples, range(done - 1, done)) / samples
            if progress is not None:
                progress(done, samples)
    for sums in (*mean.values(), *square.values()):
        ranks.sum_(sums)
    return WeightGradients(ranks.total(total), mean, square)


def group_importance(
    dimension: Dimension, importance: str, gradients: WeightGradients | None, generator: torch.Generator
) -> DimensionCosts:
    """Importance of every group: the sum over its rows and columns, in producers and consumer, of theirs.

    With ``s = w ∂L/∂w`` and ``h`` the mean square of the sequences' gradients, a row or column of weights has:
    ``vector`` ``|Σ s|``; ``taylor1`` ``Σ |s|``; ``taylor2`` ``Σ |w² h|``; ``taylor-mix`` ``Σ |s - ½ w² h|``;
    ``magnitude`` ``Σ w²``; ``random`` a random number.
    """
    device = dimension.columns.device
    if importance == "random":
        draw = torch.rand(dimension.groups, generator=generator).to(device)
        return DimensionCosts(draw, draw[:, None].expand(-1, dimension.parts))
    columns = line_importance(dimension.consumer, importance, gradients, dim=0)
    groups = columns[dimension.columns].sum(dim=1)
    for kind, producer in dimension.producers.items():
        groups += line_importance(producer, importance, gradients, dim=1)[dimension.rows[kind]].sum(dim=1)
    return DimensionCosts(groups, groups[:, None].expand(-1, dimension.parts))


def line_importance(linear: PrunableLinear, importance: str, gradients: WeightGradients | None, dim: int) -> Tensor:
    """Importance of the rows (``dim=1``) or columns (``dim=0``) of one linear's weight."""
    weight = linear.matrix()[:, : linear.columns]
    if importance == "magnitude":
        return weight.square().sum(dim)
    assert gradients is not None
    parameter = linear.module.get_parameter("weight")
    gradient, square = gradients.mean[parameter], gradients.square[parameter]
    if isinstance(linear.module, Conv1D):
        gradient, square = gradient.T, square.T
    if importance == "vector":
        return (weight * gradient).sum(dim).abs()
    salience = {
        "taylor1": weight * gradient,
        "taylor2": weight.square() * square,
        "taylor-mix": weight * gradient - 0.5 * weight.square() * square,
    }[importance]
    return salience.abs().sum(dim)
