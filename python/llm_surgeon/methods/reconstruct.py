"""Fit of the weights that are left to what the dense model computes, linear by linear in execution order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from llm_surgeon.curvature.factors import numerical_errors
from llm_surgeon.curvature.stages import Stage, stages
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.offload import PinnedMemory
from surgeon_kernels import cholesky_with_jitter, rows_columns_update


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    decoder: Decoder,
    selections: Sequence[Selection],
    calibration: Calibration,
    weights_of: Callable[[Sequence[PrunableLinear]], Tensor],
    output_factor: Callable[[PrunableLinear], Tensor | None] = lambda _: None,
    *,
    writers: Mapping[str, float],
    damping: float,
    residual_weight: float = 1.0,
    batch_size: int,
    skipped: Collection[int] = (),
    compute_dtype: torch.dtype | None = None,
    memory: PinnedMemory | None = None,
    taken: Callable[[int], bool] = lambda _: False,
    fitted: Callable[[int], object] = lambda _: None,
    owners: Mapping[str, int] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Change the dense ``model`` into one without the selected rows and columns that follows it as closely as it can.

    With the moments of :class:`~llm_surgeon.curvature.stages.Stage` the kept columns ``k`` of a linear become

        Ŵ[:, k] = (W X + ρ E + λ W)[:, k] (A[k, k] + λ I)⁻¹,    λ = damping mean(diag A[k, k]),

    which minimises ``Σ w ‖Ŵ x̂ - (W x + ρ e)‖² + λ ‖Ŵ - W‖²``, row by row. Rows whose outputs nothing reads any more go
    from that; where these are zeros that others read, kept rows ``r`` make up for them by ``G[r, r]⁻¹ G[r, :]``, so
    that the norm is that of G.

    Args:
        selections: one per linear, of rows and columns.
        weights_of: weights of tokens for linears, see :func:`~llm_surgeon.curvature.stages.stages`, like ``writers``,
            ``batch_size``, ``skipped``, ``compute_dtype``, ``memory`` and ``taken``.
        output_factor: damped G ``[R, R]`` of linears whose removed rows others make up for; ``None`` of others.
        damping: towards the dense weights.
        residual_weight: ρ.
        fitted: called with the depth of a block whose linears have their new weights.
        owners: by linears' names the ranks, of the calibration data's, that solve; the first where left out.
        progress: called as ``progress(linears_done, linears, name)``.

    Raises:
        NumericalError: a moment matrix is not positive definite; the message names the layer.
    """
    left = Counter(linear.depth for linear in decoder.linears)
    lines = dict(zip((linear.name for linear in decoder.linears), selections, strict=True))
    ranks, done, total = calibration.ranks, 0, sum(linear.depth not in skipped for linear in decoder.linears)

    def owner(linear: PrunableLinear) -> int:
        return 0 if owners is None else owners[linear.name]

    def solve(stage: Stage, linear: PrunableLinear) -> None:
        if progress is not None:
            progress(done + stage.readers.index(linear), total, linear.name)
        W, chosen = linear.matrix(stage.A.dtype), lines[linear.name].to(stage.A.device)
        rows, columns = chosen.rows, chosen.columns
        assert rows is not None and columns is not None
        kept = ~pad(columns, (0, linear.has_bias))
        A = stage.A[: len(kept), : len(kept)][kept][:, kept]
        wanted = W @ stage.cross[: len(kept), : len(kept)][:, kept]
        if linear.name in stage.residual:
            wanted += residual_weight * stage.residual[linear.name][:, : len(kept)][:, kept]
        shift = damping * A.diagonal().mean()
        with numerical_errors(f"inputs of {linear.name}"):
            cholesky, _ = cholesky_with_jitter(A, damping, name="A")
        new = torch.zeros_like(W)
        new[:, kept] = torch.cholesky_solve((wanted + shift * W[:, kept]).T, cholesky).T
        G = output_factor(linear)
        if G is not None:
            no_columns = torch.zeros_like(new[0], dtype=torch.bool)
            with numerical_errors(f"update of {linear.name}"):
                new += rows_columns_update(new, G.to(new), None, rows, no_columns, name=linear.name)
        linear.write(new.masked_fill(rows[:, None], 0.0))

    for stage in stages(
        model,
        decoder,
        calibration,
        weights_of,
        writers=writers,
        batch_size=batch_size,
        skipped=skipped,
        compute_dtype=compute_dtype,
        memory=memory,
        taken=taken,
    ):
        for linear, _ in zip(stage.readers, ranks.spread(stage.readers, owner, partial(solve, stage)), strict=True):
            linear.share(ranks, owner(linear))
        done += len(stage.readers)
        depth = stage.readers[0].depth
        left[depth] -= len(stage.readers)
        if left[depth] == 0:
            fitted(depth)
