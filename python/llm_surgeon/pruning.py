"""Prune a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from llm_surgeon.checkpoint.run_states import RunStates, kept_states
from llm_surgeon.checks import require_bool
from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.distributed import ALONE, Ranks
from llm_surgeon.errors import InputError
from llm_surgeon.isolation import isolated
from llm_surgeon.models.state import ModelState
from llm_surgeon.planning.plan import Plan
from llm_surgeon.progress import Progress
from llm_surgeon.report.schema import PruneReport
from llm_surgeon.shots.prepare import prepared, written
from llm_surgeon.shots.record import RunRecord
from llm_surgeon.shots.retries import NeedsOffload, free_memory, offloading_at_need
from llm_surgeon.shots.runner import run_shots


def prune(
    model: nn.Module,
    calibration: Any,
    structure: str = "2:4",
    *,
    config: PruneConfig | None = None,
    correction_data: Any = None,
    held_out: Any = None,
    step_windows: Any = None,
    evaluation: Any = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
    checkpoint: str | Path | RunStates | None = None,
    resume: bool = False,
    ranks: Ranks = ALONE,
    **options: Any,
) -> PruneReport:
    """Prune the decoder's linear layers of a causal LM in place.

    Autocast, inference mode and no-grad outside do not reach inside, and random states are put back. Of several threads
    that prune or recover, one runs at a time.

    Args:
        model: a decoder-only Hugging Face causal LM; computed in evaluation mode, in the dtype and on the device it is
            in, but that passes of a float32 model multiply in bfloat16 on a GPU where ``compute_dtype`` says nothing
            else (float32 is recommended: bfloat16 weights round every update). Inside a compiled model, DataParallel or
            DistributedDataParallel it is pruned in place, running eagerly; what is compiled compiles itself anew.
        calibration: a :class:`~llm_surgeon.data.calibration.Calibration`, token ids ``[samples, seqlen]``, or
            a sequence of mappings with ``input_ids`` and, optionally, ``attention_mask``.
        structure: ``"2:4"``, any ``"N:M"``, ``"unstructured"``, ``"rows-columns"``, or, for a smaller model,
            ``"groups"``, ``"width"`` or ``"layers"``.
        config: every option at once, in place of ``structure`` and ``options``.
        correction_data: what low-rank corrections (``lora_rank``) learn from, given like ``calibration``, which they
            learn from where it is left out.
        held_out: sequences that pruning does not see, given like ``calibration``: the report's ``held_out`` has the
            losses on them before and after.
        step_windows: sequences that the lengths of gradient steps are found on, given like ``calibration``, whose last
            ``gradient_samples`` (an eighth) they are where left out; else that is left out.
        evaluation: sequences of another text, given like ``calibration``: the same as of ``held_out``.
        plan: the run's layout, where :func:`~llm_surgeon.planning.plan.make_plan` was asked for it already.
        progress: receiver of progress; none by default.
        checkpoint: a folder of this run's own, in which what is done is kept until all of it is; nothing is by default.
        resume: go on with what an interrupted run left in ``checkpoint``, if anything; with the same model, data,
            options, machine and threads the weights become those of a run that nothing interrupts, to the bit.
        ranks: processes that share the run, see :func:`llm_surgeon.distributed.group.joined`: each gives the same
            arguments, with its own copy of the model, and comes out with the same weights and report.
        **options: fields of :class:`PruneConfig`.

    Failed or interrupted (:class:`KeyboardInterrupt`) it leaves the model, its flags, hooks and configuration as they
    were.

    Returns:
        The report: what was removed from which layer, predicted beside measured loss of every shot, and warnings.

    Raises:
        InputError: the model, the data or an option is at fault; nothing was changed.
        NumericalError: NaN or infinity was met; the model has its original weights again.
    """
    named = {} if structure == "2:4" else {"structure": structure}
    config = PruneConfig.given(config, {**named, **options})
    require_bool("resume", resume)
    if resume and checkpoint is None:
        raise InputError("resume means nothing without checkpoint")
    data = calibration, correction_data, held_out, step_windows, evaluation
    state = ModelState(model)
    try:
        with kept_states(checkpoint if ranks.first else None, resume) as states:
            while True:
                try:
                    return _prune(model, state, config, data, plan, progress or Progress(), states, ranks)
                except NeedsOffload as error:
                    plan = error.plan
                states.settle()
                state.restore()
                free_memory()
    except BaseException:
        state.restore()
        raise


@isolated()
def _prune(
    model: nn.Module,
    state: ModelState,
    config: PruneConfig,
    data: tuple[Any, Any, Any, Any, Any],
    plan: Plan | None,
    progress: Progress,
    states: RunStates,
    ranks: Ranks,
) -> PruneReport:
    """:func:`prune`, whose caller puts the model's ``state`` back if anything is raised."""
    with prepared(model, config, *data, plan, progress, states, ranks) as run:
        record = RunRecord(run)
        shots = run.config.structure_record.shot_class(run)
        # Copying goes on beside the first shot, until weights will change.
        copied = state.copy_weights(written(run), at_once=run.config.offloads)
        with offloading_at_need(run):
            outcome = run_shots(shots, run, before_update=copied)
        record.shots_done()
        shots.finish()
    return record.report(shots, outcome)
