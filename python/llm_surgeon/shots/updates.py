"""Update of every linear after a selection: its new weights, and what they are predicted to cost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.update import remove, remove_and_compensate, total_increase
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.report.schema import ShotReport, SolverTrace
from llm_surgeon.shots.anchors import AnchorWeights
from llm_surgeon.shots.curvature import ShotCurvature
from llm_surgeon.shots.run import Run

# Options of updates that need not come near to their optimum.
_ROUGH: dict[str, Any] = {"swaps": 0, "max_iterations": 8}


class Updates:
    """New weights of all linears, from ``curvature``, around ``anchors``."""

    def __init__(self, run: Run, curvature: ShotCurvature, anchors: AnchorWeights) -> None:
        self._run, self._curvature, self._anchors = run, curvature, anchors
        # A sequential update follows, before which weights are only counted.
        self._options = replace(run.config, **_ROUGH) if run.config.sequential else run.config

    def write(self, selections: list[Selection], report: ShotReport) -> list[Selection]:
        """Write every linear's new weights, and into ``report`` the predicted increase (where G is known) and traces.

        Returns:
            What is pruned now: ``selections``, but for what swaps changed.

        Raises:
            NumericalError: NaN or infinity, or a failed factorisation; the layer is named.
        """
        selection_of = {x.name: selection for x, selection in zip(self._run.decoder.linears, selections, strict=True)}
        increases: dict[str, Tensor] = {}
        self._run.each_linear(partial(self._write_linear, selection_of, increases, report.solver))
        report.predicted_increase = total_increase(increases)
        return list(selection_of.values())

    def _write_linear(
        self,
        selection_of: dict[str, Selection],
        increases: dict[str, Tensor],
        traces: list[SolverTrace],
        linear: PrunableLinear,
    ) -> None:
        device, factors = self._run.plan.device, self._curvature.factors
        weight, selection = linear.matrix(device=device), selection_of[linear.name].to(device)
        anchor = self._anchors.of(linear, weight)
        known = self._curvature.factors_of(linear)
        if factors is None or known is None:
            new = remove(weight, selection)
        else:
            two_terms = self._curvature.two_terms
            if two_terms is None:
                new = remove_and_compensate(anchor, selection, known, self._options, linear.name)
            else:
                new = two_terms.compensate(linear, anchor, selection)
            factors.note_jitter(linear, new.jitter)
        if new.selection is not selection:
            adopt(selection_of, linear, new.selection, in_place=self._run.config.offloads)
        linear.write(new.weight)
        if new.objective:
            traces.append(SolverTrace(linear.name, new.objective, new.gap, new.bound))
        if known is not None:
            increases[linear.name] = known.predicted_increase(new.delta)
            if anchor is not weight:
                increases[linear.name] -= known.predicted_increase(weight - anchor)


def adopt(selection_of: dict[str, Selection], linear: PrunableLinear, new: Selection, *, in_place: bool) -> None:
    """Take over a linear's new selection, ``in_place`` where masks lie in main memory: they stay where they are."""
    if in_place:
        mask = selection_of[linear.name].pruned
        mask.copy_(new.pruned, non_blocking=mask.is_pinned())
    else:
        selection_of[linear.name] = new
