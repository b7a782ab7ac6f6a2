"""A model as it was, to come back to when what is done to it fails or is interrupted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from llm_surgeon.interrupts import uninterrupted
from llm_surgeon.models.offload import copies_in_main_memory


class ModelState:
    """Snapshot of ``model``: modules, their classes, attributes, hooks and flags, configurations, places of tensors.

    Nothing is copied but dictionaries, lists and sets: values of weights that are written in place come back only where
    :meth:`copy_weights` was called before. With the model goes torch's grad mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._grad_mode = torch.is_grad_enabled()
        owners: dict[int, Any] = {}
        for module in model.modules():
            _collect(module, owners)
        self._owners = [(owner, type(owner), dict(vars(owner))) for owner in owners.values()]
        # Hooks, parameters, buffers and children lie in containers that stay the same.
        held = [value for owner in owners.values() for value in vars(owner).values()]
        self._containers = [(value, value.copy()) for value in held if type(value) in _CONTAINERS]
        self._tensors = [_TensorState(tensor) for tensor in (*model.parameters(), *model.buffers())]
        self._copied: list[Tensor] = []
        self._copies: Future[list[Tensor]] | None = None

    def copy_weights(self, parameters: Iterable[Tensor], *, at_once: bool) -> Callable[[], object]:
        """Begin to copy weights to main memory, where :meth:`restore` takes them from.

        Returns:
            What waits until that is done: call it before any weight is changed. With ``at_once`` it is done already.
        """
        self._copied = list(parameters)
        executor = ThreadPoolExecutor(1)
        self._copies = executor.submit(copies_in_main_memory, [parameter.detach() for parameter in self._copied])
        executor.shutdown(wait=False)
        if at_once:
            self._copies.result()
        return self._copies.result

    def restore(self) -> None:
        """Make the model what it was; an interrupt meanwhile is raised once that is done."""
        uninterrupted(self._restore)

    def restore_around_weights(self) -> None:
        """The same, but for what parameters and buffers hold, which was changed on purpose."""
        uninterrupted(partial(self._restore, tensors=False))

    def _restore(self, tensors: bool = True) -> None:
        for owner, cls, attributes in self._owners:
            vars(owner).clear()
            vars(owner).update(attributes)
            owner.__class__ = cls
        for container, content in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        with torch.no_grad():
            for tensor in self._tensors:
                tensor.restore(data=tensors)
            # Where copying failed, nothing has been written.
            if tensors and self._copies is not None and self._copies.exception() is None:
                for parameter, original in zip(self._copied, self._copies.result(), strict=True):
                    parameter.data.copy_(original)
        torch.set_grad_enabled(self._grad_mode)


class _TensorState:
    """Storage, device, gradient and hooks of a parameter or buffer."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._device, self._requires_grad = tensor, tensor.device, tensor.requires_grad
        # On a GPU this would hold the memory that offloading is to free.
        self._data = tensor.data if tensor.device.type == "cpu" else None
        self._grad = tensor.grad if tensor.is_leaf else None
        self._hooks = dict(tensor._post_accumulate_grad_hooks or {})

    def restore(self, data: bool) -> None:
        tensor = self._tensor
        if data and self._data is not None:
            tensor.data = self._data
        elif data and tensor.device != self._device:
            tensor.data = tensor.data.to(self._device)
        if tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        if tensor.is_leaf and tensor.grad is not self._grad:
            tensor.grad = self._grad
        hooks = tensor._post_accumulate_grad_hooks
        if hooks is not None:
            hooks.clear()
            hooks.update(self._hooks)


_CONTAINERS = (dict, OrderedDict, set, list)


def _collect(owner: Any, found: dict[int, Any]) -> None:
    """Add ``owner`` and the configurations that it holds, theirs included, by their identity."""
    if id(owner) in found:
        return
    found[id(owner)] = owner
    for value in vars(owner).values():
        if isinstance(value, (PreTrainedConfig, GenerationConfig)):
            _collect(value, found)
