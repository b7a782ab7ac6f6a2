"""Fit the linears of a pruned model to the activations of the dense one, block by block, by least squares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.curvature.factors import DampedFactor
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.block_batches import BlockBatch, record_batch
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.models.probe import agree
from surgeon_kernels import SymmetricAccumulator, gram_accumulate_


@torch.no_grad()
def reconstruct(
    model: PreTrainedModel,
    decoder: Decoder,
    dense: Sequence[nn.Module],
    writers: set[str],
    calibration: Calibration,
    *,
    damping: float,
    batch_size: int,
    skipped: Collection[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Change every linear so that the residual stream follows the dense model's as closely as it can.

    In order of execution, with ``a`` the pruned model's input of a linear (all linears before it being fitted already)
    and ``r`` what its output lacks, ``W += E[r aᵀ] (E[a aᵀ] + λ mean(diag) I)⁻¹``. For a linear that writes to the
    residual stream ``r`` also holds what the stream lacked before it and, for the last one before skipped blocks, what
    these would have added. Rows that are zero stay so, and so do the columns of inputs that are always zero.

    Args:
        dense: the decoder's blocks before pruning; where blocks are skipped and nothing else, they may be its own.
        writers: kinds of the linears whose outputs are added to the residual stream.
        damping: λ.
        skipped: depths of the blocks that the pruned model goes without.

    Raises:
        NumericalError: a moment matrix is not positive definite; the message names the layer.
    """
    device, blocks = model.get_input_embeddings().weight.device, decoder.blocks
    kept = [depth for depth in range(len(blocks)) if depth not in skipped]
    everything = nn.ModuleList([model, *dense])
    with evaluation_mode(everything), fused_pointwise(everything):
        batches = [record_batch(model, decoder, *batch) for batch in calibration.batches(batch_size, device)]
        streams = [batch.hidden for batch in batches]  # the dense model's

        def advance(depths: range) -> None:
            for depth in depths:
                for index, batch in enumerate(batches):
                    streams[index] = replace(batch, hidden=streams[index]).run(dense[depth], like=blocks[depth])

        advance(range(kept[0]))
        for depth, end in zip(kept, [*kept[1:], len(blocks)], strict=True):
            linears = [linear for linear in decoder.linears if linear.depth == depth]
            fit = _BlockFit(blocks[depth], linears, writers, batches)
            fit.run_dense(dense[depth], streams)
            advance(range(depth + 1, end))
            for group in dict.fromkeys(linear.input_group for linear in linears):
                fit.update([linear for linear in linears if linear.input_group == group], streams, damping)
            fit.finish()
            del fit  # the next block's activations would lie beside this one's
            if progress is not None:
                progress(depth + 1, len(blocks))


