"""Find the coupled groups of every decoder block by probing it, not by its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.probe import Dependencies, StubbedBlock, capture_inputs
from llm_surgeon.models.rebuild import accepts
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.find.size_rules import find_size_rule


def find_dimensions(model: PreTrainedModel, decoder: Decoder) -> list[Dimension]:
    """Every inner dimension of every decoder block, in execution order.

    Blocks of one class with linears of the same names and sizes are probed once.

    Raises:
        UnsupportedModelError: a dimension cannot be explained; the message names the linear that reads it.
    """
    known: dict[Any, list[Dimension]] = {}
    found = []
    for depth, block in enumerate(decoder.blocks):
        linears = [linear for linear in decoder.linears if linear.depth == depth]
        signature = (type(block), *((x.kind, x.rows, x.columns, x.has_bias) for x in linears))
        if signature not in known:
            known[signature] = _probe_block(model, decoder, linears, depth)
        by_kind = {linear.kind: linear for linear in linears}
        found += [_moved(dimension, depth, by_kind) for dimension in known[signature]]
    return found


def _moved(like: Dimension, depth: int, linears: dict[str, PrunableLinear]) -> Dimension:
    """The same dimension of another block of the same kind."""
    producers = {kind: linears[kind] for kind in like.producers}
    return replace(like, depth=depth, consumer=linears[like.kind], producers=producers)


def _probe_block(
    model: PreTrainedModel, decoder: Decoder, linears: list[PrunableLinear], depth: int
) -> list[Dimension]:
    block = decoder.blocks[depth]
    hidden, inputs = capture_inputs(model, block)
    stubbed = StubbedBlock(block, linears, inputs)
    # Attention takes other paths where there is a mask, and may need to be told more there.
    masked = StubbedBlock(block, linears, capture_inputs(model, block, padded=True)[1])
    found = _components(Dependencies(stubbed, linears, hidden), linears)
    by_kind = {linear.kind: linear for linear in linears}
    dimensions = []
    for consumer, (columns, rows, reaches) in found.items():
        producers = {kind: by_kind[kind] for kind in rows}
        whole = Dimension(depth, by_kind[consumer], producers, columns, rows, columns[:, None, :], None, None)
        candidates = [whole, *_with_parts(whole, reaches)]
        rules = [
            find_size_rule([stubbed, masked], linears, hidden, model.config.per_layer_config[depth], candidate)
            for candidate in candidates
        ]
        # Single heads of a group where the block's code can do without them, else whole groups.
        usable = [replace(c, rule=r) for c, r in zip(candidates, rules, strict=True) if r is not None]
        if not usable:
            raise UnsupportedModelError(
                f"{by_kind[consumer].name} has {columns.shape[0]} groups of inputs that cannot be removed singly: "
                "structured pruning of this architecture is not supported"
            )
        dimensions.append(_with_refused(usable[-1], model.config))
    return dimensions


def _with_refused(dimension: Dimension, config: PreTrainedConfig) -> Dimension:
    """With the sizes that the configuration's class refuses; those of neurons are not looked at, they are many."""
    rule = dimension.rule
    if not dimension.is_heads or not rule.stock:
        return dimension
    sizes = [(groups, parts) for groups in range(1, dimension.groups) for parts in range(1, dimension.parts + 1)]
    refused = []
    for size in sizes:
        quantities = dimension.quantities(*size)
        if not accepts(config, {name: quantities[of] for name, of in rule.config.items()} | rule.constants):
            refused.append(size)
    return replace(dimension, rule=replace(rule, refused=frozenset(refused)))


