"""The zeros of a pruned model, kept through training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from llm_surgeon.errors import NumericalError
from llm_surgeon.models.decoder import Decoder


def zero_masks(decoder: Decoder) -> dict[nn.Module, Tensor]:
    """Linear layer -> bool mask in the shape of its weight, True where the weight is zero; only layers with zeros."""
    masks = {linear.module: weight_of(linear.module) == 0 for linear in decoder.linears}
    return {module: mask for module, mask in masks.items() if bool(mask.any())}


@contextmanager
def zeros_kept(masks: dict[nn.Module, Tensor], model: nn.Module) -> Iterator[nn.Module]:
    """Inside, gradients of ``model``'s zero weights are zero; yields the model.

    AdamW then leaves these weights exactly zero: its moments stay zero, and decay multiplies.
    """

    def silence(weight: Tensor, mask: Tensor) -> None:
        assert weight.grad is not None
        weight.grad.masked_fill_(mask, 0.0)

    hooks = [
        weight_of(module).register_post_accumulate_grad_hook(partial(silence, mask=mask))
        for module, mask in masks.items()
        if weight_of(module).requires_grad
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def check_zeros(masks: dict[nn.Module, Tensor]) -> None:
    """Raise :class:`NumericalError` if a weight that was zero is not any more."""
    for module, mask in masks.items():
        if bool((weight_of(module).detach()[mask] != 0).any()):
            raise NumericalError(f"training moved pruned weights of {module}: its zeros are lost")


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a linear layer."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def count_zeros(masks: dict[nn.Module, Tensor]) -> int:
    return int(torch.stack([mask.sum() for mask in masks.values()]).sum()) if masks else 0
