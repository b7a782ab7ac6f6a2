"""The report of a run."""

from __future__ import annotations

import dataclasses
import time
from datetime import datetime, timezone

import torch

from llm_surgeon.models.footprint import SizeComparison
from llm_surgeon.report.schema import HeldOutLoss, LayerReport, PruneReport, collect_versions
from llm_surgeon.report.warnings import warnings_of
from llm_surgeon.resources import peak_memory
from llm_surgeon.shots.run import Run, Shots
from llm_surgeon.shots.runner import Outcome


class RunRecord:
    """Notes on ``run``, taken from before its first shot on, of which its report is made."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._begun, self._started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._parameters = sum(parameter.numel() for parameter in run.model.parameters())
        smaller = run.config.structure_record.coupled
        self._sizes = SizeComparison(run.model, run.calibration.input_ids) if smaller else None

    def shots_done(self) -> None:
        """Keep the model as it is before what is zero leaves it: it has the dense model's sizes."""
        if self._sizes is not None:
            self._sizes.keep(self._run.model)

    def report(self, shots: Shots, outcome: Outcome) -> PruneReport:
        """The report, with warnings, of a run that is finished."""
        run, device = self._run, self._run.plan.device
        peak = peak_memory(device)
        # Of blocks of several sizes their number is known now; and whether tokens were weighed, where the run chose.
        config = dataclasses.replace(run.config, shots=len(outcome.shots), token_weights=run.token_weights)
        sizes = {} if self._sizes is None else self._sizes.sizes(run.model)
        report = PruneReport(
            config=dataclasses.asdict(config),
            versions=collect_versions(),
            model=getattr(run.model.config, "_name_or_path", "") or type(run.model).__name__,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            parameters=self._parameters,
            started=self._started,
            seconds=outcome.seconds + time.perf_counter() - self._begun,
            peak_memory_bytes=peak,
            layers=_layer_reports(run, shots),
            shots=outcome.shots,
            sizes=sizes,
            custom_code=hasattr(run.model, "is_pruned"),
        )
        if run.held_out is not None:
            report.held_out = HeldOutLoss(*run.held_out.counts(), *outcome.held_out)
        if run.evaluation is not None:
            report.evaluation = HeldOutLoss(*run.evaluation.counts(), *outcome.evaluation)
        report.warnings = warnings_of(report, run.calibration.counts()[1]) + run.said
        return report


def _layer_reports(run: Run, shots: Shots) -> list[LayerReport]:
    return [
        LayerReport(
            name=linear.name,
            kind=linear.kind,
            depth=linear.depth,
            rows=selection.pruned.shape[0],
            columns=selection.pruned.shape[1],
            weights=selection.pruned.numel(),
            removed=int(selection.pruned.count_nonzero()),
        )
        for linear, selection in zip(run.decoder.linears, shots.selections, strict=True)
    ]
