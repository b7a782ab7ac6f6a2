"""The dense model beside the one that is pruned: copies of its linears' parameters, in place of these for a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from llm_surgeon.interrupts import uninterrupted
from llm_surgeon.models.decoder import Decoder


class DenseWeights:
    """Copies of the parameters of all linears of ``decoder``, as they are when this is made, where they are."""

    def __init__(self, decoder: Decoder) -> None:
        self._parameters = [p for linear in decoder.linears for p in linear.module.parameters(recurse=False)]
        self._copies = [p.detach().clone() for p in self._parameters]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager in which the model computes with the copies, without moving any; restored on exit."""
        own = [p.data for p in self._parameters]

        def restore() -> None:
            for p, data in zip(self._parameters, own, strict=True):
                p.data = data

        try:
            for p, copy in zip(self._parameters, self._copies, strict=True):
                p.data = copy
            yield
        finally:
            uninterrupted(restore)
