"""Sparsities that groups can reach: checked by the sizes that are allowed, and tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.errors import InputError
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.find.dimensions import find_dimensions
from llm_surgeon.structures.narrowing import allowed, smallest_sizes
from llm_surgeon.structures.remove.groups import remove_groups
from llm_surgeon.structures.remove.verify import undone


def reachable_dimensions(model: Any, decoder: Decoder, config: PruneConfig) -> list[Dimension]:
    """Dimensions that groups can leave as ``config`` asks for.

    Raises:
        InputError: ``config`` cannot be met there. UnsupportedModelError: the model cannot be smaller, which is tried.
    """
    if config.skipped_layers and max(config.skipped_layers) >= len(decoder.blocks):
        raise InputError(
            f"skip_layers names block {max(config.skipped_layers)}, and the model has {len(decoder.blocks)}"
        )
    dimensions = find_dimensions(model, decoder)
    check_reachable(dimensions, config, decoder.weights)
    with undone(model):
        remove_groups(model, decoder, _smallest_step(dimensions, config))
    return dimensions


def _smallest_step(dimensions: list[Dimension], config: PruneConfig) -> list[tuple[Dimension, Tensor]]:
    """Every dimension with the fewest groups that may leave it; without ``uniform`` those of the last block stay."""
    last = max(dimension.depth for dimension in dimensions)
    removed = []
    for dimension in dimensions:
        parts = torch.zeros(dimension.groups, dimension.parts, dtype=torch.bool, device=dimension.columns.device)
        sizes = range(dimension.groups - 1, 0, -1) if config.uniform or dimension.depth < last else ()
        left = next((size for size in sizes if allowed(dimension, config, size, dimension.parts)), dimension.groups)
        parts[left:] = True
        removed.append((dimension, parts))
    return removed


def check_reachable(dimensions: Sequence[Dimension], config: PruneConfig, weights: int) -> None:
    """Raise :class:`InputError` where no allowed sizes remove the sparsity asked for of ``weights``."""
    left = weights
    for dimension in dimensions:
        full = dimension.weights(dimension.groups, dimension.parts)
        left -= full - min([full, *(dimension.weights(*size) for size in smallest_sizes(dimension, config))])
    if config.sparsity > 1 - left / weights:
        conditions = [f"{config.min_kept:g} (at least one group) of every layer stays"]
        if config.round_to > 1:
            conditions.append(f"widths are multiples of {config.round_to}")
        if config.skip_layers:
            conditions.append(f"blocks {config.skip_layers} are skipped")
        whole = {d.kind: None for d in dimensions if config.uniform and not d.rule.stock}
        if whole:
            conditions.append(f"stock classes know one width of {', '.join(whole)} (uniform)")
        if config.uniform and any(d.rule.refused for d in dimensions):
            conditions.append("the configuration refuses some numbers of heads (uniform)")
        raise InputError(
            f"sparsity {config.sparsity:g} would empty a layer: where {', '.join(conditions)}, at most "
            f"{1 - left / weights:.3g} can be removed"
        )
