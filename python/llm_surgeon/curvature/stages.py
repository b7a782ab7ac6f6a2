"""Moments of the inputs of linears in two models side by side, in execution order, each at its turn to be changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.block_batches import BlockBatch, record_batch
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.passes import autocast, evaluation_mode
from llm_surgeon.models.replay import Replay
from surgeon_kernels import SymmetricAccumulator, gram_accumulate_
from surgeon_kernels.linalg.half_products import addmm_half_


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
        out.
    """
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model), fused_pointwise(model):
        batches = [record_batch(model, decoder, *batch) for batch in calibration.batches(batch_size, device)]
        streams = [batch.hidden for batch in batches]  # the dense model's
        kept = [depth for depth in range(len(decoder.blocks)) if depth not in skipped]
        for block in decoder.blocks[: kept[0]]:
            streams = [_run(block, replace(b, hidden=h), compute_dtype) for b, h in zip(batches, streams, strict=True)]
        for depth, following in zip(kept, [*kept[1:], len(decoder.blocks)], strict=True):
            linears = [linear for linear in decoder.linears if linear.depth == depth]
            blocks = decoder.blocks[depth:following]
            pair = _BlockPair(blocks, linears, writers, batches, streams, compute_dtype)
            for group in dict.fromkeys(linear.input_group for linear in linears):
                readers = [linear for linear in linears if linear.input_group == group]
                yield pair.reach(readers, token_weights(readers))
                pair.changed(readers)
            pair.advance()


@dataclass
class _Dense:
    """Of a batch: a block's inputs in the dense model, and what the other model's residual stream lacks.

    Attributes:
        inputs: by input group, of stages that are still to come.
        lack: ``h - ĥ`` where the next writer adds to the stream.
        skipped: what blocks that the other model goes without add to the stream after this one; ``None`` of none.
    """

    inputs: dict[str, Tensor]
    lack: Tensor
    skipped: Tensor | None = None


