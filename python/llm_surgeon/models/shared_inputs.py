"""Which modules of a model read the same input, one after the other, as q, k and v do, or gate and up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # it would bring transformers' models, which bring this: see _registration.py
    from transformers import PreTrainedModel

Module = TypeVar("Module", bound=nn.Module)


def shared_inputs(model: PreTrainedModel, modules: Iterable[Module]) -> list[list[Module]]:
    """``modules`` in the order of a forward pass over two tokens, those together that one tensor goes to in turn.

    A module that is called twice stands there twice; one that is not called, nowhere.
    """
    groups: list[list[Module]] = []
    inputs: list[Tensor] = []  # kept alive, so that no two have one address

    def note(module: Module, arguments: tuple[Tensor, ...]) -> None:
        if not inputs or arguments[0] is not inputs[-1]:
            groups.append([])
        inputs.append(arguments[0])
        groups[-1].append(module)

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return groups
