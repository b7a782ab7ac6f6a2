"""The loss that gradient steps lower, over windows, and its gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import NumericalError
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.dense_weights import DenseWeights
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.loss import Logits, count_tokens, divergence, next_token_loss
from llm_surgeon.models.passes import (
    ForwardPasses,
    checkpointed,
    evaluation_mode,
    frozen,
    mean_loss,
    to_list,
)
from llm_surgeon.models.repeatable import repeatable


class StepObjective:
    """Mean token loss of a model: its divergence from the dense one, ``KL(dense ‖ model)``, or that of labels.

    The divergence fits no label, and the curvature of it at the dense weights is the Fisher information, that of
    sampled labels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: Decoder,
        batch_size: int,
        *,
        dense: DenseWeights | None = None,
        dtype: torch.dtype | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        """Without ``dense`` labels count; ``dtype`` is that of the passes, see :class:`ForwardPasses`.

        With ``checkpoint_activations`` blocks run again in backward passes and keep their inputs alone.
        """
        self._checkpointed = decoder.blocks if checkpoint_activations else []
        self._model, self._decoder, self._batch_size = model, decoder, batch_size
        self._dense, self._dtype = dense, dtype
        # Of batches the dense model's logits, where they take little: it computes them once.
        self._wanted: WeakKeyDictionary[Calibration, dict[tuple[int, int], Logits]] = WeakKeyDictionary()
        self._device = model.get_input_embeddings().weight.device
        self._forward = ForwardPasses(model, self._device, dtype)

    def mean(self, windows: Calibration) -> float:
        """Mean loss of ``windows``, nats per token.

        Raises:
            NumericalError: it is NaN or infinite.
        """
        if self._dense is None:
            return mean_loss(self._model, windows, self._batch_size, self._dtype)
        with torch.no_grad(), evaluation_mode(self._model), fused_pointwise(self._model):
            sums = []
            for loss, logits in self._losses(windows, self._batch_size):
                sums.append(loss)
                del logits
        mean = windows.ranks.total(sum(to_list(sums))) / self._count(windows)
        if not math.isfinite(mean):
            raise NumericalError("NaN or infinity in the divergence from the dense model")
        return mean

    def gradients(self, windows: Calibration) -> dict[str, Tensor]:
        """``∇[W | b]`` ``[R, C']`` of the mean loss for every linear by name, float32 (float64 of float64 models).

        Weights that need gradients keep their inputs: half as many windows are computed at once.

        Raises:
            NumericalError: a gradient is NaN or infinite; the message names the layer.
        """
        linears = self._decoder.linears
        parameters = [p for linear in linears for p in linear.module.parameters(recurse=False)]
        with (
            frozen(self._model),
            evaluation_mode(self._model),
            fused_pointwise(self._model),
            checkpointed(self._checkpointed),
            repeatable(),
            _summed(parameters) as sums,
            torch.enable_grad(),
        ):
            for _, logits in self._losses(windows, max(1, self._batch_size // 2), with_gradient=True):
                logits.source.backward(logits.gradient)
                del logits
        for total in sums.values():
            windows.ranks.sum_(total)
        count = self._count(windows)
        found = {linear.name: _matrix(linear, sums).div_(count) for linear in linears}
        finite = to_list([gradient.sum().isfinite() for gradient in found.values()])
        for name, good in zip(found, finite, strict=True):
            if not good:
                raise NumericalError(f"NaN or infinity in the gradient of {name}")
        return found

    def _losses(
        self, windows: Calibration, batch_size: int, *, with_gradient: bool = False
    ) -> Iterator[tuple[Tensor, Logits]]:
        """Sum of the token losses of every batch, and the logits with its gradient."""
        for index, (ids, mask) in enumerate(windows.batches(batch_size, self._device)):
            wanted = None if self._dense is None else self._wanted_logits(windows, (batch_size, index), ids, mask)
            logits = self._forward.logits(ids, mask, with_gradient=with_gradient)
            loss = next_token_loss(logits, ids, mask) if wanted is None else divergence(logits, wanted, mask)
            del wanted
            yield loss, logits
            del logits  # before the next batch's are made

    def _wanted_logits(
        self, windows: Calibration, batch: tuple[int, int], input_ids: Tensor, mask: Tensor | None
    ) -> Logits:
        """Logits of the dense model."""
        assert self._dense is not None
        kept = self._wanted.setdefault(windows, {})
        if batch in kept:
            return kept[batch]
        with self._dense.in_place(), torch.no_grad():
            wanted = self._forward.logits(input_ids, mask)
        if self._forward.compact:
            kept[batch] = wanted
        return wanted

    def _count(self, windows: Calibration) -> int:
        """Tokens that have a loss: those that precede another, or all real ones."""
        tokens, targets = count_tokens(self._model, windows)
        return targets if self._dense is None else tokens


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
