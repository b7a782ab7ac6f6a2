"""Ranks on torch.distributed: NCCL between GPUs, gloo between CPUs, started by ``torchrun`` or accelerate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_map_only

from llm_surgeon.distributed.ranks import ALONE, R, Ranks, T, launched
from llm_surgeon.errors import InputError, RankError

# A rank that waits for the work of another one is not lost: launchers notice those that are.
_TIMEOUT = timedelta(hours=6)

# What is at fault on this rank itself; not every supported PyTorch has the second.
_OWN_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class Group(Ranks):
    """The ranks of torch.distributed's default process group, whose tensors are exchanged by way of ``device``."""

    device: torch.device

    def __init__(self, device: torch.device) -> None:
        self.device, self.index, self.count = device, dist.get_rank(), dist.get_world_size()
        self.on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))

    def meet(self) -> None:
        self.total(0.0)  # in main memory, as NCCL would wait for a rank that is gone

    def sum_(self, tensor: Tensor, owner: int | None = None) -> Tensor:
        def add(wire: Tensor) -> None:
            if owner is None:
                dist.all_reduce(wire)
            else:
                dist.reduce(wire, owner)

        return self._exchange(tensor, add, receives=owner in (None, self.index))

    def broadcast_(self, tensor: Tensor, owner: int = 0) -> Tensor:
        def send(wire: Tensor) -> None:
            dist.broadcast(wire.view(-1).view(torch.uint8), owner)  # bytes: not every backend knows every dtype

        return self._exchange(tensor, send, receives=owner != self.index)

    def total(self, value: float) -> float:
        return float(self._of_numbers(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.SUM))

    def least(self, value: int) -> int:
        return int(self._of_numbers(torch.tensor(value), dist.ReduceOp.MIN))

    def agreed(self, value: T) -> T:
        found = [value]
        with _heard():
            dist.broadcast_object_list(found, 0)
        return found[0]

    def everyones(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        with _heard():
            dist.all_gather_object(found, value)
        return found

    def spread(self, items: Iterable[T], owner: Callable[[T], int], function: Callable[[T], R]) -> Iterator[R]:
        every = list(items)
        owners = [owner(item) for item in every]
        own = [function(item) for item, its in zip(every, owners, strict=True) if its == self.index]
        described = self.everyones(tree_map_only(Tensor, _Described.of, own))
        described[self.index] = own
        turns = [iter(results) for results in described]
        for its in owners:
            result = tree_map_only(_Described, self._room, next(turns[its]))
            yield tree_map_only(Tensor, partial(self.broadcast_, owner=its), result)

    def _room(self, described: _Described) -> Tensor:
        return torch.empty(described.shape, dtype=described.dtype, device=self.device)

    def _exchange(self, tensor: Tensor, operation: Callable[[Tensor], None], *, receives: bool) -> Tensor:
        """``operation`` on ``tensor``, or where it lies elsewhere or with gaps on a copy, which is then copied back."""
        wire = tensor.detach().to(self.device).contiguous()
        if wire.numel():
            with _heard():
                operation(wire)
        if receives and wire.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(wire)
        elif receives:
            increment_version(tensor)  # so that copies of it from before are known to be old
        return tensor

    def _of_numbers(self, numbers: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        with _heard():
            dist.all_reduce(numbers, operation)  # of a tensor in main memory: by gloo
        return numbers


@dataclass(frozen=True)
class _Described:
    """Shape and dtype of a tensor that another rank has."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Described:
        return cls(tuple(tensor.shape), tensor.dtype)


@contextmanager
def _heard() -> Iterator[None]:
    """Context manager in which a rank that does not answer is a :class:`RankError`."""
    try:
        yield
    except _OWN_ERRORS:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RankError(f"another process of the run has ended, and the run with it ({reason})") from error


@contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """Context manager of the ranks that a launcher started (``WORLD_SIZE``, ``RANK``, ``LOCAL_RANK``), else of one.

    What is raised on several ranks is told by one: others' exceptions have the attribute ``told``.

    Args:
        device: ``"cpu"``, ``"cuda"`` (of a machine's ranks each takes one) or, left out, a GPU where there is one.

    Raises:
        InputError: there is no GPU for this rank, or ``device`` names one of several.
    """
    if not launched():
        yield ALONE
        return
    place = _device(device)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    store, rank, count = next(dist.rendezvous("env://"))
    dist.init_process_group(
        backend, store=dist.PrefixStore("ranks", store), rank=rank, world_size=count, timeout=_TIMEOUT,
        device_id=place if place.type == "cuda" else None,
    )  # fmt: skip
    try:
        group = Group(place)
        yield group
        group.meet()
    except BaseException as error:
        told = False
        with suppress(Exception):  # the process that kept the store may have gone
            told = store.add("failed", 1) > 1
        error.told = told  # type: ignore[attr-defined]
        raise
    else:
        dist.destroy_process_group()


def _device(name: str | None) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name is not None and name not in ("cpu", "cuda"):
        raise InputError(
            f"device {name!r} means nothing to several processes, of which each takes a GPU: give cuda or cpu"
        )
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise InputError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
