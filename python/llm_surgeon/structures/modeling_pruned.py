"""Causal language models whose decoder blocks differ in size. This file travels with the checkpoints that need it.

``PrunedLlamaForCausalLM`` (any ``Pruned<class of transformers>``) is the stock class with every block built from its
own configuration, ``config.per_layer_config[i]``. Where a block's class cannot say its sizes in a configuration,
``config.pruned_modules`` holds the shapes of its linears and the sizes its modules are told.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

_PREFIX = "Pruned"


class _PrunedMixin:
    is_pruned = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        plain = copy.copy(config)
        plain.__dict__.pop("_heterogeneity_spec", None)
        super().__init__(plain, *args, **kwargs)  # type: ignore[call-arg]
        # What the stock constructor resolves (the attention implementation, for one).
        config.__dict__.update({key: value for key, value in vars(plain).items() if key.startswith("_attn")})
        blocks = self.get_submodule(config.pruned_blocks)  # type: ignore[attr-defined]
        for depth, block in enumerate(blocks):
            smaller = config.per_layer_config[depth]
            takes_depth = len(inspect.signature(type(block).__init__).parameters) > 2
            blocks[depth] = type(block)(smaller, depth) if takes_depth else type(block)(smaller)
            resize_block(blocks[depth], config.pruned_modules.get(str(depth), {}))
        for module in self.modules():  # type: ignore[attr-defined]
            if getattr(module, "config", None) is plain:
                module.config = config

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            if hasattr(module, "config") and module.config is not self.config:  # type: ignore[attr-defined]
                chosen = {key: value for key, value in vars(self.config).items() if key.startswith("_attn")}  # type: ignore[attr-defined]
                module.config.__dict__.update(chosen)


def resize_block(block: nn.Module, changes: dict[str, Any]) -> None:
    """Give linears the shapes ``[rows, columns]``, and modules the attributes, that ``changes`` names."""
    for path, value in changes.items():
        if isinstance(value, list):
            rows, columns = value
            old = block.get_submodule(path)
            conv, bias = isinstance(old, Conv1D), old.bias is not None
            block.set_submodule(path, Conv1D(rows, columns) if conv else nn.Linear(columns, rows, bias=bias))
        else:
            module, _, attribute = path.rpartition(".")
            setattr(block.get_submodule(module), attribute, value)


def __getattr__(name: str) -> Any:
    if not name.startswith(_PREFIX) or not hasattr(transformers, name.removeprefix(_PREFIX)):
        raise AttributeError(name)
    stock = getattr(transformers, name.removeprefix(_PREFIX))
    globals()[name] = type(name, (_PrunedMixin, stock), {"__module__": __name__, "__doc__": __doc__})
    return globals()[name]
