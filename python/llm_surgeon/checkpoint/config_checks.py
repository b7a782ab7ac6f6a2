"""Checks of a configuration against the weights beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llm_surgeon.checkpoint.folder import json_values
from llm_surgeon.errors import InputError, UnsupportedModelError
from llm_surgeon.formats.packed_2_4 import QUANT_METHOD
from llm_surgeon.formats.safetensors_headers import StoredTensor

# Names of numbers of blocks: num_hidden_layers, n_layer, num_layers, num_nextn_predict_layers, num_blocks …
_BLOCKS = re.compile(r"(.*_)?n(um)?_(.*_)?(layers?|blocks)")
_WEIGHTS_NAMED = ("transformers_weights",)  # another file than those that are checked


def is_packed(name: str, config: Mapping[str, Any]) -> bool:
    """True for the configuration of a packed model; :class:`UnsupportedModelError` where it is quantized."""
    entries = [value for _, key, value in json_values(config) if key == "quantization_config" and value is not None]
    if not entries:
        return False
    top = config.get("quantization_config")
    if len(entries) > 1 or not isinstance(top, dict) or top.get("quant_method") != QUANT_METHOD:
        raise UnsupportedModelError(f"model {name!r} is quantized: take the checkpoint it was made from")
    return True


def check_config(name: str, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """Raise :class:`InputError` for sizes that the model could not be built with, before that is tried for hours."""
    for _, key, value in json_values(config):
        if key in _WEIGHTS_NAMED:
            raise InputError(f"the configuration of model {name!r} names weights files of its own ({value!r})")
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if not -(2**63) <= value < 2**63:
            raise InputError(f"the configuration of model {name!r} holds an integer of more than 64 bits: {key}")
        if _BLOCKS.fullmatch(key) and value > len(stored):
            raise InputError(
                f"the configuration of model {name!r} says {key} {value}, and its files hold {len(stored)} tensors"
            )
