"""Checks of a model against the options of a run, before it begins."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.errors import InputError
from llm_surgeon.models.checks import check_shrinkable
from llm_surgeon.models.decoder import Decoder, check_finite, check_rank, find_decoder
from llm_surgeon.models.wrappers import unwrapped


def checked(model: Any, config: PruneConfig) -> tuple[Any, Decoder, PruneConfig]:
    """The model itself, out of its wrappers, its decoder, and ``config`` with what the model tells: its
    number of shots, and of gradient steps.

    Raises:
        InputError: ``config`` cannot be carried out on the model, as far as its sizes tell.
        NumericalError: a weight is NaN or infinite.
    """
    structure = config.structure_record
    if isinstance(model, nn.parallel.DistributedDataParallel) and structure.coupled:
        raise InputError("DistributedDataParallel keeps the sizes of its parameters: wrap the model once it is pruned")
    model = unwrapped(model)
    decoder = find_decoder(model)
    if structure.coupled:
        check_shrinkable(model)
        _check_heads(model)
    check_finite(model)
    if config.lora_rank:
        check_rank(decoder, config.lora_rank, "lora_rank")
    for linear in decoder.linears:
        if structure.m and linear.columns % structure.m:
            raise InputError(
                f"structure {structure.name!r} needs widths divisible by {structure.m}: "
                f"{linear.name} has {linear.columns}"
            )
    config = config.settled(decoder.weights)
    return model, decoder, dataclasses.replace(config, shots=structure.count_shots(decoder, config))


def require_shareable(config: PruneConfig, count: int) -> None:
    """Raise :class:`InputError` where ``count`` processes cannot share a run of ``config``."""
    for name, asked in {"kron_rank 2": config.kron_rank > 1, "skip_bad_batches": config.skip_bad_batches}.items():
        if asked and count > 1:
            raise InputError(f"{name} takes a single process, not {count}")
    if config.samples < count:
        raise InputError(f"{count} processes need as many calibration windows, not {config.samples}")


def _check_heads(model: Any) -> None:
    # Models that were made smaller here may count their groups of heads where they had no such number.
    for depth, own in enumerate(() if hasattr(model, "is_pruned") else model.config.per_layer_config):
        heads, groups = (getattr(own, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
            raise InputError(f"the {heads} attention heads of block {depth} do not divide into {groups} groups")