class _BlockFit:
    """One block's linears, with what they put out in the dense model and, once they are fitted, in the pruned one."""

    def __init__(
        self, block: nn.Module, linears: list[PrunableLinear], writers: set[str], batches: list[BlockBatch]
    ) -> None:
        self._block, self._linears, self._batches = block, linears, batches
        self._writers = [linear for linear in linears if linear.kind in writers]
        self._wanted: list[dict[str, Tensor]] = []  # by batch: the dense model's outputs of linears yet to be fitted
        self._fitted: list[dict[nn.Module, Tensor]] = [{} for _ in batches]
        self._lacking: list[Tensor] = []  # by batch: what the stream lacks where the next writer adds to it
        self._adds = False

    def run_dense(self, dense: nn.Module, streams: list[Tensor]) -> None:
        """Run the dense model's block on its streams, and note what its linears put out."""
        for index, batch in enumerate(self._batches):
            outputs: dict[str, Tensor] = {}
            stream = streams[index]
            with ExitStack() as hooks:
                for linear in self._linears:
                    module = dense.get_submodule(linear.kind)
                    hooks.enter_context(module.register_forward_hook(partial(_note, outputs, linear.kind)))
                streams[index] = replace(batch, hidden=stream).run(dense, like=self._block)
            if index == 0:  # with a norm behind a writer its output is not what is added to the stream
                parts = [outputs[writer.kind].view_as(stream) for writer in self._writers]
                self._adds = bool(parts) and agree(stream + torch.stack(parts).sum(dim=0), streams[0])
            self._wanted.append(outputs)
            self._lacking.append(stream - batch.hidden)
        self._own = list(streams)

    def update(self, readers: list[PrunableLinear], streams: list[Tensor], damping: float) -> None:
        """Fit the linears that read one input; ``streams`` are the dense model's where the next block begins."""
        ones = any(linear.has_bias for linear in readers)
        first = readers[0]
        dtype = torch.promote_types(first.module.get_parameter("weight").dtype, torch.float32)
        device = first.module.get_parameter("weight").device
        moment = SymmetricAccumulator.zeros(first.columns + ones, dtype=dtype, device=device)
        cross = {x.name: torch.zeros(x.rows, first.columns + ones, dtype=dtype, device=device) for x in readers}
        tokens = sum(batch.tokens for batch in self._batches)
        inputs = []
        for index, batch in enumerate(self._batches):
            a = self._input_of(first, index)
            inputs.append(a)
            mask = None if batch.mask is None else batch.mask.to(a.device).view(a.shape[:-1])
            gram_accumulate_(moment, a, mask=mask, ones_column=ones)
            for linear in readers:
                lack = self._wanted[index][linear.kind] - linear.module(a)
                if linear in self._writers and self._adds:
                    lack += self._lacking[index].view_as(lack)
                    if linear is self._writers[-1] and streams[index] is not self._own[index]:
                        lack += (streams[index] - self._own[index]).view_as(lack)
                lack = lack.reshape(-1, linear.rows)
                if mask is not None:
                    lack = lack * mask.reshape(-1, 1)
                cross[linear.name][:, : first.columns] += _product(lack, a.reshape(-1, a.shape[-1]))
                if ones:
                    cross[linear.name][:, -1] += lack.to(dtype).sum(dim=0)
        self._solve(readers, moment.full().div_(tokens), cross, tokens, damping)
        for index, a in enumerate(inputs):
            for linear in readers:
                output, wanted = linear.module(a), self._wanted[index].pop(linear.kind)
                self._fitted[index][linear.module] = output
                if linear in self._writers and self._adds:
                    self._lacking[index] = self._lacking[index] + (wanted - output).view_as(self._lacking[index])

    def finish(self) -> None:
        """Take the pruned model's streams through the fitted block."""
        for batch, known in zip(self._batches, self._fitted, strict=True):
            with _answering(known):
                batch.hidden = batch.run(self._block)

    def _input_of(self, linear: PrunableLinear, index: int) -> Tensor:
        handle = linear.module.register_forward_pre_hook(_stop)
        try:
            with _answering(self._fitted[index]):
                self._batches[index].run(self._block)
        except _Reached as reached:
            return reached.input
        finally:
            handle.remove()
        raise AssertionError(f"{linear.name} was not reached")

    def _solve(
        self, readers: list[PrunableLinear], moment: Tensor, cross: dict[str, Tensor], tokens: int, damping: float
    ) -> None:
        for linear in readers:
            size = linear.columns + linear.has_bias
            weight = linear.matrix(moment.dtype)
            zero_rows = (weight == 0.0).all(dim=1, keepdim=True)
            # Inputs that no longer count, be they zero (neurons) or not (heads whose keys and values others use).
            writes = linear in self._writers
            gone = (weight == 0.0).all(dim=0) if writes else torch.zeros_like(weight[0], dtype=torch.bool)
            own = moment[:size, :size].masked_fill(gone[:, None] | gone, 0.0)
            inverse = DampedFactor.checked(own, damping, f"inputs of {linear.name}").inverse
            delta = cross[linear.name][:, :size].div(tokens).masked_fill(gone, 0.0) @ inverse
            linear.write(weight + delta.masked_fill(zero_rows | gone, 0.0))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``xᵀ y``, summed in float32 at least."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.T, y, out_dtype=torch.float32)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype).T @ y.to(dtype)


@contextmanager
def _answering(outputs: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Context manager in which linears return what they are known to, whatever they are given; restored on exit."""
    for module, output in outputs.items():
        module.forward = partial(_known, output)
    try:
        yield
    finally:
        for module in outputs:
            del module.forward


def _known(output: Tensor, _: Tensor) -> Tensor:
    return output


def _note(found: dict[str, Tensor], kind: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    found[kind] = output


def _stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])


class _Reached(Exception):
    """Ends a block's forward pass at a linear whose input is known."""

    def __init__(self, input: Tensor) -> None:
        self.input = input
