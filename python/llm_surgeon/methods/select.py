"""Selection of what is pruned: exact counts from costs, over the whole network or layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llm_surgeon.config.prune import PruneConfig
from surgeon_kernels import WeightCosts, k_cheapest, nm_select, smallest_mask

_PLACES = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(frozen=True)
class Selection:
    """The pruned part of one layer: single weights, or whole rows and columns."""

    pruned: Tensor  # bool [R, C], no bias column
    rows: Tensor | None = None  # bool [R], set for rows-columns
    columns: Tensor | None = None  # bool [C], set for rows-columns
    removed: tuple[int, int] = (0, 0)  # how many rows and columns these are: known without asking the device

    def to(self, device: torch.device) -> Selection:
        rows, columns = (None if mask is None else mask.to(device) for mask in (self.rows, self.columns))
        # Masks in pinned memory are copied to a GPU without waiting.
        return Selection(self.pruned.to(device, non_blocking=device.type == "cuda"), rows, columns, self.removed)

    def with_bias(self, width: int) -> Tensor:
        """Mask ``[R, C']``, C' = ``width``: a bias, column ``C`` where there is one, goes only with its whole row."""
        if width == self.pruned.shape[1]:
            return self.pruned
        bias = torch.zeros_like(self.pruned[:, :1]) if self.rows is None else self.rows[:, None]
        return torch.cat([self.pruned, bias], dim=1)

    def packed(self) -> dict[str, Tensor]:
        """What :meth:`unpacked` makes it of: ``rows`` and ``columns``, or ``pruned``, a bit a weight."""
        if self.rows is not None and self.columns is not None:
            return {"rows": self.rows, "columns": self.columns}
        bits = pad(self.pruned.flatten(), (0, -self.pruned.numel() % 8)).view(-1, 8)
        return {"pruned": (bits * _PLACES.to(bits.device)).sum(dim=1, dtype=torch.uint8)}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Tensor], shape: tuple[int, int], device: torch.device) -> Selection:
        """The selection ``[R, C]`` that :meth:`packed` gave, on ``device``."""
        if "rows" in packed:
            return cls.of_rows_columns(packed["rows"].to(device), packed["columns"].to(device))
        bits = packed["pruned"].to(device)[:, None].bitwise_and(_PLACES.to(device)) != 0
        return cls(bits.flatten()[: math.prod(shape)].view(shape))

    @classmethod
    def of_rows_columns(cls, rows: Tensor, columns: Tensor, removed: tuple[int, int] | None = None) -> Selection:
        """Selection of whole ``rows`` and ``columns``; ``removed``, their counts where known, avoids a host sync."""
        counts = (int(rows.sum()), int(columns.sum())) if removed is None else removed
        return cls(rows[:, None] | columns[None, :], rows, columns, counts)


def select_elements(
    costs: Sequence[WeightCosts],
    previous: Sequence[Tensor],
    config: PruneConfig,
    sparsity: float,
    out: Sequence[Tensor] | None = None,
    dense: Sequence[bool] | None = None,
) -> tuple[list[Selection], float | None]:
    """Choose single weights so that ``sparsity`` of all of them is pruned, earlier choices included.

    N:M chooses whole groups (their cost is the sum over the weights the pattern removes). Costs are compared within
    what the method's record says: in the whole network they share one global threshold, with the ``min_kept`` most
    expensive part of every layer exempt.

    Args:
        costs: one per layer, ``[R, C]``; previous: bool ``[R, C]`` per layer, pruned already and zero (they stay so).
        sparsity: fraction to have pruned after this shot.
        out: the masks to be written, as of :func:`~surgeon_kernels.k_cheapest`; new ones where left out.
        dense: True for layers that N:M leaves as they are; none where left out.

    Returns:
        One :class:`Selection` per layer and the global threshold (``None`` where there is none).
    """
    masks, threshold = _select_masks(costs, previous, config, sparsity, out, dense)
    return [Selection(mask) for mask in masks], _finite(threshold)


def reselect(pruned: Tensor, cost: Tensor, config: PruneConfig) -> Tensor:
    """Select as many weights of one layer as ``pruned`` marks anew by ``cost``: bool ``[R, C]``.

    N:M stays within the groups that are pruned already.
    """
    n, m = config.structure_record.n, config.structure_record.m
    if m:
        groups = pruned.unflatten(1, (-1, m)).any(dim=2)
        return nm_select(cost, n, m) & groups.repeat_interleave(m, dim=1)
    return smallest_mask(cost, pruned.count_nonzero())


def _select_masks(
    costs: Sequence[WeightCosts],
    previous: Sequence[Tensor],
    config: PruneConfig,
    sparsity: float,
    out: Sequence[Tensor] | None,
    dense: Sequence[bool] | None,
) -> tuple[list[Tensor], float | None]:
    sizes = [cost.weight.numel() for cost in costs]
    limits, pattern, fraction = sizes, None, sparsity
    n, m = config.structure_record.n, config.structure_record.m
    if m:
        pattern, fraction = (n, m), sparsity / config.removed_fraction
        limits = sizes = [size // m for size in sizes]
        if dense is not None:
            limits = sizes = [0 if stays else size for size, stays in zip(sizes, dense, strict=True)]
    elif config.method_record.comparison == "row":
        masks = [_cheapest_in_rows(c, gone, sparsity) for c, gone in zip(costs, previous, strict=True)]
        return masks if out is None else [o.copy_(mask) for o, mask in zip(out, masks, strict=True)], None
    else:
        limits = [size - math.floor(config.min_kept * size) for size in sizes]
    if config.method_record.comparable:
        count = round(fraction * sum(sizes))
        threshold, masks = k_cheapest(costs, count, pattern=pattern, previous=previous, at_most=limits, out=out)
        return masks, threshold
    targets = [None] * len(costs) if out is None else [[mask] for mask in out]
    layers = zip(costs, previous, sizes, targets, strict=True)
    return [
        k_cheapest([c], round(fraction * size), pattern=pattern, previous=[p], out=o)[1][0] for c, p, size, o in layers
    ], None


def _finite(threshold: float | None) -> float | None:
    """``None`` for the infinite threshold of a shot that chooses nothing new."""
    return threshold if threshold is not None and math.isfinite(threshold) else None


def _cheapest_in_rows(costs: WeightCosts, previous: Tensor, sparsity: float) -> Tensor:
    """The cheapest of each row; rows take turns at rounding so that the layer's total is exact."""
    cost = costs.dense().masked_fill(previous.to(costs.device), -math.inf)
    R, C = cost.shape
    total = round(sparsity * R * C)
    counts = total // R + (torch.arange(R, device=cost.device) < total % R).long()  # [R]
    rank = cost.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < counts[:, None]).to(costs.weight.device)


