"""Ranks: the processes of a run as one of them sees them. A run in one process is a run of one rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


class Ranks:
    """The ranks of a run, of which this process is one; an object of this class is the only one, with none to talk to.

    All ranks hold the same model and the same windows, make the same calls in the same order, and come out with the
    same values: of sums, and of what one of them computed. :class:`~llm_surgeon.distributed.group.Group` has several.

    Attributes:
        index: of this rank; rank 0 alone writes and tells.
        count: of all.
        on_machine: how many of them share this one's main memory.
        device: that the rank was given to compute on; ``None``: any.
    """

    index, count, on_machine = 0, 1, 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """True on rank 0."""
        return self.index == 0

    def meet(self) -> None:
        """Wait until all ranks have come here."""

    def share(self, items: int) -> slice:
        """Those of ``items`` that this rank goes through: the same for the same number, none where there are few."""
        return slice(items * self.index // self.count, items * (self.index + 1) // self.count)

    def sum_(self, tensor: Tensor, owner: int | None = None) -> Tensor:
        """Add up the tensors of all ranks in place: on every rank, or on ``owner``, others' being of any value then."""
        return tensor

    def broadcast_(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """Give ``tensor`` the values that it has on ``owner``, bit for bit."""
        return tensor

    def total(self, value: float) -> float:
        """Sum of a number of every rank, in double precision."""
        return value

    def least(self, value: int) -> int:
        """Smallest of a number of every rank."""
        return value

    def agreed(self, value: T) -> T:
        """The value that rank 0 has: of what is measured (time, memory) and decides what follows."""
        return value

    def everyones(self, value: T) -> list[T]:
        """The values of all ranks, in order."""
        return [value]

    def spread(self, items: Iterable[T], owner: Callable[[T], int], function: Callable[[T], R]) -> Iterator[R]:
        """``function`` of every item, called on the rank ``owner(item)`` alone; yields the results on every rank.

        A rank calls it for its items before the first result: what they leave besides results is its own until then.

        Results are tensors, numbers and text, and tuples, lists and dictionaries of these. Tensors that come from
        another rank are on this one's device.
        """
        return (function(item) for item in items)


class PlannedRanks(Ranks):
    """So many ranks that a run is planned for, none of which is there: nothing can be exchanged."""

    def __init__(self, count: int) -> None:
        self.count = count


ALONE = Ranks()


def launched() -> bool:
    """True where a launcher (``torchrun``, ``accelerate launch``) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ
