"""Causal language models whose decoder blocks differ in size. This file travels with the checkpoints that need it.

``PrunedLlamaForCausalLM`` (any ``Pruned<class of transformers>``) is the stock class with every block built from its
own configuration, ``config.per_layer_config[i]``. Where a block's class cannot say its sizes in a configuration,
``config.pruned_modules`` holds the shapes of its linears and the sizes its modules are told. Linears that have lost
their zero rows and columns are a :class:`CompactLinear`.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

_PREFIX = "Pruned"


class CompactLinear(nn.Module):
    """``y = (W' a[column_index] + b')[row_index]``: ``W a + b`` for a ``W`` ``[out, in]`` with zero rows and columns.

    ``weight`` W' is ``[rows, columns]``, the part that is left. With fewer rows than outputs it has a zero row, which
    ``row_index`` ``[out]`` names for every row that is gone: outputs are gathered, not scattered into zeros.
    """

    row_index: torch.Tensor
    column_index: torch.Tensor

    def __init__(self, rows: int, columns: int, out_features: int, in_features: int, bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        self.register_buffer("row_index", torch.zeros(out_features, dtype=torch.int64))
        self.register_buffer("column_index", torch.zeros(columns, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.weight.shape
        if columns < self.in_features:
            x = x.index_select(-1, self.column_index)
        y = nn.functional.linear(x, self.weight, self.bias)
        return y.index_select(-1, self.row_index) if rows < self.out_features else y


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
        own: Any = self.config  # type: ignore[attr-defined]
        for module in self.modules():  # type: ignore[attr-defined]
            if hasattr(module, "config") and module.config is not own:
                module.config.__dict__.update(
                    {key: value for key, value in vars(own).items() if key.startswith("_attn")}
                )


def resize_block(block: nn.Module, changes: dict[str, Any]) -> None:
    """Give linears the shapes ``[rows, columns]``, and modules the attributes, that ``changes`` names.

    ``[rows, columns, out, in]`` makes a :class:`CompactLinear`.
    """
    for path, value in changes.items():
        if isinstance(value, list):
            rows, columns, *full = value
            old = block.get_submodule(path)
            conv, bias = isinstance(old, Conv1D), old.bias is not None
            if full:
                block.set_submodule(path, CompactLinear(rows, columns, full[0], full[1], bias))
                continue
            block.set_submodule(path, Conv1D(rows, columns) if conv else nn.Linear(columns, rows, bias=bias))
        else:
            module, _, attribute = path.rpartition(".")
            if not isinstance(value, (int, float)):  # such as the scale of attention's scores
                raise ValueError(f"{path} of a block is a number, not {value!r}")
            setattr(block.get_submodule(module), attribute, value)


def __getattr__(name: str) -> Any:
    if not name.startswith(_PREFIX) or not hasattr(transformers, name.removeprefix(_PREFIX)):
        raise AttributeError(name)
    stock = getattr(transformers, name.removeprefix(_PREFIX))
    globals()[name] = type(name, (_PrunedMixin, stock), {"__module__": __name__, "__doc__": __doc__})
    return globals()[name]
