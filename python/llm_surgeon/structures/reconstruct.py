"""Fit of the weights that are left to what the dense model computes, linear by linear in execution order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from llm_surgeon.curvature.factors import numerical_errors
from llm_surgeon.curvature.stages import stages
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.select import Selection
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.writers import find_writers
from llm_surgeon.shots.run import Run
from surgeon_kernels import cholesky_with_jitter


def fit_to_dense(run: Run, selections: Sequence[Selection], skipped: Collection[int] = ()) -> None:
    """:func:`reconstruct` as the options of ``run`` say; its model must be dense again."""
    real = run.calibration.attention_mask
    weights = torch.ones(run.calibration.input_ids.shape) if real is None else real.float()
    reconstruct(
        run.model,
        run.decoder,
        selections,
        run.calibration,
        lambda _: weights,
        writers=find_writers(run.model, run.decoder),
        damping=run.config.target_damping,
        residual_weight=run.config.residual_weight,
        batch_size=run.plan.batch_size,
        skipped=skipped,
        compute_dtype=run.compute_dtype,
        progress=run.progress.step,
    )


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    decoder: Decoder,
    selections: Sequence[Selection],
    calibration: Calibration,
    token_weights: Callable[[Sequence[PrunableLinear]], Tensor],
    *,
    writers: Mapping[str, float],
    damping: float,
    residual_weight: float = 1.0,
    batch_size: int,
    skipped: Collection[int] = (),
    compute_dtype: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Change the dense ``model`` into one without the selected rows and columns that follows it as closely as it can.

    With the moments of :class:`~llm_surgeon.curvature.stages.Stage` the kept columns ``k`` of a linear become

        Ŵ[:, k] = (W X + ρ E + λ W)[:, k] (A[k, k] + λ I)⁻¹,    λ = damping mean(diag A[k, k]),

    which minimises ``Σ w ‖Ŵ x̂ - (W x + ρ e)‖² + λ ‖Ŵ - W‖²``: the sequential update of whole lines, where G says
    nothing, as every row is solved for by itself.

    Args:
        selections: one per linear, of rows and columns.
        token_weights, writers, batch_size, skipped, compute_dtype: see :func:`~llm_surgeon.curvature.stages.stages`.
        damping: towards the dense weights.
        residual_weight: ρ.
        progress: called as ``progress(linears_done, linears, name)``.

    Raises:
        NumericalError: a moment matrix is not positive definite; the message names the layer.
    """
    lines = dict(zip((linear.name for linear in decoder.linears), selections, strict=True))
    done, total = 0, sum(linear.depth not in skipped for linear in decoder.linears)
    for stage in stages(
        model,
        decoder,
        calibration,
        token_weights,
        writers=writers,
        batch_size=batch_size,
        skipped=skipped,
        compute_dtype=compute_dtype,
    ):
        for linear in stage.readers:
            if progress is not None:
                progress(done, total, linear.name)
            done += 1
            rows, columns = lines[linear.name].rows, lines[linear.name].columns
            assert rows is not None and columns is not None
            W = linear.matrix(stage.A.dtype)
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
            linear.write(new.masked_fill(rows[:, None], 0.0))
