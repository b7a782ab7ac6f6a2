"""Selection of groups: the cheapest per weight removed over the whole model, within the sizes that are allowed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.errors import InputError
from llm_surgeon.structures.costs import DimensionCosts
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.narrowing import NarrowingState, NarrowingStep


def select_groups(
    dimensions: Sequence[Dimension],
    costs: Sequence[DimensionCosts],
    removed: Sequence[Tensor],
    config: PruneConfig,
    target: int,
    final: int | None = None,
) -> tuple[list[Tensor], float | None]:
    """Choose groups and parts until ``target`` weights are gone, those of earlier shots included.

    Globally the step that costs least per weight it removes comes first; a step narrows one dimension (with
    ``uniform`` the same dimension of every block) to its next allowed size, by whole groups or by one part of every
    group. A step after which ``final`` could not be met any more is not made. Locally (``allocation="local"``) every
    dimension loses the same fraction of its groups.

    Args:
        removed: bool ``[groups, parts]`` per dimension, gone already.
        final: the target of the last shot (left out: this is it), which is met as closely as possible; in earlier
            shots a coarse step may overshoot, and the next one makes up for it.

    Returns:
        What is gone now, and the cost of the dearest step (``None`` for local allocation).

    Raises:
        InputError: ``final`` cannot be met.
    """
    final = target if final is None else final
    states = [NarrowingState(*item, config) for item in zip(dimensions, costs, removed, strict=True)]
    threshold = None
    if config.allocation == "local":
        _take_fractions(states, target)
    else:
        threshold = _take_cheapest(_ladders(states, config.uniform), target, final)
    if sum(state.removed_weights for state in states) < target == final:
        raise InputError(f"sparsity {config.sparsity:g} cannot be met with allocation {config.allocation!r}")
    return [state.mask() for state in states], threshold


def _ladders(states: Sequence[NarrowingState], uniform: bool) -> list[list[NarrowingState]]:
    """The dimensions that go down together: each alone, or those of the same linear in all blocks."""
    if not uniform:
        return [[state] for state in states]
    kinds: dict[str, list[NarrowingState]] = {}
    for state in states:
        kinds.setdefault(state.dimension.kind, []).append(state)
    return list(kinds.values())


def _joint_steps(ladder: list[NarrowingState]) -> Iterator[list[NarrowingStep]]:
    """Steps that all dimensions of a ladder can make together."""
    yield from (list(step) for step in zip(*(state.steps() for state in ladder), strict=False))


def _score(step: list[NarrowingStep]) -> float:
    return sum(part.cost for part in step) / _weights(step)


def _weights(step: list[NarrowingStep]) -> int:
    return sum(part.weights for part in step)


def _take_cheapest(ladders: list[list[NarrowingState]], target: int, final: int) -> float | None:
    removed = sum(state.removed_weights for ladder in ladders for state in ladder)
    slack = sum(state.max_removable() for ladder in ladders for state in ladder) - final
    threshold = None
    heap: list[tuple[float, int, list[NarrowingStep]]] = []
    coarse: list[tuple[int, int, list[NarrowingStep]]] = []  # steps that would overshoot the target

    def lost(index: int, step: list[NarrowingStep]) -> int:
        """Weights that can never go any more after ``step``: none, where groups alone go."""
        if ladders[index][0].dimension.parts == 1:
            return 0
        pairs = zip(ladders[index], step, strict=True)
        return sum(state.max_removable() - state.max_removable(part) for state, part in pairs)

    def overshoots(step: list[NarrowingStep]) -> bool:
        return target == final and _weights(step) > target - removed

    def push(index: int) -> None:
        steps = list(_joint_steps(ladders[index]))
        fitting = [step for step in steps if not overshoots(step) and lost(index, step) <= slack]
        if fitting:
            best = min(fitting, key=_score)
            heapq.heappush(heap, (_score(best), index, best))
        for step in filter(overshoots, [] if fitting else steps):
            coarse.append((_weights(step), index, step))

    def take(index: int, step: list[NarrowingStep]) -> None:
        nonlocal removed, slack, threshold
        slack -= lost(index, step)
        for state, part in zip(ladders[index], step, strict=True):
            state.apply(part)
        removed += _weights(step)
        threshold = max(_score(step), threshold or _score(step))

    for index in range(len(ladders)):
        push(index)
    while removed < target and heap:
        _, index, step = heapq.heappop(heap)
        if not overshoots(step) and lost(index, step) <= slack:  # as it was when it was pushed
            take(index, step)
        push(index)
    if removed < target and coarse:
        take(*min(coarse, key=lambda item: item[:2])[1:])
    return threshold


def _take_fractions(states: Sequence[NarrowingState], target: int) -> None:
    """The smallest fraction of its groups that every dimension can lose to meet the target."""
    fractions = sorted({count / s.dimension.groups for s in states for count in range(s.dimension.groups)})
    low, high = 0, len(fractions) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(_after(state, fractions[middle])[1] for state in states) >= target:
            high = middle
        else:
            low = middle + 1
    for state in states:
        goal = _after(state, fractions[low])[0]
        while state.groups > goal:
            state.apply(next(state.steps()))


def _after(state: NarrowingState, fraction: float) -> tuple[int, int]:
    """Groups left, and weights gone, when a dimension has lost at most ``fraction`` of its groups."""
    total = state.dimension.groups
    goal = state.smallest_from(total - math.floor(fraction * total + 1e-9))
    return goal, state.dimension.weights(total, state.dimension.parts) - state.dimension.weights(goal, state.parts)
