"""Labels drawn from a model's own distribution."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class LabelSampler:
    """Draws of labels, row by row, that do not depend on how many rows come at once.

    Of V exponential clocks of rates p the first to ring is the draw. Unlike ``torch.multinomial`` this lets NaN
    through, which is then reported with the name of its layer.
    """

    def __init__(self, device: torch.device, seed: int, rows: Iterable[int], chunk: int) -> None:
        """Random numbers come from a generator on ``device``, for so many ``rows`` one after the other, or by chunks.

        Args:
            chunk: most numbers that are drawn at once.
        """
        self._generator, self._rows, self._chunk = torch.Generator(device).manual_seed(seed), iter(rows), chunk
        self._left, self._clocks = 0, torch.empty(0)

    def draw(self, p: Tensor) -> Tensor:
        """One draw from each row of ``p`` ``[n, V]``, ``[n, 1]``."""
        labels, done = [], 0
        while done < len(p):
            if not len(self._clocks):
                self._clocks = self._next(p)
            clocks = self._clocks[: len(p) - done]
            self._clocks = self._clocks[len(clocks) :]
            labels.append((p[done : done + len(clocks)] / clocks.to(p.device)).argmax(dim=1, keepdim=True))
            done += len(clocks)
        return labels[0] if len(labels) == 1 else torch.cat(labels)

    def _next(self, p: Tensor) -> Tensor:
        self._left = self._left or next(self._rows)
        count = min(self._left, max(1, self._chunk // p.shape[1]))
        self._left -= count
        shape = (count, p.shape[1])
        return torch.empty(shape, dtype=p.dtype, device=self._generator.device).exponential_(generator=self._generator)
