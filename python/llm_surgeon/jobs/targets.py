"""What may choose the sparsity of a pruning in place of a number."""

from __future__ import annotations

import math

from llm_surgeon.checks import parse_bytes, require_number
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.distributed import Ranks
from llm_surgeon.errors import InputError


def check_targets(config: PruneConfig, size: object, loss: object, ranks: Ranks) -> None:
    """Raise :class:`InputError` where a sparsity cannot be chosen by ``size`` or ``loss``."""
    if size is None and loss is None:
        return
    structure, name = config.structure_record, "target_loss" if size is None else "target_size"
    if size is not None and loss is not None:
        raise InputError("give either target_size or target_loss, not both")
    if config.sparsity != (structure.default_sparsity if structure.sparsity is None else None):
        raise InputError(f"{name} chooses the sparsity: leave that out, and take a structure that has none of its own")
    if size is not None:
        if not structure.coupled:
            raise InputError(f"target_size needs a structure that makes the model smaller, not {structure.name!r}")
        parse_bytes(size)  # type: ignore[arg-type]
        return
    require_number("target_loss", loss, 0.0, math.inf)
    if not structure.single_weights or config.offloads or ranks.count > 1:
        raise InputError("target_loss needs structure 'unstructured', a single process and no offload")
