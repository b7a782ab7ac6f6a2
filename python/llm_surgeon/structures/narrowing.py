"""The sizes a dimension may have, and its way down through them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.structures.costs import DimensionCosts
from llm_surgeon.structures.find.dimension import Dimension


def allowed(dimension: Dimension, config: PruneConfig, groups: int, parts: int) -> bool:
    """True if a dimension may be narrowed to ``groups`` groups of ``parts`` parts."""
    if config.uniform and (not dimension.rule.stock or (groups, parts) in dimension.rule.refused):
        return (groups, parts) == (dimension.groups, dimension.parts)
    heads, size = groups * parts, dimension.part_columns.shape[2]
    least = max(1, math.ceil(config.min_kept * dimension.groups * dimension.parts - 1e-9))
    return dimension.depth not in config.skipped_layers and heads >= least and heads * size % config.round_to == 0


def smallest_sizes(dimension: Dimension, config: PruneConfig) -> list[tuple[int, int]]:
    """For every number of parts the fewest groups that are allowed with it, if any."""
    found = []
    for parts in range(1, dimension.parts + 1):
        every = range(1, dimension.groups + 1)
        fewest = next((groups for groups in every if allowed(dimension, config, groups, parts)), None)
        found += [] if fewest is None else [(fewest, parts)]
    return found


@dataclass(frozen=True)
class NarrowingStep:
    """A dimension's step to its next size: how many groups go, or how many parts of every group."""

    cost: float
    weights: int
    groups: int = 0
    parts: int = 0


class NarrowingState:
    """One dimension on its way down: what is left of it, and the next sizes that are allowed.

    Attributes:
        groups, parts: what is left: so many groups of so many parts each.
        removed_weights: what is gone, those of the producers included.
    """

    def __init__(self, dimension: Dimension, costs: DimensionCosts, removed: Tensor, config: PruneConfig) -> None:
        self.dimension = dimension
        self._gone = removed.cpu().clone()
        self._cost = costs.groups.tolist()
        self._part_cost = costs.parts.double().cpu().masked_fill(self._gone, math.inf)
        left = (~self._gone).sum(dim=1)
        self.groups, self.parts = int((left > 0).sum()), int(left.max())
        full = dimension.weights(dimension.groups, dimension.parts)
        self.removed_weights = full - dimension.weights(self.groups, self.parts)
        # Groups still there, the cheapest first, from position _next on.
        self._order = sorted((left > 0).nonzero()[:, 0].tolist(), key=lambda group: self._cost[group])
        self._next = 0
        self._fits = partial(allowed, dimension, config)
        self._ends = smallest_sizes(dimension, config)

    def steps(self) -> Iterator[NarrowingStep]:
        """To the next allowed number of groups, and to that of parts, where there are such: the cheapest go."""
        groups = next((count for count in range(self.groups - 1, 0, -1) if self._fits(count, self.parts)), None)
        parts = next((count for count in range(self.parts - 1, 0, -1) if self._fits(self.groups, count)), None)
        d, now = self.dimension, self.dimension.weights(self.groups, self.parts)
        if groups is not None:
            chosen = self._order[self._next : self._next + self.groups - groups]
            yield NarrowingStep(
                sum(self._cost[group] for group in chosen), now - d.weights(groups, self.parts), self.groups - groups
            )
        if parts is not None:
            cheapest = self._part_cost[self._order[self._next :]].sort(dim=1).values[:, : self.parts - parts]
            yield NarrowingStep(float(cheapest.sum()), now - d.weights(self.groups, parts), parts=self.parts - parts)

    def max_removable(self, step: NarrowingStep | None = None) -> int:
        """The most weights that can ever be gone from here, or after ``step``."""
        now = (self.groups, self.parts)
        if step is not None:
            now = (self.groups - step.groups, self.parts - step.parts)
        ends = [end for end in self._ends if end[0] <= now[0] and end[1] <= now[1]]
        weights = self.dimension.weights
        least = min(weights(*size) for size in (ends or [now]))
        return self.removed_weights + weights(self.groups, self.parts) - least

    def smallest_from(self, groups: int) -> int:
        """The smallest allowed number of groups that is at least ``groups``."""
        return next((n for n in range(groups, self.groups) if self._fits(n, self.parts)), self.groups)

    def apply(self, step: NarrowingStep) -> None:
        if step.groups:
            self._gone[self._order[self._next : self._next + step.groups]] = True
            self._next += step.groups
            self.groups -= step.groups
        else:
            self._order = self._order[self._next :]
            self._next = 0
            for group in self._order:
                for part in self._part_cost[group].argsort(stable=True)[: step.parts].tolist():
                    self._cost[group] -= float(self._part_cost[group, part])
                    self._gone[group, part] = True
                    self._part_cost[group, part] = math.inf
            self.parts -= step.parts
            self._order.sort(key=lambda group: self._cost[group])
        self.removed_weights += step.weights

    def mask(self) -> Tensor:
        """Parts that are gone, bool ``[groups, parts]``."""
        return self._gone.to(self.dimension.columns.device)
