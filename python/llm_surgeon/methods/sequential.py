"""The sequential update: linears in execution order, each aimed at what the dense model computes there.

At a linear ``x`` is its input in the dense model and ``x̂`` that in the pruned one, everything before it being pruned
already. Wanted are new weights that minimise, over the tokens with their weights ``w``,

    ½ Σ w ‖Ŵ x̂ - (W x + ρ e)‖²_G,     e = (h - ĥ) / s,

where ``h`` is the residual stream to which ``s`` times the output is added, before that, and ``e`` is zero for linears
that do not write to it. With ``A = Σ w x̂ x̂ᵀ``, ``X = Σ w x x̂ᵀ`` and ``E = Σ w e x̂ᵀ`` the free optimum, damped towards
``W``, is

    T = W + W (X - A)(A + λ I)⁻¹ + ρ E (A + μ I)⁻¹,

with ``λ`` and ``μ`` relative to ``mean(diag A)``. Up to a constant the objective is ``½ tr((Ŵ - T)ᵀ G (Ŵ - T) A)``:
that of the joint update, around ``T`` in place of ``W``. A bias is the weight of a constant 1 appended to ``x``, ``x̂``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.curvature.factors import DampedFactor, KroneckerFactors
from llm_surgeon.curvature.stages import Stage, stages
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import Ranks
from llm_surgeon.methods.select import Selection, reselect
from llm_surgeon.methods.update import Written, remove_and_compensate
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.offload import PinnedMemory
from surgeon_kernels import element_cost


@torch.no_grad()
def update_sequentially(
    model: PreTrainedModel,
    decoder: Decoder,
    calibration: Calibration,
    curvature: Curvature,
    selections: Sequence[Selection],
    config: PruneConfig,
    *,
    writers: Mapping[str, float],
    batch_size: int,
    compute_dtype: torch.dtype | None = None,
    memory: PinnedMemory | None = None,
    taken: Callable[[int], bool] = lambda _: False,
    owners: Mapping[str, int] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[tuple[PrunableLinear, Written]]:
    """Select and update the weights of every linear in execution order, in place, and yield what became of them.

    Predicted increases are ``½ tr((Ŵ - T)ᵀ G (Ŵ - T) A)``: the part of the objective that pruning costs. What ``T``
    itself leaves of the dense model's outputs is not in it, nor are the errors that later linears make up for.

    Args:
        curvature: of the dense model, or of one that is pruned in part, with ``G`` of every linear (of several ranks on
            its owner) and, for weights of tokens, the squared norms of gradients. ``A`` is not read.
        selections: one per linear, as many of whose weights go, chosen anew; of N:M they are read only where some
            linears stay dense, which get their target ``T``.
        writers: name and scale ``s`` of the linears that write to the residual stream; ``e`` is 0 for others.
        batch_size: windows per forward pass.
        compute_dtype, memory, taken: see :func:`~llm_surgeon.curvature.stages.stages`.
        owners: by linears' names the ranks, of the calibration data's, that select and solve; the first where left out.
        progress: called as ``progress(linears_done, linears, name)``.

    Raises:
        NumericalError: NaN or infinity, or a factor that is not positive definite; the message names the layer. Earlier
            layers are already pruned.
    """
    before = dict(zip((linear.name for linear in decoder.linears), selections, strict=True))
    ranks, done = calibration.ranks, 0

    def owner(linear: PrunableLinear) -> int:
        return 0 if owners is None else owners[linear.name]

    def solve(stage: Stage, aims: Targets, begun: Mapping[str, Tensor], linear: PrunableLinear) -> Written:
        if progress is not None:
            progress(done + stage.readers.index(linear), len(decoder.linears), linear.name)
        target, a = aims.of(linear, begun.get(linear.name))
        G = curvature.output_factor(linear, target.device)
        factors = KroneckerFactors(DampedFactor.checked(G, config.damp_g, f"G of {linear.name}"), a)
        return _update(linear, target, factors, before[linear.name].to(target.device), config)

    def weights_of(readers: Sequence[PrunableLinear]) -> Tensor:
        known = curvature.squared_norms
        norms = [known[linear.name] for linear in readers] if known else []
        return token_weights(norms, calibration)

    for stage in stages(
        model,
        decoder,
        calibration,
        weights_of,
        writers=writers,
        batch_size=batch_size,
        compute_dtype=compute_dtype,
        memory=memory,
        taken=taken,
    ):
        aims = Targets(stage, config)
        begun = begun_by_others(ranks, stage.readers, owner, aims)
        solved = ranks.spread(stage.readers, owner, partial(solve, stage, aims, begun))
        for linear, new in zip(stage.readers, solved, strict=True):
            linear.share(ranks, owner(linear))
            yield linear, new
        done += len(stage.readers)


def token_weights(squared_norms: Sequence[Tensor], calibration: Calibration) -> Tensor:
    """Weights of tokens ``[samples, seqlen]``, zero at padding: ``Σ min(1, |g|² / mean |g|²)`` over linears.

    Attention sinks have large inputs and no gradient: unweighted they would bend the moments towards themselves.
    Clipped, so that no few tokens rule. Without norms, or any gradient, every token counts alike.
    """
    ids, mask = calibration.input_ids, calibration.attention_mask
    real = torch.ones(ids.shape) if mask is None else mask.float()
    total = torch.zeros_like(real)
    for norms in squared_norms:
        mean = norms.sum() / real.sum()
        total = total.to(norms) + (norms / mean.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    return torch.where(total.sum() > 0, total, real.to(total))


class Targets:
    """``T = W + W (X - A)(A + λ I)⁻¹ + ρ E (A + μ I)⁻¹`` ``[R, C']`` of linears of a stage, and damped ``A``."""

    def __init__(self, stage: Stage, config: PruneConfig) -> None:
        self._stage, self._config = stage, config
        # By C', of the linears with a bias and of those without one: (X - A)(A + λ I)⁻¹, and A with (A + μ I)⁻¹.
        self._lost: dict[int, Tensor] = {}
        self._factors: dict[int, tuple[DampedFactor, Tensor | None]] = {}

    def of(self, linear: PrunableLinear, begun: Tensor | None = None) -> tuple[Tensor, DampedFactor]:
        """``T``, in the memory of ``begun``, which is what :meth:`begin` gives, and damped ``A``."""
        target = self.begin(linear) if begun is None else begun
        a, for_residual = self.factors(linear)
        if for_residual is not None and linear.name in self._stage.residual:
            residual = self._stage.residual[linear.name][:, : target.shape[1]]
            target.addmm_(residual, for_residual, alpha=self._config.residual_weight)
        return target, a

    def begin(self, linear: PrunableLinear) -> Tensor:
        """``W + W (X - A)(A + λ I)⁻¹``, for which :meth:`factors` are not needed."""
        W = linear.matrix()
        size = W.shape[1]
        if size not in self._lost:
            inverse = self._damped(linear, self._config.target_damping).inverse
            self._lost[size] = (self._stage.cross[:size, :size] - self._stage.A[:size, :size]) @ inverse
        return torch.addmm(W, W, self._lost[size])

    def factors(self, linear: PrunableLinear) -> tuple[DampedFactor, Tensor | None]:
        """Damped ``A``, and ``(A + μ I)⁻¹`` where a linear of the stage adds to the residual stream."""
        size = linear.columns + linear.has_bias
        if size not in self._factors:
            writes = bool(self._stage.residual)
            for_residual = self._damped(linear, self._config.residual_damping).inverse if writes else None
            self._factors[size] = self._damped(linear, self._config.damp_a), for_residual
        return self._factors[size]

    def _damped(self, linear: PrunableLinear, damping: float) -> DampedFactor:
        size = linear.columns + linear.has_bias
        return DampedFactor.checked(self._stage.A[:size, :size].clone(), damping, f"A of {linear.name}")


def begun_by_others(
    ranks: Ranks, readers: Sequence[PrunableLinear], owner: Callable[[PrunableLinear], int], aims: Targets
) -> dict[str, Tensor]:
    """By linears' names what :meth:`Targets.begin` gives, computed by ranks that own none of the ``readers``.

    Owners compute :meth:`Targets.factors` meanwhile. Nothing where every rank owns a reader.
    """
    idle = sorted(set(range(ranks.count)) - set(map(owner, readers)))
    if not idle:
        return {}
    helpers = {linear.name: idle[index % len(idle)] for index, linear in enumerate(readers)}
    turns = [(linear, rank) for linear in readers for rank in (helpers[linear.name], owner(linear))]

    def work(turn: tuple[PrunableLinear, int]) -> Tensor | None:
        linear, rank = turn
        if rank in idle:
            return aims.begin(linear)
        aims.factors(linear)
        return None

    found = zip(turns, ranks.spread(turns, lambda turn: turn[1], work), strict=True)
    return {linear.name: part for (linear, _), part in found if part is not None}


def _update(
    linear: PrunableLinear, target: Tensor, factors: KroneckerFactors, before: Selection, config: PruneConfig
) -> Written:
    """Select as many weights as ``before`` and solve for the others around the ``target``; write the new ones."""
    g, a = factors.inverse_diagonals
    cost = element_cost(target[:, : linear.columns], 1.0 / g, 1.0 / a[: linear.columns])
    # Of all groups of N:M, unless some linears stay dense.
    every = config.structure_record.m > 0 and not config.dense_fraction
    previous = torch.ones_like(before.pruned) if every else before.pruned
    selection = Selection(reselect(previous, cost, config))
    update = remove_and_compensate(target, selection, factors, config, linear.name)
    linear.write(update.weight)
    increase, jitter = factors.predicted_increase(update.delta), max(factor.jitter for factor in factors)
    return Written.of(update, increase, jitter, changed=True)
