"""Update of every linear after a selection: its new weights, and what they are predicted to cost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.update import Written, remove, remove_and_compensate
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.report.schema import ShotReport
from llm_surgeon.shots.anchors import AnchorWeights
from llm_surgeon.shots.block_updates import BlockUpdates
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
        run, linears = self._run, self._run.decoder.linears
        blocks = BlockUpdates(run, selections, report)
        left = [linear for linear in linears if not blocks.taken(linear.depth, self._keep_anchor)]
        for linear in left:
            if run.owners[linear.name] != run.ranks.index:
                self._keep_anchor(linear)  # every rank has all
        for linear, new in zip(left, run.each_linear(partial(self._write_linear, blocks), left), strict=True):
            linear.share(run.ranks, run.owners[linear.name])
            blocks.add(linear, new)
        return blocks.finish()

    def _keep_anchor(self, linear: PrunableLinear) -> None:
        self._anchors.of(linear, linear.matrix(device=self._run.plan.device))

    def _write_linear(self, blocks: BlockUpdates, linear: PrunableLinear) -> Written:
        device, factors = self._run.plan.device, self._curvature.factors
        weight, selection = linear.matrix(device=device), blocks.selection(linear).to(device)
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
        linear.write(new.weight)
        increase = None
        if known is not None:
            increase = known.predicted_increase(new.delta)
            if anchor is not weight:
                increase -= known.predicted_increase(weight - anchor)
        return Written.of(new, increase, new.jitter, changed=new.selection is not selection)