class _BlockPair:
    """A block that is being changed beside the dense model's, whose ``streams`` by batch go through it at once.

    The first of ``blocks`` is the one, and those after it the other model goes without.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        linears: Sequence[PrunableLinear],
        writers: Mapping[str, float],
        batches: Sequence[BlockBatch],
        streams: list[Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        self._block, self._writers, self._batches, self._dtype = blocks[0], writers, batches, dtype
        self._replay, self._left = Replay(len(batches)), {linear.kind for linear in linears}
        self._last = next((linear.name for linear in reversed(linears) if linear.name in writers), None)
        self._inputs: list[Tensor] = []  # by batch: of the writers of the stage under way
        self._dense = []
        for index, batch in enumerate(batches):
            known = _Dense({}, _difference(streams[index], batch.hidden))
            with ExitStack() as hooks:
                for linear in linears:
                    if linear.name == linear.input_group:
                        note = partial(self._note, known.inputs, linear.input_group)
                        hooks.enter_context(linear.module.register_forward_pre_hook(note))
                own = streams[index] = _run(blocks[0], replace(batch, hidden=streams[index]), dtype)
            for block in blocks[1:]:
                streams[index] = _run(block, replace(batch, hidden=streams[index]), dtype)
                known.skipped = _difference(streams[index], own)
            self._dense.append(known)

    def reach(self, readers: Sequence[PrunableLinear], weights: Tensor) -> Stage:
        """The moments of ``readers``, which share their input and are the dense model's still."""
        first, ones = readers[0], any(linear.has_bias for linear in readers)
        dtype, device = torch.promote_types(first.weight.dtype, torch.float32), first.weight.device
        size, writer = first.columns + ones, self._writer(readers)
        A = SymmetricAccumulator.zeros(size, dtype=dtype, device=device)
        cross = torch.zeros(size, size, dtype=dtype, device=device)
        residual = {} if writer is None else {writer.name: cross.new_zeros(writer.rows, size)}
        weights = weights.to(device, dtype)
        of_batches = (weights / weights.sum()).split([len(batch.hidden) for batch in self._batches])
        for index, (known, w) in enumerate(zip(self._dense, of_batches, strict=True)):
            root = w.sqrt().reshape(-1, 1)
            x, own = known.inputs.pop(first.input_group), self._input_of(first, index)
            inputs = _weighted(own, root, ones)
            gram_accumulate_(A, inputs)
            _add_product_(cross, _weighted(x, root, ones), inputs)
            if writer is not None:
                scale = self._writers[writer.name]
                if known.skipped is not None and writer.name == self._last:
                    known.lack += known.skipped
                lack = _weighted(known.lack, root).div_(scale).to(inputs.dtype)
                _add_product_(residual[writer.name], lack, inputs)
                known.lack.add_(self._output(writer, x).view_as(known.lack), alpha=scale)
                self._inputs.append(own)
        return Stage(readers, A.full(), cross, residual)

    def changed(self, readers: Sequence[PrunableLinear]) -> None:
        """Take note that ``readers`` have their new weights."""
        writer = self._writer(readers)
        for known, own in zip(self._dense, self._inputs, strict=False):
            assert writer is not None
            known.lack.sub_(self._output(writer, own).view_as(known.lack), alpha=self._writers[writer.name])
        self._inputs.clear()
        self._left -= {linear.kind for linear in readers}
        for name, child in self._block.named_children():
            inside = {linear.kind for linear in readers if f"{linear.kind}.".startswith(f"{name}.")}
            if inside and not any(f"{kind}.".startswith(f"{name}.") for kind in self._left):
                self._replay.add(child)

    def advance(self) -> None:
        """Take the hidden states of the model that is being changed through the block."""
        for index, batch in enumerate(self._batches):
            with self._replay.running(index):
                batch.hidden = _run(self._block, batch, self._dtype)

    def _output(self, linear: PrunableLinear, x: Tensor) -> Tensor:
        with autocast(x.device, self._dtype):
            return linear.module(x)

    def _writer(self, readers: Sequence[PrunableLinear]) -> PrunableLinear | None:
        """The one of ``readers`` that makes up for what the stream lacks: several would do it over again."""
        return next((linear for linear in readers if linear.name in self._writers), None)

    def _input_of(self, linear: PrunableLinear, index: int) -> Tensor:
        found: dict[str, Tensor] = {}

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._note(found, linear.kind, module, args)
            raise _Reached

        handle = linear.module.register_forward_pre_hook(stop)
        try:
            with self._replay.running(index), suppress(_Reached):
                _run(self._block, self._batches[index], self._dtype)
        finally:
            handle.remove()
        return found[linear.kind]

    def _note(self, found: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0] if self._dtype is None else args[0].to(self._dtype)


class _Reached(Exception):
    """Ends a block's forward pass at a linear whose input is known."""


def _run(block: nn.Module, batch: BlockBatch, dtype: torch.dtype | None) -> Tensor:
    with autocast(batch.hidden.device, dtype):
        return batch.run(block)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """``x - y``, not rounded to 16 bits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) - y.to(dtype)


def _weighted(x: Tensor, root: Tensor, ones: bool = False) -> Tensor:
    """``√w x`` as rows ``[tokens, n]``, with ``√w`` after them where ``ones``; zero where ``√w`` ``[tokens, 1]`` is.

    In x's dtype, whatever the rows without weight hold.
    """
    rows = (x.reshape(len(root), -1) * root).masked_fill_(root == 0.0, 0.0).to(x.dtype)
    return torch.cat([rows, root.to(x.dtype)], dim=1) if ones else rows


def _add_product_(out: Tensor, x: Tensor, y: Tensor) -> None:
    """``out += xᵀ y``, summed in ``out``'s dtype."""
    if y.is_cuda and y.dtype in (torch.bfloat16, torch.float16):
        addmm_half_(out, x.T, y)
    else:
        out.addmm_(x.T.to(out.dtype), y.to(out.dtype))
