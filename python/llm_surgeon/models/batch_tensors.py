"""Tensors of batches between their turns: on the device, or in pinned main memory until a batch ahead of their use."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from llm_surgeon.models.offload import PinnedMemory, Prefetcher


class BatchTensors:
    """Values by batch and key: tensors, or tuples, lists and dictionaries that hold some.

    Without ``memory`` they are kept as they are. With it they are copied there, to be on ``device`` at their batch's
    turn: those of the next batch come while one is at work.
    """

    def __init__(self, device: torch.device, memory: PinnedMemory | None = None) -> None:
        self._held: list[dict[Hashable, Any]] = []
        self._memory, self._prefetcher = memory, Prefetcher(device)

    def put(self, batch: int, key: Hashable, value: Any) -> None:
        """Keep ``value``, which must not be written to any more, in place of the one before; new batches in order."""
        if batch == len(self._held):
            self._held.append({})
        self.drop(batch, key)
        self._held[batch][key] = value if self._memory is None else tree_map_only(Tensor, self._away, value)

    def drop(self, batch: int, key: Hashable) -> None:
        """Let go of a value, if there is one."""
        value = self._held[batch].pop(key, None)
        if self._memory is not None:
            tree_map_only(Tensor, self._free, value)

    def drop_all(self, key: Hashable) -> None:
        """Let go of a value of every batch."""
        for batch in range(len(self._held)):
            self.drop(batch, key)

    def turns(self, *keys: Hashable) -> Iterator[dict[Hashable, Any]]:
        """Of every batch in turn the values of those of ``keys`` that it has; others are not touched meanwhile."""
        this = object()  # turns of its own
        for batch in range(len(self._held)):
            if self._memory is None:
                yield {key: self._held[batch][key] for key in keys if key in self._held[batch]}
                continue
            leaves, spec = self._wanted(batch, keys)
            copies = iter(self._prefetcher.take((this, batch), _tensors(leaves)))
            if batch + 1 < len(self._held):
                self._prefetcher.start((this, batch + 1), _tensors(self._wanted(batch + 1, keys)[0]))
            yield tree_unflatten([next(copies) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def _wanted(self, batch: int, keys: tuple[Hashable, ...]) -> tuple[list[Any], Any]:
        return tree_flatten({key: self._held[batch][key] for key in keys if key in self._held[batch]})

    def _away(self, tensor: Tensor) -> Tensor:
        assert self._memory is not None
        if not tensor.numel():  # no memory, no address
            return tensor
        return self._prefetcher.fetch_back(tensor, self._memory.empty(tensor.shape, tensor.dtype))

    def _free(self, tensor: Tensor) -> None:
        assert self._memory is not None
        if tensor.numel():
            self._memory.free(tensor)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