def select_rows_columns(
    costs: Sequence[tuple[Tensor, Tensor]], previous: Sequence[Selection], config: PruneConfig, sparsity: float
) -> tuple[list[Selection], float | None]:
    """Choose whole rows and columns, the cheapest per weight they remove, until ``sparsity`` of all weights is gone.

    Removing r rows and c columns of one matrix removes ``r C + c R - r c`` weights; the count is met from above by
    less than one row or column. At least one, and ``min_kept`` of every layer's rows and columns stay.

    Args:
        costs: row costs ``[R]`` and column costs ``[C]`` per layer; previous: what is removed already.
    """
    if config.method_record.comparable:
        return _take_cheapest(costs, previous, config.min_kept, sparsity)
    return [
        _take_cheapest([cost], [before], config.min_kept, sparsity)[0][0]
        for cost, before in zip(costs, previous, strict=True)
    ], None


def _take_cheapest(
    costs: Sequence[tuple[Tensor, Tensor]], previous: Sequence[Selection], min_kept: float, sparsity: float
) -> tuple[list[Selection], float | None]:
    layers = [_Lines(cost, before, min_kept) for cost, before in zip(costs, previous, strict=True)]
    lengths = [len(layer.scores) for layer in layers]
    scores = torch.cat([layer.scores.to(layers[0].scores.device) for layer in layers])
    R, C, r0, c0 = (torch.tensor([getattr(x, key) for x in layers], device=scores.device) for key in _COUNTS)
    scores, order = scores.sort(stable=True)
    sizes = R + C
    owner = torch.arange(len(layers), device=scores.device).repeat_interleave(sizes)[order]
    is_row = order - (sizes.cumsum(0) - sizes)[owner] < R[owner]  # a layer's rows stand before its columns
    rows_before, columns_before = _earlier(is_row, owner, len(layers)), _earlier(~is_row, owner, len(layers))
    # What a line removes when all cheaper ones have gone: a row what its columns have left of it, a column likewise.
    removed = torch.where(is_row, C[owner] - c0[owner] - columns_before, R[owner] - r0[owner] - rows_before)
    total = (r0 * C + c0 * R - r0 * c0).sum() + removed.cumsum(0)
    candidates = torch.isfinite(scores).sum()
    missing = math.ceil(sparsity * sum(x.R * x.C for x in layers) - 1e-6)
    count = int(torch.minimum((total < missing).sum() + 1, candidates))
    if missing <= sum(x.r0 * x.C + x.c0 * x.R - x.r0 * x.c0 for x in layers):
        count = 0
    taken = torch.zeros_like(scores, dtype=torch.bool)
    taken[order[:count]] = True
    row_taken, of = is_row[:count].long(), owner[:count]
    numbers = torch.stack([r0.index_add(0, of, row_taken), c0.index_add(0, of, 1 - row_taken)], dim=1).tolist()
    selections = [
        layer.with_removed(part, (rows, columns))
        for layer, part, (rows, columns) in zip(layers, taken.split(lengths), numbers, strict=True)
    ]
    return selections, float(scores[count - 1]) if count else None


def _earlier(flag: Tensor, owner: Tensor, owners: int) -> Tensor:
    """For every item the number of earlier ones of the same owner whose ``flag`` is set."""
    grouped = owner.argsort(stable=True)
    counts = flag[grouped].cumsum(0)
    counts -= flag[grouped].long()
    sizes = torch.bincount(owner, minlength=owners)
    starts = (sizes.cumsum(0) - sizes).clamp_max(max(len(counts) - 1, 0))
    counts -= counts[starts][owner[grouped]]
    return torch.empty_like(counts).scatter_(0, grouped, counts)


_COUNTS = ("R", "C", "r0", "c0")


class _Lines:
    """The rows and columns (lines) of one layer as candidates, scored by cost per weight still there."""

    def __init__(self, cost: tuple[Tensor, Tensor], before: Selection, min_kept: float) -> None:
        assert before.rows is not None and before.columns is not None
        self.before = before
        self.R, self.C = before.pruned.shape
        self.r0, self.c0 = before.removed
        rows = _candidates(cost[0] / max(1, self.C - self.c0), before.rows, min_kept)
        columns = _candidates(cost[1] / max(1, self.R - self.r0), before.columns, min_kept)
        self.scores = torch.cat([rows, columns])

    def with_removed(self, taken: Tensor, removed: tuple[int, int]) -> Selection:
        """Selection of what was removed before and is ``taken`` now, so many rows and columns in all."""
        taken = taken.to(self.before.pruned.device)
        rows, columns = self.before.rows, self.before.columns
        assert rows is not None and columns is not None
        return Selection.of_rows_columns(rows | taken[: self.R], columns | taken[self.R :], removed)


def _candidates(score: Tensor, gone: Tensor, min_kept: float) -> Tensor:
    """Scores with what is gone already, and the most expensive that must stay, made infinite."""
    gone = gone.to(score.device)
    order = score.masked_fill(gone, -math.inf).argsort(stable=True)
    kept = max(1, math.floor(min_kept * score.numel()))
    return score.index_fill(0, order[score.numel() - kept :], math.inf).masked_fill_(gone, math.inf)
