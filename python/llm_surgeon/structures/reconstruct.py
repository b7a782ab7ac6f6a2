"""Fit the linears of a pruned model to the activations of the dense one, block by block, by least squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.data import Calibration
from llm_surgeon.errors import NumericalError
from llm_surgeon.fused import fused
from llm_surgeon.models import Decoder, PrunableLinear, evaluation_mode
from llm_surgeon.sparsegpt import BlockBatch, record_batch
from llm_surgeon.structures.probe import agree
from surgeon_kernels import NotPositiveDefiniteError, SymmetricAccumulator, gram_accumulate_, spd_inverse


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
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Change every linear so that the residual stream follows the dense model's as closely as it can.

    In order of execution, with ``a`` the pruned model's input of a linear (all linears before it being fitted already)
    and ``r`` what its output lacks, ``W += E[r aᵀ] (E[a aᵀ] + λ mean(diag) I)⁻¹``. For a linear that writes to the
    residual stream ``r`` also holds what the stream lacked before it. Rows that are zero stay so, and so do the columns
    of inputs that are always zero.

    Args:
        dense: the decoder's blocks before pruning.
        writers: kinds of the linears whose outputs are added to the residual stream.
        damping: λ.

    Raises:
        NumericalError: a moment matrix is not positive definite; the message names the layer.
    """
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model), fused(nn.ModuleList([model, *dense])):
        batches = [record_batch(model, decoder, *batch) for batch in calibration.batches(batch_size, device)]
        streams = [batch.hidden for batch in batches]  # the dense model's
        for depth, block in enumerate(decoder.blocks):
            linears = [linear for linear in decoder.linears if linear.depth == depth]
            fit = _BlockFit(block, dense[depth], linears, writers, batches, streams)
            for group in dict.fromkeys(linear.input_group for linear in linears):
                fit.update([linear for linear in linears if linear.input_group == group], damping)
            streams = fit.targets_out
            del fit  # the next block's activations would lie beside this one's
            for batch in batches:
                batch.hidden = batch.run(block)
            if progress is not None:
                progress(depth + 1, len(decoder.blocks))


class _BlockFit:
    """One block's linears, their outputs in the dense model, and what the residual stream lacks."""

    def __init__(
        self,
        block: nn.Module,
        dense: nn.Module,
        linears: list[PrunableLinear],
        writers: set[str],
        batches: list[BlockBatch],
        streams: list[Tensor],
    ) -> None:
        self._block, self._linears, self._batches = block, linears, batches
        self._writers = [linear for linear in linears if linear.kind in writers]
        self._lacking = [stream - batch.hidden for stream, batch in zip(streams, batches, strict=True)]
        self.targets: list[dict[str, Tensor]] = []  # per batch: outputs of the dense linears
        self.targets_out: list[Tensor] = []
        for batch, stream in zip(batches, streams, strict=True):
            own, batch.hidden = batch.hidden, stream
            outputs: dict[str, Tensor] = {}
            with ExitStack() as hooks:
                for linear in linears:
                    module = dense.get_submodule(linear.kind)
                    hooks.enter_context(module.register_forward_hook(partial(_note, outputs, linear.kind)))
                self.targets_out.append(batch.run(dense, like=block))
            batch.hidden = own
            self.targets.append(outputs)
        # With a norm behind a writer its output is not what is added to the stream.
        self._adds = self._is_sum(streams[0])

    def _is_sum(self, stream: Tensor) -> bool:
        parts = [self.targets[0][writer.kind].view_as(stream) for writer in self._writers]
        return agree(stream + torch.stack(parts).sum(dim=0), self.targets_out[0]) if parts else False

    def update(self, readers: list[PrunableLinear], damping: float) -> None:
        """Fit the linears that read one input."""
        ones = any(linear.has_bias for linear in readers)
        first = readers[0]
        dtype = torch.promote_types(first.module.get_parameter("weight").dtype, torch.float32)
        device = first.module.get_parameter("weight").device
        moment = SymmetricAccumulator.zeros(first.columns + ones, dtype=dtype, device=device)
        cross = {x.name: torch.zeros(x.rows, first.columns + ones, dtype=dtype, device=device) for x in readers}
        tokens = sum(batch.tokens for batch in self._batches)
        for index, batch in enumerate(self._batches):
            a, outputs = self._run_up_to(first, batch)
            outputs |= {linear.kind: linear.module(a) for linear in readers}
            mask = None if batch.mask is None else batch.mask.to(a.device).view(a.shape[:-1])
            gram_accumulate_(moment, a, mask=mask, ones_column=ones)
            a = a.reshape(-1, a.shape[-1])
            for linear in readers:
                lack = (self.targets[index][linear.kind] - outputs[linear.kind]).reshape(len(a), -1)
                if linear in self._writers and self._adds:
                    lack = lack + self._lack_before(linear, index, outputs).view_as(lack)
                if mask is not None:
                    lack = lack * mask.reshape(-1, 1)
                cross[linear.name][:, : first.columns] += _product(lack.to(a.dtype), a)
                if ones:
                    cross[linear.name][:, -1] += lack.to(dtype).sum(dim=0)
        self._solve(readers, moment.full().div_(tokens), cross, tokens, damping)

    def _run_up_to(self, linear: PrunableLinear, batch: BlockBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The input of ``linear``, and the outputs of the writers that run before it."""
        outputs: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for writer in self._writers:
                hooks.enter_context(writer.module.register_forward_hook(partial(_note, outputs, writer.kind)))
            hooks.enter_context(linear.module.register_forward_pre_hook(_stop))
            try:
                batch.run(self._block)
            except _Reached as reached:
                return reached.input, outputs
        raise AssertionError(f"{linear.name} was not reached")

    def _lack_before(self, linear: PrunableLinear, index: int, outputs: dict[str, Tensor]) -> Tensor:
        """What the residual stream lacks when the output of ``linear`` is added to it."""
        lack = self._lacking[index]
        for writer in self._writers:
            if writer is linear:
                break
            lack = lack + (self.targets[index][writer.kind] - outputs[writer.kind]).view_as(lack)
        return lack

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
            try:
                inverse = spd_inverse(own, damping, name=f"inputs of {linear.name}").inverse
            except NotPositiveDefiniteError as error:
                raise NumericalError(str(error)) from error
            delta = cross[linear.name][:, :size].div(tokens).masked_fill(gone, 0.0) @ inverse
            linear.write(weight + delta.masked_fill(zero_rows | gone, 0.0))


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``xᵀ y``, summed in float32 at least."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x.T, y, out_dtype=torch.float32)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype).T @ y.to(dtype)


def _note(found: dict[str, Tensor], kind: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    found[kind] = output


def _stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])


class _Reached(Exception):
    """Ends a block's forward pass at a linear whose input is known."""

    def __init__(self, input: Tensor) -> None:
        self.input = input
