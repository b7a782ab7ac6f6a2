"""Options of a run that had an effect on it, for reports: the others would only hide them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.errors import InputError


def with_effect(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's resolved ``options`` that say something about it.

    Options that are ``None``, and those that its method, structure or other options have no use for, are left out; run
    again without these it is the same run. Of a method or structure that is not registered here all but ``None``.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        idle = _idle(PruneConfig.from_mapping(options))
    except InputError:
        return given
    return {name: value for name, value in given.items() if name not in idle}


def _idle(config: PruneConfig) -> set[str]:
    structure, method = config.structure_record, config.method_record
    solved = config.update in ("joint", "sequential") and method.sweep is None and structure.single_weights
    useful = {
        "sparsity": structure.sparsity is None,
        "dense_fraction": config.dense_fraction > 0,
        "dense_by": config.dense_fraction > 0,
        "swaps": solved and config.kron_rank == 1,
        "gradient_steps": solved or config.reconstruct or bool(config.gradient_steps),
        "gradient_target": bool(config.gradient_steps),
        "damp_g": method.gradients,
        "damp_a": method.needs != "nothing",
        "schedule": config.shots > 1,
        "min_kept": structure.m == 0,
        "lora_rank": config.lora_rank > 0,
        "lora_steps": config.lora_rank > 0,
        "lora_learning_rate": config.lora_rank > 0,
        "allocation": structure.coupled,
        "reconstruct": "reconstruct" in structure.options,
        "skip_layers": config.skip_layers != "",
        "uniform": config.uniform,
        "round_to": config.round_to > 1,
        "importance": "importance" in structure.options,
        "skip_bad_batches": config.skip_bad_batches,
        "checkpoint_activations": config.checkpoint_activations,
        "offload": config.offloads,
        "fisher": method.gradients,
        "kron_rank": config.kron_rank > 1,
        "max_correlated": config.update == "chunked",
        "tolerance": solved,
        "max_iterations": solved,
        "target_damping": config.aims_at_dense,
        "token_weights": config.aims_at_dense,
        "residual_damping": config.sequential,
        "residual_weight": config.sequential,
    }
    return {name for name, has in useful.items() if not has}
