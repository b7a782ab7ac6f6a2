"""The sensitivity of a checkpoint: what pruning each of its layers would cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_surgeon.errors import InputError
from llm_surgeon.jobs.prune import PruneJob
from llm_surgeon.progress import Progress
from llm_surgeon.shots.sensitivity import Sensitivity, measure_sensitivity, sensitivity_options

SPARSITIES = (0.3, 0.5, 0.7)


def sensitivity_of_checkpoint(
    source: str | Path,
    sparsities: Sequence[float] = SPARSITIES,
    *,
    calibration: str = "wikitext2",
    text_field: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Sensitivity:
    """Predict what pruning each linear of the checkpoint ``source`` to ``sparsities`` would cost; nothing is pruned.

    Args:
        calibration, text_field: as for :func:`~llm_surgeon.jobs.prune.prune_checkpoint`.
        **options: ``samples``, ``seqlen``, ``seed`` and others of :class:`~llm_surgeon.config.prune.PruneConfig`.

    Raises:
        InputError: a sparsity is none, or the model, the text or the memory is at fault.
    """
    if not sparsities:
        raise InputError("sparsities must name one at least")
    for sparsity in sparsities:
        sensitivity_options(sparsity=sparsity, **options)  # refuses what a run with it would
    job = PruneJob(
        source,
        sensitivity_options(**options),
        calibration=calibration,
        samples_shown=0,
        text_field=text_field,
        trust_remote_code=trust_remote_code,
        device=device,
    )
    with job.measuring(progress) as run:
        return measure_sensitivity(run, sparsities)
