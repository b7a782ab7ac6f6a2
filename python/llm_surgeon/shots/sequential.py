"""Sequential update of all linears, which takes the place of one layer by layer."""

from __future__ import annotations

from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.sequential import update_sequentially
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.models.writers import find_writers
from llm_surgeon.report.schema import ShotReport
from llm_surgeon.shots.anchors import AnchorWeights
from llm_surgeon.shots.block_updates import BlockUpdates
from llm_surgeon.shots.curvature import ShotCurvature
from llm_surgeon.shots.run import Run


class SequentialUpdates:
    """New weights of all linears, in execution order, from ``curvature``, inputs of both models and dense weights.

    Shots before the last one tell how many weights of each linear go: what they pruned is made dense again. Hidden
    states wait in ``memory`` where the plan says so.
    """

    def __init__(self, run: Run, curvature: ShotCurvature, anchors: AnchorWeights, memory: PinnedMemory) -> None:
        self._run, self._curvature, self._anchors, self._memory = run, curvature, anchors, memory

    def write(self, selections: list[Selection], report: ShotReport) -> list[Selection]:
        """Write new weights as :meth:`~llm_surgeon.shots.updates.Updates.write` does.

        As many weights of every linear go as ``selections`` have, chosen anew, and of N:M all groups' share.
        """
        run, estimated = self._run, self._curvature.estimated
        assert estimated is not None
        self._curvature.factors = None  # the costs have been computed
        if run.config.shots > 1:
            for linear in run.decoder.linears:
                linear.write(self._anchors.of(linear, linear.matrix(device=run.plan.device)))
        blocks = BlockUpdates(run, selections, report)
        for linear, new in update_sequentially(
            run.model,
            run.decoder,
            run.calibration,
            estimated,
            selections,
            run.config,
            writers=find_writers(run.model, run.decoder),
            batch_size=run.plan.batch_size,
            compute_dtype=run.compute_dtype,
            memory=self._memory if run.plan.states_wait else None,
            taken=blocks.taken,
            owners=run.owners,
            progress=run.progress.step,
        ):
            blocks.add(linear, new)
        return blocks.finish()
