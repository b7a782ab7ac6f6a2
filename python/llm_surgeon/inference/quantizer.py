"""Packed models in ``AutoModelForCausalLM.from_pretrained``: transformers' interface for quantized models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantizer

from llm_surgeon.errors import InputError
from llm_surgeon.formats.packed_2_4 import QUANT_METHOD, Surgeon24Config, check_sha256, check_stored
from llm_surgeon.formats.packed_linear import PackedLinear
from llm_surgeon.formats.safetensors_headers import read_headers
from llm_surgeon.inference.pack import matrix_of, packed_linears, unpack_model
from surgeon_kernels import check_packed_2_4

if TYPE_CHECKING:  # it would bring transformers' models, which bring this: see _registration.py
    from transformers import PreTrainedModel


@register_quantizer(QUANT_METHOD)
class Surgeon24Quantizer(HfQuantizer):
    """Puts :class:`PackedLinear` layers into a model before its weights are read, and checks what was read."""

    requires_calibration = True  # a dense model becomes a packed one by `surgeon pack`, not while it loads
    quantization_config: Surgeon24Config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        stored = None if checkpoint_files is None else read_headers(checkpoint_files)
        # Saved again, in another dtype perhaps, the tensors would not be those that these were made from.
        sha256 = self.quantization_config.__dict__.pop("sha256", None)
        for name in self.quantization_config.modules:
            place, linear = _find(model, name)
            if linear is None:
                continue
            weight = matrix_of(linear)
            R, C = weight.shape
            if stored is not None:
                check_stored(stored, name, R, C)
            packed = PackedLinear(C, R, linear.bias is not None, device="meta", dtype=weight.dtype)
            packed.replaces = type(linear)
            model.set_submodule(place, packed)
        if checkpoint_files is not None:
            check_sha256(sha256, checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, module in packed_linears(model):
            assert module.values is not None
            module.values.requires_grad_(False)
            if module.values.is_meta:  # in main memory or on disk, to be fetched for each pass
                module.streamed = True
                continue
            try:
                check_packed_2_4(module.packed)
            except (TypeError, ValueError) as error:
                raise InputError(f"the packed weight of {name} is damaged: {error}") from error
            module.prepare()

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """``model.dequantize()``: the dense model, in its own dtype unless told otherwise."""
        unpack_model(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _find(model: PreTrainedModel, name: str) -> tuple[str, nn.Module | None]:
    """Place and layer of the module that a causal LM calls ``name``; none where ``model`` is its trunk without it."""
    trunk = f"{model.base_model_prefix}."
    inside = name.removeprefix(trunk)
    for place in (name, inside):
        try:
            linear = model.get_submodule(place)
        except AttributeError:
            continue
        if type(linear) not in (nn.Linear, Conv1D):
            raise InputError(f"{name} is listed as packed, and it is a {type(linear).__name__} in the model")
        return place, linear
    if inside == name and model.base_model is model:
        return name, None
    raise InputError(f"{name} is listed as packed, and the model has no such layer")
