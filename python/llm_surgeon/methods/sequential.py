"""The sequential update: linears in execution order, each aimed at what the dense model computes there.

At a linear ``x`` is its input in the dense model and ``x̂`` that in the pruned one, everything before it being pruned
already. Wanted are new weights that minimise, over the tokens with their weights ``w``,

    ½ E[w ‖Ŵ x̂ - (W x + ρ e)‖²_G],     e = (h - ĥ) / s,

where ``h`` is the residual stream to which ``s`` times the output is added, before that, and ``e`` is zero for linears
that do not write to it. With ``A = E[w x̂ x̂ᵀ]`` and ``r = W x + ρ e - W x̂``, what the output lacks, the free optimum,
damped towards ``W``, is

    T = W + E[w r x̂ᵀ] (A + λ mean(diag A) I)⁻¹,

and up to a constant the objective is ``½ tr((Ŵ - T)ᵀ G (Ŵ - T) A)``: that of the joint update, around ``T`` in place of
``W``. A bias is the weight of a constant 1 appended to ``x̂``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.curvature.factors import DampedFactor, KroneckerFactors, numerical_errors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.methods.select import Selection, reselect
from llm_surgeon.methods.update import LayerUpdate, remove_and_compensate
from llm_surgeon.models.block_batches import BlockBatch, record_batch
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.passes import evaluation_mode
from surgeon_kernels import SymmetricAccumulator, cholesky_with_jitter, element_cost, gram_accumulate_
from surgeon_kernels.linalg.half_products import addmm_half_


@dataclass(frozen=True)
class SequentialUpdate:
    """New weights of one linear.

    Attributes:
        update: the joint update around the target: ``delta`` is ``Ŵ - T``.
        jitter: what a factorisation needed beyond the damping.
        increase: ``½ tr((Ŵ - T)ᵀ G (Ŵ - T) A)``, nats per token, a scalar on the device: the part of the objective that
            pruning costs. What ``T`` itself leaves of the dense model's outputs is not in it, nor are the errors that
            later linears make up for.
    """

    update: LayerUpdate
    increase: Tensor
    jitter: float


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
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, SequentialUpdate]:
    """Select and update the weights of every linear in execution order, in place, and return what became of them.

    Both models' hidden states go from block to block side by side; of the dense weights no more than a block is kept.
    Linears that share their input are one stage: their moments are summed in one pass through both blocks up to there.

    Args:
        curvature: of the dense model, with ``G`` of every linear and, for weights of tokens, the squared norms of
            gradients. ``A`` is not read.
        selections: one per linear, as many of whose weights go, chosen anew; of N:M they are not read.
        writers: name and scale ``s`` of the linears that write to the residual stream; ``e`` is 0 for others.
        batch_size: windows per forward pass.
        progress: called as ``progress(linears_done, linears, name)``.

    Raises:
        NumericalError: NaN or infinity, or a factor that is not positive definite; the message names the layer. Earlier
            layers are already pruned.
    """
    device = model.get_input_embeddings().weight.device
    before = dict(zip((linear.name for linear in decoder.linears), selections, strict=True))
    done: dict[str, SequentialUpdate] = {}
    with evaluation_mode(model), fused_pointwise(model):
        batches = [record_batch(model, decoder, *batch) for batch in calibration.batches(batch_size, device)]
        streams = [batch.hidden for batch in batches]  # the dense model's
        for depth, block in enumerate(decoder.blocks):
            linears = [linear for linear in decoder.linears if linear.depth == depth]
            scales = {linear.kind: writers[linear.name] for linear in linears if linear.name in writers}
            pair = _BlockPair(block, scales, batches, streams)
            for group in dict.fromkeys(linear.input_group for linear in linears):
                readers = [linear for linear in linears if linear.input_group == group]
                norms = [curvature.squared_norms[linear.name] for linear in readers] if config.token_weights else []
                A, lack = pair.moments(readers, token_weights(norms, calibration), config.residual_weight)
                for linear, target, factors in _targets(readers, A, lack, curvature, config):
                    if progress is not None:
                        progress(len(done), len(decoder.linears), linear.name)
                    done[linear.name] = _update(linear, target, factors, before[linear.name], config)
            pair.advance()
    return done


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


def _targets(
    readers: Sequence[PrunableLinear], A: Tensor, lack: Mapping[str, Tensor], curvature: Curvature, config: PruneConfig
) -> Iterator[tuple[PrunableLinear, Tensor, KroneckerFactors]]:
    """Every linear of a stage with ``T = W + lack (A + λ mean(diag A) I)⁻¹`` ``[R, C']`` and its factors."""
    shared: dict[int, tuple[Tensor, DampedFactor]] = {}  # by C': of the linears with a bias, and of those without one
    for linear in readers:
        target = linear.matrix()
        width = target.shape[1]
        if width not in shared:
            own = A[:width, :width]
            with numerical_errors(f"target of {linear.name}"):
                cholesky, _ = cholesky_with_jitter(own, config.target_damping, name="A")
            shared[width] = cholesky, DampedFactor.checked(own.clone(), config.damp_a, f"A of {linear.name}")
        cholesky, a = shared[width]
        target += torch.cholesky_solve(lack[linear.name][:, :width].T, cholesky).T
        G = curvature.output_factor(linear).to(target.device)
        yield linear, target, KroneckerFactors(DampedFactor.checked(G, config.damp_g, f"G of {linear.name}"), a)


def _update(
    linear: PrunableLinear, target: Tensor, factors: KroneckerFactors, before: Selection, config: PruneConfig
) -> SequentialUpdate:
    """Select as many weights as ``before`` and solve for the others around the ``target``; write the new ones."""
    g, a = factors.inverse_diagonals
    cost = element_cost(target[:, : linear.columns], 1.0 / g, 1.0 / a[: linear.columns])
    # Of all groups of N:M.
    previous = torch.ones_like(before.pruned) if config.selects_in_update else before.pruned
    selection = Selection(reselect(previous, cost, config))
    update = remove_and_compensate(target, selection, factors, config, linear.name)
    linear.write(update.weight)
    return SequentialUpdate(update, factors.predicted_increase(update.delta), max(factor.jitter for factor in factors))


class _BlockPair:
    """A block that is being pruned beside a copy of it that is not, and the hidden states that both are given.

    ``scales`` has the scale ``s`` of the block's writers by their kinds; ``streams``, the dense model's hidden states
    by batch, is changed in place when the pair moves on.
    """

    def __init__(
        self, block: nn.Module, scales: Mapping[str, float], batches: Sequence[BlockBatch], streams: list[Tensor]
    ) -> None:
        self._block, self._dense = block, copy.deepcopy(block)
        self._scales, self._batches, self._streams = scales, batches, streams

    def moments(
        self, readers: Sequence[PrunableLinear], weights: Tensor, residual_weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``A = E[w x̂ x̂ᵀ]`` ``[C', C']`` and of every linear by name ``E[w r x̂ᵀ]`` ``[R, C']``.

        C' = C + 1 where any of ``readers``, which share the input and are not pruned yet, has a bias.
        """
        first, ones = readers[0], any(linear.has_bias for linear in readers)
        dtype, device = torch.promote_types(first.weight.dtype, torch.float32), first.weight.device
        A = SymmetricAccumulator.zeros(first.columns + ones, dtype=dtype, device=device)
        lack = {x.name: torch.zeros(x.rows, first.columns + ones, dtype=dtype, device=device) for x in readers}
        of_batches = weights.to(device, dtype).split([len(batch.hidden) for batch in self._batches])
        for batch, stream, w in zip(self._batches, self._streams, of_batches, strict=True):
            root = w.sqrt().reshape(-1, 1)
            x, outputs = self._run_to(self._block, batch, readers)
            _, wanted = self._run_to(self._dense, replace(batch, hidden=stream), readers)
            inputs = _weighted(x, root).to(x.dtype)
            if ones:
                inputs = torch.cat([inputs, root.to(x.dtype)], dim=1)
            gram_accumulate_(A, inputs)
            for linear in readers:
                r = _difference(wanted[linear.kind], outputs[linear.kind])
                if linear.kind in self._scales:
                    e = _difference(stream, batch.hidden).to(device)
                    for kind, scale in self._scales.items():
                        if kind in outputs and kind != linear.kind:  # it has added before
                            e += scale * _difference(wanted[kind], outputs[kind]).view_as(e)
                    r += residual_weight / self._scales[linear.kind] * e.view_as(r)
                _add_product_(lack[linear.name], _weighted(r, root).to(x.dtype), inputs)
        total = weights.sum().to(device, dtype)
        return A.full().div_(total), {name: part.div_(total) for name, part in lack.items()}

    def advance(self) -> None:
        """Take the hidden states of both models through their blocks."""
        for index, batch in enumerate(self._batches):
            dense = replace(batch, hidden=self._streams[index])
            self._streams[index] = dense.run(self._dense, like=self._block)
            batch.hidden = batch.run(self._block)

    def _run_to(
        self, block: nn.Module, batch: BlockBatch, readers: Sequence[PrunableLinear]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Input of ``readers`` in a run of ``block`` that ends with them, outputs of them and of writers until then."""
        outputs: dict[str, Tensor] = {}
        inputs: list[Tensor] = []
        kinds = {linear.kind for linear in readers}

        def note(kind: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[kind] = output.clone()  # some models add to it in place
            if kind == readers[0].kind:
                inputs.append(args[0])
            if kinds <= outputs.keys():
                raise _Reached

        with ExitStack() as hooks:
            for kind in {*kinds, *self._scales}:
                hooks.enter_context(block.get_submodule(kind).register_forward_hook(partial(note, kind)))
            with suppress(_Reached):
                batch.run(block, like=self._block)
        return inputs[0], outputs


class _Reached(Exception):
    """Ends a block's forward pass once its last wanted linear has run."""


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """``x - y``, not rounded to 16 bits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) - y.to(dtype)


def _weighted(x: Tensor, root: Tensor) -> Tensor:
    """``√w x`` as rows ``[tokens, n]``, zero where ``root`` ``[tokens, 1]``, ``√w``, is zero, whatever ``x`` holds."""
    return (x.reshape(len(root), -1) * root).masked_fill_(root == 0.0, 0.0)


def _add_product_(out: Tensor, x: Tensor, y: Tensor) -> None:
    """``out += xᵀ y``, summed in ``out``'s dtype."""
    if y.is_cuda and y.dtype in (torch.bfloat16, torch.float16):
        addmm_half_(out, x.T, y)
    else:
        out.addmm_(x.T.to(out.dtype), y.to(out.dtype))