def _components(
    found: Dependencies, linears: Sequence[PrunableLinear]
) -> dict[str, tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Consumer -> its groups' columns, their producers' rows, and which of these rows reach which columns.

    Rows and columns joined by a path of dependencies form a group.
    """
    by_kind = {linear.kind: linear for linear in linears}
    result = {}
    for consumer in by_kind:
        into = {producer: reach for (producer, to), reach in found.reaches.items() if to == consumer}
        residual = found.residual_columns[consumer]
        if residual.all():
            continue
        name = by_kind[consumer].name
        reached = torch.stack([reach.any(dim=0) for reach in into.values()]).any(dim=0) if into else residual & False
        if residual.any() or not reached.all():
            missing = int((residual | ~reached).nonzero()[0])
            raise UnsupportedModelError(
                f"input {missing} of {name} does not come from other linears alone: it cannot be removed with them"
            )
        for producer in into:
            others = {to for (source, to) in found.reaches if source == producer} - {consumer}
            if others or found.residual_rows[producer].any():
                other = by_kind[min(others)].name if others else "the block's output"
                raise UnsupportedModelError(
                    f"{by_kind[producer].name} feeds both {name} and {other}: its outputs cannot be removed"
                )
        labels, row_labels = _labels(into)
        columns = _by_label(labels, name)
        rows = {producer: _by_label(label, by_kind[producer].name) for producer, label in row_labels.items()}
        for producer, index in rows.items():
            if len(index) != len(columns):
                raise UnsupportedModelError(f"{by_kind[producer].name} has outputs that {name} does not read")
        result[consumer] = (columns, rows, into)
    for producer in by_kind:
        used = any(source == producer for source, _ in found.reaches)
        if not used and not found.residual_rows[producer].all():
            raise UnsupportedModelError(f"{by_kind[producer].name} has outputs whose use cannot be found")
    return result


def _labels(into: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The component of every column, and of every producer's rows, named by its first column."""
    columns = next(iter(into.values())).shape[1]
    edges = {producer: reach.nonzero(as_tuple=True) for producer, reach in into.items()}
    device = next(iter(into.values())).device
    label = torch.arange(columns, device=device)
    while True:
        rows = {}
        new = label.clone()
        for producer, (r, c) in edges.items():
            rows[producer] = label.new_full((into[producer].shape[0],), columns).scatter_reduce(0, r, label[c], "amin")
            new.scatter_reduce_(0, c, rows[producer][r], "amin")
        if torch.equal(new, label):
            return label, rows
        label = new


def _by_label(labels: Tensor, name: str) -> Tensor:
    """Indices of each label ``[labels, n]``, in the order of the labels; each must occur as often."""
    order = labels.argsort(stable=True)
    counts = labels.unique(return_counts=True)[1]
    if not bool((counts == counts[0]).all()):
        raise UnsupportedModelError(f"{name} falls into groups of unequal sizes: they cannot be removed")
    return order.view(len(counts), int(counts[0]))


def _with_parts(whole: Dimension, reaches: dict[str, Tensor]) -> list[Dimension]:
    """All divisions of every group into equal parts, each reached by rows of its own of one producer."""
    groups, size = whole.columns.shape
    if size == 1:
        return []
    found = []
    for producer, index in whole.rows.items():
        reach = reaches[producer][index.flatten()].view(*index.shape, -1)  # [groups, n, all columns]
        within = reach.gather(2, whole.columns[:, None, :].expand(-1, index.shape[1], -1))  # [groups, n, size]
        counts = within.sum(dim=2)  # columns that each row reaches
        for count in counts.unique().tolist():
            chosen = counts == count
            rows, parts = int(chosen[0].sum()), size // count
            if not 1 < count < size or size % count or rows % parts or bool((chosen.sum(dim=1) != rows).any()):
                continue
            chosen = chosen.nonzero()[:, 1].view(groups, rows)
            masks = within.gather(1, chosen[:, :, None].expand(-1, -1, size))
            order = masks.int().argmax(dim=2).argsort(dim=1, stable=True)  # by the first column reached
            masks = masks.gather(1, order[:, :, None].expand(-1, -1, size)).view(groups, parts, -1, size)
            if bool((masks != masks[:, :, :1]).any()) or bool((masks[:, :, 0].sum(dim=1) != 1).any()):
                continue  # no partition
            locations = masks[:, :, 0].nonzero()[:, 2].view(groups, parts * count)
            found.append(
                replace(
                    whole,
                    part_columns=whole.columns.gather(1, locations).view(groups, parts, count),
                    part_producer=producer,
                    part_rows=index.gather(1, chosen).gather(1, order).view(groups, parts, -1),
                )
            )
    return found
