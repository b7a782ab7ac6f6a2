"""Moments of the inputs of linears in two models side by side, in execution order, each at its turn to be changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import Ranks
from llm_surgeon.models.batch_tensors import BatchTensors
from llm_surgeon.models.block_batches import BlockBatch, record_batches
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.offload import PinnedMemory, resident
from llm_surgeon.models.passes import autocast, evaluation_mode
from llm_surgeon.models.replay import Replay
from surgeon_kernels import SymmetricAccumulator, gram_accumulate_
from surgeon_kernels.linalg.half_products import addmm_half_, aligned_empty


@dataclass(frozen=True)
class Stage:
    """Linears that read one input, and moments of it where all linears before them have been changed.

    With ``x`` the input in the dense model, ``x̂`` in the other one, ``w`` the tokens' weights, summing to 1, and ``e``
    what the residual stream lacks where a linear adds to it, over the scale that it adds with:

    Attributes:
        readers: the linears.
        A: ``Σ w x̂ x̂ᵀ`` ``[C', C']``, C' = C + 1 where a reader has a bias: its input is a constant 1 besides.
        cross: ``Σ w x x̂ᵀ`` ``[C', C']``.
        residual: ``Σ w e x̂ᵀ`` ``[R, C']`` of those that write to the residual stream, by name.
    """

    readers: Sequence[PrunableLinear]
    A: Tensor
    cross: Tensor
    residual: Mapping[str, Tensor]


@torch.no_grad()
def stages(
    model: PreTrainedModel,
    decoder: Decoder,
    calibration: Calibration,
    token_weights: Callable[[Sequence[PrunableLinear]], Tensor],
    *,
    writers: Mapping[str, float],
    batch_size: int,
    skipped: Collection[int] = (),
    compute_dtype: torch.dtype | None = None,
    memory: PinnedMemory | None = None,
    taken: Callable[[int], bool] = lambda _: False,
) -> Iterator[Stage]:
    """Yield the stages of every block; the caller may write new weights of its readers before it asks for the next one.

    The dense model is ``model`` as it is at first: its hidden states go ahead by a block. Of each block they are kept
    with the inputs of its stages, and every module of the other model runs twice at most: up to its last linear, and
    when that has been changed.

    Args:
        token_weights: weights ``[samples, seqlen]`` of tokens for linears, zero at padding; of any positive sum.
        writers: name and scale ``s`` of linears that write to the residual stream. batch_size: windows per forward
        pass. skipped: depths of blocks that the dense model alone goes through; the last writer before them lacks what
        they add. compute_dtype: blocks run under autocast to it, and inputs are rounded to it; as they are where left
        out. memory: takes the hidden states and inputs of the batches that are not at work; on the device where left
        out. taken: writes the new weights of a block of some depth, where they are known already, which then has no
        stages.
    """
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model), fused_pointwise(model):
        ranks, own = calibration.ranks, calibration.own
        run, dense_run, kept = _BlockRuns(compute_dtype), _BlockRuns(compute_dtype), BatchTensors(device, memory)
        for index, batch in enumerate(record_batches(model, decoder, calibration.batches(batch_size, device))):
            kept.put(index, _STREAM, batch.hidden)
            kept.put(index, _OWN, batch.hidden)
            run.add(batch)
            dense_run.add(batch.apart())
        depths = [depth for depth in range(len(decoder.blocks)) if depth not in skipped]
        for block in decoder.blocks[: depths[0]]:
            for index, held in enumerate(kept.turns(_STREAM)):
                kept.put(index, _STREAM, dense_run(block, index, held[_STREAM]))
        for depth, following in zip(depths, [*depths[1:], len(decoder.blocks)], strict=True):
            linears = [linear for linear in decoder.linears if linear.depth == depth]
            blocks = decoder.blocks[depth:following]
            with resident(blocks[0], device):
                pair = _BlockPair(blocks, linears, writers, kept, run, dense_run)
                if not taken(depth):
                    for group in dict.fromkeys(linear.input_group for linear in linears):
                        readers = [linear for linear in linears if linear.input_group == group]
                        yield pair.reach(readers, token_weights(readers), ranks, own)
                        pair.changed(readers)
                pair.advance()


# What is kept of a batch: hidden states of the dense model and of the other one, what the latter lack where the next
# writer adds to them, what blocks that it goes without add after this one, and inputs of the writer under way. Besides
# the dense model's inputs of stages that are still to come, by the names of their groups, and modules' answers.
_STREAM, _OWN, _LACK, _SKIPPED, _READ = range(5)


class _BlockRuns:
    """Runs of blocks with the arguments of a batch, under autocast to ``dtype`` if there is one.

    Attributes:
        sizes: windows of every batch.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype, self.sizes = dtype, list[int]()
        self._batches: list[BlockBatch] = []

    def add(self, batch: BlockBatch) -> None:
        """Run the next batch, too, whose hidden states are kept elsewhere."""
        self.sizes.append(len(batch.hidden))
        self._batches.append(replace(batch, hidden=batch.hidden.new_empty(0)))

    def __call__(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        with autocast(hidden.device, self.dtype):
            return replace(self._batches[index], hidden=hidden).run(block)


class _BlockPair:
    """A block that is being changed beside the dense model's, whose hidden states go through it at once.

    The first of ``blocks`` is the one, and those after it the other model goes without.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        linears: Sequence[PrunableLinear],
        writers: Mapping[str, float],
        kept: BatchTensors,
        run: _BlockRuns,
        dense_run: _BlockRuns,
    ) -> None:
        self._block, self._writers, self._kept, self._run = blocks[0], writers, kept, run
        self._replay, self._left = Replay(kept), {linear.kind for linear in linears}
        self._groups = {linear.input_group for linear in linears}
        self._last = next((linear.name for linear in reversed(linears) if linear.name in writers), None)
        for index, held in enumerate(kept.turns(_STREAM, _OWN)):
            inputs: dict[str, Tensor] = {}
            kept.put(index, _LACK, _difference(held[_STREAM], held[_OWN]))
            kept.drop(index, _SKIPPED)
            with ExitStack() as hooks:
                for linear in linears:
                    if linear.name == linear.input_group:
                        note = partial(self._note, inputs, linear.input_group)
                        hooks.enter_context(linear.module.register_forward_pre_hook(note))
                own = stream = dense_run(blocks[0], index, held[_STREAM])
            for block in blocks[1:]:
                stream = dense_run(block, index, stream)
            if len(blocks) > 1:
                kept.put(index, _SKIPPED, _difference(stream, own))
            for group, x in inputs.items():
                kept.put(index, group, x)
            kept.put(index, _STREAM, stream)

    def reach(self, readers: Sequence[PrunableLinear], weights: Tensor, ranks: Ranks, share: slice) -> Stage:
        """The moments, over the windows of all ``ranks``, of ``readers``, which share their input and are the dense
        model's still; ``share`` are the windows that this rank goes through.
        """
        first, ones = readers[0], any(linear.has_bias for linear in readers)
        dtype, device = torch.promote_types(first.weight.dtype, torch.float32), first.weight.device
        size, writer, group = first.columns + ones, self._writer(readers), first.input_group
        A = SymmetricAccumulator.zeros(size, dtype=dtype, device=device)
        cross = aligned_empty((size, size), dtype, device).zero_()
        residual = {} if writer is None else {writer.name: aligned_empty((writer.rows, size), dtype, device).zero_()}
        weights = weights.to(device, dtype)
        # About 1, so that weighted inputs are normal numbers of 16 bits; by powers of 4, whose roots round nothing.
        enlarged = 4.0 ** math.ceil(math.log(weights.numel(), 4))
        of_batches = (weights / weights.sum() * enlarged)[share].split(self._run.sizes)
        for index, held in enumerate(self._kept.turns(_OWN, group, *self._added(writer), *self._replay.modules)):
            x, own = held[group], self._input_of(first, index, held)
            root = of_batches[index].sqrt().reshape(-1, 1)
            inputs = _weighted(own, root, ones)
            gram_accumulate_(A, inputs)
            _add_product_(cross, _weighted(x, root, ones), inputs)
            self._kept.drop(index, group)
            if writer is not None:
                scale, lack = self._writers[writer.name], held[_LACK].to(device)
                if _SKIPPED in held:
                    lack = lack + held[_SKIPPED].to(device)
                wanted = _weighted(lack, root).div_(scale).to(inputs.dtype)
                _add_product_(residual[writer.name], wanted, inputs)
                self._kept.put(index, _LACK, lack.add(self._output(writer, x).view_as(lack), alpha=scale))
                self._kept.put(index, _READ, own)
        for total in (A.storage, cross, *residual.values()):
            ranks.sum_(total)
        sums = (A.full(), cross, *residual.values())
        A_full, cross, *rest = (total.div_(enlarged) for total in sums)
        return Stage(readers, A_full, cross, dict(zip(residual, rest, strict=True)))

    def changed(self, readers: Sequence[PrunableLinear]) -> None:
        """Take note that ``readers`` have their new weights."""
        writer = self._writer(readers)
        if writer is not None:
            for index, held in enumerate(self._kept.turns(_LACK, _READ)):
                lack, output = held[_LACK], self._output(writer, held[_READ])
                self._kept.put(index, _LACK, lack.sub(output.view_as(lack), alpha=self._writers[writer.name]))
                self._kept.drop(index, _READ)
        self._left -= {linear.kind for linear in readers}
        for name, child in self._block.named_children():
            inside = {linear.kind for linear in readers if f"{linear.kind}.".startswith(f"{name}.")}
            if inside and not any(f"{kind}.".startswith(f"{name}.") for kind in self._left):
                self._replay.add(child)

    def advance(self) -> None:
        """Take the hidden states of the model that is being changed through the block."""
        for index, held in enumerate(self._kept.turns(_OWN, *self._replay.modules)):
            with self._replay.running(index, held, last=True):
                self._kept.put(index, _OWN, self._run(self._block, index, held[_OWN]))
        self._replay.clear()
        for group in self._groups:
            self._kept.drop_all(group)

    def _added(self, writer: PrunableLinear | None) -> list[int]:
        """What a writer's addend makes up for."""
        if writer is None:
            return []
        return [_LACK, _SKIPPED] if writer.name == self._last else [_LACK]

    def _output(self, linear: PrunableLinear, x: Tensor) -> Tensor:
        with autocast(x.device, self._run.dtype):
            return linear.module(x)

    def _writer(self, readers: Sequence[PrunableLinear]) -> PrunableLinear | None:
        """The one of ``readers`` that makes up for what the stream lacks: several would do it over again."""
        return next((linear for linear in readers if linear.name in self._writers), None)

    def _input_of(self, linear: PrunableLinear, index: int, held: Mapping[Any, Any]) -> Tensor:
        found: dict[str, Tensor] = {}

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._note(found, linear.kind, module, args)
            raise _Reached

        handle = linear.module.register_forward_pre_hook(stop)
        try:
            with self._replay.running(index, held), suppress(_Reached):
                self._run(self._block, index, held[_OWN])
        finally:
            handle.remove()
        return found[linear.kind]

    def _note(self, found: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0] if self._run.dtype is None else args[0].to(self._run.dtype)


class _Reached(Exception):
    """Ends a block's forward pass at a linear whose input is known."""


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """``x - y``, not rounded to 16 bits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) - y.to(x.device, dtype)


def _weighted(x: Tensor, root: Tensor, ones: bool = False) -> Tensor:
    """``√w x`` as rows ``[tokens, n]``, with ``√w`` after them where ``ones``; zero where ``√w`` ``[tokens, 1]`` is.

    In x's dtype, whatever the rows without weight hold; rows begin at multiples of 16 bytes.
    """
    rows = (x.reshape(len(root), -1) * root).masked_fill_(root == 0.0, 0.0).to(x.dtype)
    if not ones:
        return rows
    width = rows.shape[1] + 1
    return torch.cat([rows, root.to(x.dtype), rows.new_zeros(len(rows), -width % 8)], dim=1)[:, :width]


def _add_product_(out: Tensor, x: Tensor, y: Tensor) -> None:
    """``out += xᵀ y``, summed in ``out``'s dtype."""
    if y.is_cuda and y.dtype in (torch.bfloat16, torch.float16):
        addmm_half_(out, x.T, y)
    else:
        out.addmm_(x.T.to(out.dtype), y.to(out.dtype))
