"""Fit of what a run leaves of its linears to what they computed before it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing

from torch import Tensor

from llm_surgeon.checkpoint.states import State
from llm_surgeon.methods.reconstruct import reconstruct
from llm_surgeon.methods.select import Selection
from llm_surgeon.methods.sequential import token_weights
from llm_surgeon.models.decoder import PrunableLinear
from llm_surgeon.models.offload import PinnedMemory
from llm_surgeon.models.writers import find_writers
from llm_surgeon.shots.run import Run
from surgeon_kernels import damp


def fit_to_dense(
    run: Run, selections: Sequence[Selection], dense: Sequence[Tensor] = (), skipped: Collection[int] = ()
) -> None:
    """:func:`~llm_surgeon.methods.reconstruct.reconstruct` the dense model as the options of ``run`` say.

    Gradients, for weights of tokens or rows that become zeros, take a pass through the dense model. Where nothing
    becomes zeros, their norms are enough.

    Args:
        selections: one per linear, of rows and columns.
        dense: ``[W | b]`` of every linear before pruning, which is put back first; left out where nothing has changed.
        skipped: depths of the blocks that the pruned model goes without.
    """
    config, curvature = run.config, None
    with_G = not config.structure_record.coupled
    owners = run.owners_of(run.decoder, in_turn=True)
    for linear, matrix in zip(run.decoder.linears if dense else (), dense, strict=True):
        linear.write(matrix)
    with closing(PinnedMemory()) as memory:
        if run.token_weights or with_G:
            kept_apart = config.offloads or config.curvature_layers is not None
            curvature = run.curvature(
                0,
                inputs=False,
                output_factors=with_G,
                squared_norms=run.token_weights,
                blocks_per_pass=run.plan.blocks_per_pass,
                store=memory.store if kept_apart else None,
                owners=owners,
            )

        def weights_of(readers: Sequence[PrunableLinear]) -> Tensor:
            norms = curvature.squared_norms if curvature is not None and run.token_weights else {}
            return token_weights([norms[linear.name] for linear in readers if norms], run.calibration)

        def output_factor(linear: PrunableLinear) -> Tensor | None:
            if curvature is None or not with_G:
                return None
            return damp(curvature.output_factor(linear, run.plan.device), config.damp_g)

        first = len(run.decoder.blocks)  # states of fitted blocks come after those of updated ones

        def taken(depth: int) -> bool:
            state = run.states.block(first + depth)
            if state is not None:
                run.write_weights(state)
            return state is not None

        def fitted(depth: int) -> None:
            if run.states.keeps:
                run.states.put_block(first + depth, State(run.weights(depth), {}))

        reconstruct(
            run.model,
            run.decoder,
            selections,
            run.calibration,
            weights_of,
            output_factor,
            writers=find_writers(run.model, run.decoder),
            damping=config.target_damping,
            residual_weight=config.residual_weight,
            batch_size=run.plan.batch_size,
            skipped=skipped,
            compute_dtype=run.compute_dtype,
            memory=memory if run.plan.states_wait else None,
            taken=taken,
            fitted=fitted,
            owners=owners,
            progress=run.progress.step,
        )
        run.states.settle()
