"""Steps along the natural gradient of the kept weights, after a shot.

The curvature of single layers does not see how what is pruned in one adds to what is pruned in others: at the pruned
weights the loss has a gradient, which an optimum has not. A step lowers the loss by it, every layer by its own
``∇W`` and curvature, and of all layers together the length is found on calibration windows that are held out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.curvature.factors import KroneckerFactors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.loss import count_tokens, next_token_loss
from llm_surgeon.models.passes import ForwardPasses, evaluation_mode, frozen, mean_loss, to_list
from llm_surgeon.report.schema import GradientStep
from surgeon_kernels import joint_update

# Of the calibration windows, those whose loss decides how far to go; curvature and selection have seen them.
_HELD_OUT = 1 / 8
# The length that is tried first, what others are multiplied by, and between which they lie. Little is left of a whole
# step: a gradient of N tokens is mostly noise in as many directions as there are weights, which the inverses magnify.
_FIRST, _RATIO, _SHORTEST, _LONGEST = 1e-3, 3.0, 1e-5, 1.0
# How near to its optimum the direction is solved for.
_TOLERANCE = 0.05


def split_windows(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Split calibration windows into those for gradients and those, the last eighth, for lengths.

    Raises:
        InputError: there is only one window.
    """
    ids, mask = calibration.input_ids, calibration.attention_mask
    kept = len(ids) - max(1, round(len(ids) * _HELD_OUT))
    if kept < 1:
        raise InputError("gradient_steps need at least 2 calibration windows: the last eighth of them is held out")
    parts = (slice(0, kept), slice(kept, None))
    first, last = (Calibration(ids[part], None if mask is None else mask[part]) for part in parts)
    return first, last


def mean_gradients(
    model: PreTrainedModel, decoder: Decoder, calibration: Calibration, batch_size: int
) -> dict[str, Tensor]:
    """``∇[W | b]`` ``[R, C']`` of the mean token loss for every linear by name, in float32 (float64 of float64 models).

    Raises:
        NumericalError: a gradient is NaN or infinite; the message names the layer.
    """
    _, targets = count_tokens(model, calibration)
    device = model.get_input_embeddings().weight.device
    parameters = [p for linear in decoder.linears for p in linear.module.parameters(recurse=False)]
    with (
        frozen(model),
        evaluation_mode(model),
        fused_pointwise(model),
        _summed(parameters) as sums,
        torch.enable_grad(),
    ):
        forward = ForwardPasses(model, device, None)
        for input_ids, mask in calibration.batches(batch_size, device):
            logits = forward.logits(input_ids, mask, with_gradient=True)
            next_token_loss(logits, input_ids, mask)
            logits.source.backward(logits.gradient)
            del logits
    found = {linear.name: _matrix(linear, sums).div_(targets) for linear in decoder.linears}
    for name, finite in zip(found, to_list([gradient.sum().isfinite() for gradient in found.values()]), strict=True):
        if not finite:
            raise NumericalError(f"NaN or infinity in the gradient of {name}")
    return found


def _matrix(linear: PrunableLinear, of: dict[nn.Parameter, Tensor]) -> Tensor:
    """Take from ``of`` what belongs to a linear's parameters, laid out as :meth:`PrunableLinear.matrix`."""
    weight = of.pop(linear.module.get_parameter("weight"))
    weight = weight.T if isinstance(linear.module, Conv1D) else weight
    return torch.cat([weight, of.pop(linear.module.get_parameter("bias"))[:, None]], 1) if linear.has_bias else weight


@contextlib.contextmanager
def _summed(parameters: list[nn.Parameter]) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Context manager with the sums of the parameters' gradients over all backward passes, in float32 at least.

    Their ``.grad`` is restored on exit.
    """
    sums = {p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters}
    held = {p: p.grad for p in parameters}

    def take(p: nn.Parameter) -> None:
        assert p.grad is not None
        sums[p] += p.grad
        p.grad = None

    handles = []
    try:
        for p in parameters:
            p.grad = None
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(take))
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in held.items():
            p.grad = grad


def direction(gradient: Tensor, pruned: Tensor, factors: KroneckerFactors, max_iterations: int) -> Tensor:
    """``D`` that minimises ``½ tr(Dᵀ G D A) - ⟨∇W, D⟩`` with ``D = 0`` on the pruned weights, ``[R, C']``.

    Without pruned weights that is ``N = G⁻¹ ∇W A⁻¹``. With them, ``D = N + Δ``, ``Δ`` the joint update that removes
    their part of ``N``.
    """
    natural = factors.inverse_product(gradient)
    solved = joint_update(
        natural, pruned, *factors.damped, *factors.inverses, tolerance=_TOLERANCE, max_iterations=max_iterations
    )
    return natural.add_(solved.delta).masked_fill_(pruned, 0.0)


def step(
    model: PreTrainedModel,
    linears: list[PrunableLinear],
    directions: dict[str, Tensor],
    windows: Calibration,
    batch_size: int,
    moved: Callable[[PrunableLinear, Tensor], None],
) -> GradientStep:
    """``W ← W - s D`` of every linear, with the ``s`` that has the least loss on ``windows``.

    Lengths grow while the loss falls, or shrink until it does; then the least of the parabola through the best and
    its neighbours is tried as well. A length with which the loss is no number any more is as bad as can be.

    Args:
        moved: called for every linear with the ``s D`` that it was moved by, where a step is taken.
    """
    before = {linear.name: linear.matrix(linear.weight.dtype) for linear in linears}

    def write(length: float) -> None:
        for linear in linears:
            weight = before[linear.name]
            linear.write(weight.to(torch.promote_types(weight.dtype, torch.float32)) - length * directions[linear.name])

    def loss(length: float) -> float:
        write(length)
        try:
            return mean_loss(model, windows, batch_size)
        except NumericalError:
            return math.inf

    tried = {0.0: mean_loss(model, windows, batch_size), _FIRST: loss(_FIRST)}
    length, helped = _FIRST, tried[_FIRST] < tried[0.0]
    ratio = _RATIO if helped else 1 / _RATIO
    while (tried[length] == min(tried.values())) == helped and _SHORTEST < length * ratio < _LONGEST:
        length *= ratio
        tried[length] = loss(length)
    between = _least_of_parabola(tried)
    if between is not None:
        tried[between] = loss(between)
    best = min(tried, key=lambda s: tried[s])
    write(best)
    if best > 0.0:
        for linear in linears:
            moved(linear, directions[linear.name] * best)
    return GradientStep(best, tried[0.0], tried[best])


def _least_of_parabola(tried: dict[float, float]) -> float | None:
    """Minimum of the parabola through the best point and its neighbours; None without two of these."""
    points = sorted(tried.items())
    best = min(range(len(points)), key=lambda i: points[i][1])
    if not 0 < best < len(points) - 1:
        return None
    (x0, y0), (x1, y1), (x2, y2) = points[best - 1 : best + 2]
    falls, rises = (y0 - y1) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if not 0.0 < falls + rises < math.inf:
        return None
    return 0.5 * (x0 + x1) + 0.5 * falls * (x2 - x0) / (falls + rises)
