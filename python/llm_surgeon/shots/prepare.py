"""A run from what a caller gives: checked, planned, and its surroundings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm_surgeon.checkpoint.run_states import RunStates
from llm_surgeon.checkpoint.shared_states import SharedStates
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.distributed import Ranks
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.planning.plan import Plan, make_plan
from llm_surgeon.progress import Progress
from llm_surgeon.resources import gpu_memory_capped
from llm_surgeon.shots.checks import checked, require_shareable
from llm_surgeon.shots.resume import claim_states
from llm_surgeon.shots.run import Run
from llm_surgeon.shots.windows import Windows


@contextmanager
def prepared(
    model: Any,
    config: PruneConfig,
    calibration: Any,
    correction_data: Any,
    held_out: Any,
    step_windows: Any,
    evaluation: Any,
    plan: Plan | None,
    progress: Progress,
    states: RunStates,
    ranks: Ranks,
) -> Iterator[Run]:
    """Context manager of a run, in which the model is in evaluation mode and ``config.gpu_memory`` holds.

    Raises:
        InputError: the model, the sequences or ``config`` do not go together, or differ from those that ``states`` were
            begun with; nothing was changed.
        NumericalError: a weight is NaN or infinite.
    """
    windows = Windows.of(config, calibration, correction_data, held_out, step_windows, evaluation, ranks)
    samples, seqlen = windows.calibration.input_ids.shape
    config = dataclasses.replace(config, samples=samples, seqlen=seqlen)
    require_shareable(config, ranks.count)
    model, decoder, config = checked(model, config)
    windows.require_fit(model, config)
    with gpu_memory_capped(config.gpu_memory_bytes), evaluation_mode(model):
        plan = plan or make_plan(model, decoder, config, ranks=ranks)
        if plan.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(plan.device)
        run = Run(
            model,
            decoder,
            windows.calibration,
            config,
            plan,
            progress,
            correction_data=windows.correction,
            held_out=windows.held_out,
            step_windows=windows.steps,
            evaluation=windows.evaluation,
            states=SharedStates(states, ranks),
        )
        claim_states(run)
        yield run


def written(run: Run) -> list[nn.Parameter]:
    """Parameters that a run may write in place.

    Those that are moved from main memory are none of them, see :func:`~llm_surgeon.models.offload.offloaded`.
    """
    if run.config.structure_record.whole_model:
        return list(run.model.parameters())
    parameters = [p for linear in run.decoder.linears for p in linear.module.parameters(recurse=False)]
    return [p for p in parameters if p.device.type != "cpu"] if run.config.offloads else parameters
