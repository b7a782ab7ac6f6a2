"""Wrappers around a model, or around its parts: taken off, or refused by name."""

# Without transformers, which loads packed models with the help of what imports this.
from __future__ import annotations

from typing import Any

from torch import nn

from llm_surgeon.errors import UnsupportedModelError

# Refused inside a model, by name: their modules take long to import.
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def unwrapped(model: nn.Module) -> Any:
    """The model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, which share its weights."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # of a compiled module, whose class takes long to import
            model = model.get_submodule("_orig_mod")
        else:
            return model


def check_bare(model: Any) -> None:
    """Raise :class:`UnsupportedModelError` where what is given is no model of transformers, or its parts are wrapped.

    Wrappers of the whole model are taken off before, by :func:`unwrapped`.
    """
    for name, module in model.named_modules():
        place, kind = name or "the model", type(module).__name__
        if kind in _WRAPPERS:
            raise UnsupportedModelError(f"{place} is wrapped in a {kind}: take the module out, and wrap what is made")
        if "base_layer" in module._modules or hasattr(module, "get_base_model"):
            raise UnsupportedModelError(f"{place} holds an adapter: merge it first (peft's merge_and_unload)")
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise UnsupportedModelError(f"{type(model).__name__} is no model of transformers: load a causal language model")
