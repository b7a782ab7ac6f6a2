"""Low-rank corrections (LoRA, through peft) whose product is masked, so that absorbing them keeps every zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_surgeon.models.decoder import Decoder
from llm_surgeon.recovery.zeros import weight_of


class MaskedLoraLinear(lora.Linear):
    """``y = (W + M ∘ (s B A)) x + b``, M the pattern of W's nonzero weights.

    Training sees the very weight that absorbing the correction will leave; correcting with the dense ``s B A`` and
    zeroing afterwards would not be what was trained. A weight without zeros takes peft's own, cheaper way.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        options["is_target_conv_1d_layer"] = isinstance(base_layer, Conv1D)
        super().__init__(base_layer, adapter_name, **options)
        zero = weight_of(base_layer).detach() == 0
        self._kept = None if not bool(zero.any()) else ~zero

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = super().get_delta_weight(adapter)
        return delta if self._kept is None else delta * self._kept

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if self._kept is None or self.merged or self.disable_adapters:
            return super().forward(x, *arguments, **options)
        (adapter,) = self.active_adapters
        delta = self.get_delta_weight(adapter)
        weight: Tensor = weight_of(self.base_layer)
        bias, dropped = self.base_layer.bias, self.lora_dropout[adapter](x)
        assert bias is None or isinstance(bias, Tensor)
        if self.fan_in_fan_out:  # Conv1D keeps its weight transposed
            weight, delta = weight.T, delta.T
        # The correction is trained in float32; beside a weight of 16 bits it is rounded as absorbing it will round it.
        if dropped is x:
            return F.linear(x, (weight + delta).to(weight.dtype), bias)
        return F.linear(x, weight, bias) + F.linear(dropped, delta.to(weight.dtype))


@contextmanager
def low_rank_corrections(
    model: nn.Module, decoder: Decoder, rank: int, alpha: float, dropout: float, seed: int = 0
) -> Iterator[nn.Module]:
    """Inside, every linear of ``decoder`` has a trainable correction and nothing else of ``model`` is trained.

    Yields the model to train. After a block that ends well the corrections are absorbed into the weights, after one
    that raises they are dropped; in both cases the model has its own modules and trainable parameters again.
    """
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=[linear.name for linear in decoder.linears],
        fan_in_fan_out=isinstance(decoder.linears[0].module, Conv1D),
    )
    config._register_custom_module({nn.Linear: MaskedLoraLinear, Conv1D: MaskedLoraLinear})
    torch.manual_seed(seed)  # A starts at random (and B at zero)
    corrected = peft.get_peft_model(model, config)
    finish = corrected.unload
    try:
        yield corrected
        finish = corrected.merge_and_unload
    finally:
        finish()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
