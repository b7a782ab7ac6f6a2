"""Passes through a model: frozen, in evaluation mode, from where gradients flow, and the mean loss of some data."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_surgeon.config.prune import ComputeDtype
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import BadBatchError, NumericalError
from llm_surgeon.interrupts import uninterrupted
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.head import HeadLogits, left_out, plain_head
from llm_surgeon.models.loss import Logits, WholeLogits, count_tokens, next_token_loss


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: ``model.eval()``; every module's own ``training`` flag is restored on exit."""
    training = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, flag in training:
            module.training = flag

    try:
        model.eval()
        yield
    finally:
        uninterrupted(restore)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Context manager: no parameter requires a gradient; each one's own flag is restored on exit."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    try:
        model.requires_grad_(False)
        yield
    finally:
        uninterrupted(restore)


@contextlib.contextmanager
def starting_at(start: nn.Module) -> Iterator[None]:
    """Context manager: gradients flow from what embeddings ``start`` return, or a block ``start`` is given, on."""

    def require_gradient(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (args[0] if args else kwargs["hidden_states"]).requires_grad_()

    if isinstance(start, nn.Embedding):
        # A copy: some models scale it in place, which autograd does not allow of a leaf.
        handle = start.register_forward_hook(lambda _, args, y: y.requires_grad_().clone())
    else:
        handle = start.register_forward_pre_hook(require_gradient, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Context manager in which blocks keep their inputs alone; the backward pass computes other activations again."""
    own = [block.__dict__.get("forward") for block in blocks]  # normally none: the class's
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def run_model(module: nn.Module, input_ids: Tensor, mask: Tensor | None) -> Any:
    """One pass without cache of a causal LM or its base model, positions counted from each first real token."""
    positions = {}
    # peft's wrapper takes anything and passes it on: the model inside tells what it takes.
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # type: ignore[operator]
    if mask is not None and "position_ids" in inspect.signature(inner.forward).parameters:
        positions["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return module(input_ids=input_ids, attention_mask=mask, use_cache=False, **positions)


def compute_dtype(choice: ComputeDtype, model: nn.Module, device: torch.device) -> torch.dtype | None:
    """Dtype that passes through a float32 model multiply in, by autocast; None for that of the model.

    bfloat16 where ``choice`` is ``"bfloat16"``, or ``"auto"`` on a GPU whose tensor cores know it.
    """
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return None
    return dtype_of_products(device) if choice == "auto" else torch.bfloat16 if choice == "bfloat16" else None


def dtype_of_products(device: torch.device) -> torch.dtype | None:
    """Dtype that float32 weights are multiplied in: bfloat16 on a GPU with tensor cores for it, None for their own."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    """Autocast to ``dtype``, if there is one, without its cache: inside a context of a caller's, in which it lives on,
    it would go on giving weights as they were before an update.
    """
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


class ForwardPasses:
    """Forward passes of a causal LM that end in logits.

    With a ``dtype`` under autocast: linears and attention multiply in it, the residual stream stays in float32. So do
    the logits where the model's head allows to compute them chunk by chunk; elsewhere they are rounded to it. The head
    is taken as it is at first.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._head = None if dtype is None else plain_head(model)
        self._weight = None if self._head is None else self._head.weight.detach().to(dtype)

    @property
    def compact(self) -> bool:
        """True where logits are computed chunk by chunk, and only hidden states are held."""
        return self._head is not None

    def logits(self, input_ids: Tensor, mask: Tensor | None, *, with_gradient: bool = False) -> Logits:
        """Logits of a batch, with room for their gradient where it is wanted."""
        if self._dtype is None:
            return WholeLogits(run_model(self._model, input_ids, mask).logits, with_gradient=with_gradient)
        with autocast(self._device, self._dtype):
            if self._head is None or self._weight is None:
                return WholeLogits(run_model(self._model, input_ids, mask).logits, with_gradient=with_gradient)
            with left_out(self._head):
                hidden = run_model(self._model, input_ids, mask).logits
        return HeadLogits(hidden, self._weight, self._head.bias, with_gradient=with_gradient)


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, calibration: Calibration, batch_size: int, dtype: torch.dtype | None = None
) -> float:
    """Mean cross-entropy of the data's tokens under the model, nats per token, by forward passes alone.

    Args:
        dtype: of the passes, see :class:`ForwardPasses`.

    Raises:
        InputError: as :func:`estimate_curvature`.
        BadBatchError: the loss is NaN or infinite; the message names the first such batch.
    """
    _, targets = count_tokens(model, calibration)
    device = model.get_input_embeddings().weight.device
    losses = []
    with evaluation_mode(model), fused_pointwise(model):
        forward = ForwardPasses(model, device, dtype)
        for input_ids, mask in calibration.batches(batch_size, device):
            losses.append(next_token_loss(forward.logits(input_ids, mask), input_ids, mask))
    sums = to_list(losses)
    total = calibration.ranks.total(sum(sums))
    if not math.isfinite(total):  # on every rank: none goes on alone
        for batch, (part, value) in enumerate(zip(calibration.parts(batch_size), sums, strict=True), 1):
            if not math.isfinite(value):
                raise BadBatchError("the loss", batch, len(sums), range(part.start, part.stop))
        raise NumericalError("NaN or infinity in the loss of another process's windows")
    return total / targets


def to_list(scalars: list[Tensor]) -> list:
    """The values of one-element tensors, on any devices, with one host synchronization."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist() if scalars else []
