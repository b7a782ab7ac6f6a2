"""Estimate the curvature of every prunable linear layer by hooked passes over calibration data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.checks import require_choice
from llm_surgeon.config.prune import FISHERS
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import Ranks
from llm_surgeon.errors import BadBatchError, UnsupportedModelError
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.fused_pointwise import fused_pointwise
from llm_surgeon.models.loss import count_tokens, next_token_loss
from llm_surgeon.models.passes import (
    ForwardPasses,
    checkpointed,
    evaluation_mode,
    frozen,
    starting_at,
    to_list,
)
from llm_surgeon.models.repeatable import repeatable
from surgeon_kernels import SymmetricAccumulator, gram_accumulate_


@dataclass
class Curvature:
    """Kronecker factors of the mean loss's curvature, ``F ≈ G ⊗ A``, for every linear layer.

    Attributes:
        loss: mean cross-entropy of the data's tokens under the model, nats per token.
        tokens: N, the tokens counted (padding is not).
        squared_norms: ``|g|²`` of every token, float32 ``[samples, seqlen]``, zero at padding, of every linear by its
            name, where they were asked for.
    """

    loss: float
    tokens: int
    _inputs: dict[str, SymmetricAccumulator] = field(repr=False)  # input group -> Σ a aᵀ
    _gradients: dict[str, SymmetricAccumulator] = field(repr=False)  # name -> Σ g gᵀ
    squared_norms: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def sums(self, linear: PrunableLinear) -> list[SymmetricAccumulator]:
        """``Σ a aᵀ`` and, where gradients were captured, ``Σ g gᵀ``, wherever they are kept."""
        G = self._gradients.get(linear.name)
        return [self._inputs[linear.input_group], *([] if G is None else [G])]

    def factors(self, linear: PrunableLinear) -> tuple[Tensor | None, Tensor]:
        """``G = (1/N) Σ g gᵀ`` ``[R, R]`` (None when gradients were not captured) and ``A = (1/N) Σ a aᵀ``.

        ``A`` is ``[C, C]``, or ``[C + 1, C + 1]`` with a constant 1 appended to every ``a`` where the layer
        has a bias. Both are new tensors, float32 (float64 for a float64 model), which the caller may change.
        """
        size = linear.columns + linear.has_bias
        A = self._inputs[linear.input_group].full()[:size, :size].div_(self.tokens)
        return self.output_factor(linear) if linear.name in self._gradients else None, A

    def output_factor(self, linear: PrunableLinear, device: torch.device | None = None) -> Tensor:
        """``G`` alone, see :meth:`factors`, on ``device``, or where it is kept: it must have been captured."""
        G = self._gradients[linear.name]
        if device is not None:
            G = SymmetricAccumulator(G.n, G.storage.to(device, non_blocking=True))
        return G.full().div_(self.tokens)

    def with_inputs_of(self, other: Curvature) -> Curvature:
        """Factors ``G`` of this and ``A`` of ``other``, of as many tokens, both shared with them."""
        assert self.tokens == other.tokens
        return replace(self, _inputs=other._inputs)


def estimate_curvature(
    model: PreTrainedModel,
    decoder: Decoder,
    calibration: Calibration,
    *,
    batch_size: int,
    fisher: str = "empirical",
    seed: int = 0,
    gradients: bool = True,
    inputs: bool = True,
    output_factors: bool = True,
    squared_norms: bool = False,
    dtype: torch.dtype | None = None,
    checkpoint_activations: bool = False,
    blocks_per_pass: int | None = None,
    store: Callable[[SymmetricAccumulator], SymmetricAccumulator] | None = None,
    owners: Mapping[str, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Curvature:
    """Accumulate ``A = (1/N) Σ a aᵀ`` and ``G = (1/N) Σ g gᵀ`` over the calibration data's N real tokens.

    ``a`` is a linear's input at a token and ``g`` the gradient of the SUM of token cross-entropies with respect to
    its output there, so that neither depends on the batch size (LLM Surgeon, van der Ouderaa et al., ICLR 2024,
    sec. 3.1). One forward and one backward pass per batch, in evaluation mode, without any weight gradient.
    Padded positions count for nothing. Linears that share an input share ``A``.

    Args:
        batch_size: sequences per pass.
        fisher: ``"empirical"`` takes the data's next tokens as labels, ``"sampled"`` draws a label from the
            model's own distribution at every real position.
        seed: of the sampled labels, which depend on a sequence's place among all, not on its batch.
        gradients: without them only ``A`` and the loss are computed, by forward passes alone.
        inputs: without them ``A`` is left out; output_factors: without them ``G``.
        squared_norms: keep the squared norms of gradients, too.
        dtype: of the products in the passes, see :class:`~llm_surgeon.models.passes.ForwardPasses`; the model's own
            where left out. Of ``a`` and ``g``, too; their sums stay in float32.
        checkpoint_activations: keep only each decoder block's input and run the block again in the backward pass: a
            third more work for a fraction of the memory.
        blocks_per_pass: decoder blocks whose factors are accumulated in one pass over the data, in as many passes as
            that takes; all of them in one where left out. A pass goes back only as far as its first block.
        store: where a block's sums go when its pass is over (to main memory, say); they stay where left out.
        owners: ranks by linears' names: after a block's pass its sums are added up over the calibration data's ranks
            and kept by the owners alone; on every rank where left out.
        progress: called with (batches done, batches in all) after every batch, the batches of all passes counted.

    Raises:
        InputError: the calibration data hold no next token to predict, or a token the model does not know.
        BadBatchError: NaN or infinity in a layer's inputs or gradients or in the loss; the message names the
            place where it was first met and the batch.
        UnsupportedModelError: a layer's output has no influence on the loss through which to differentiate.
    """
    require_choice("fisher", fisher, FISHERS)
    tokens, targets = count_tokens(model, calibration)
    ranks, parts = calibration.ranks, list(calibration.parts(batch_size))
    batches = len(parts)
    # Every pass draws the same labels, and a window the same on any rank.
    draws = torch.rand(calibration.input_ids.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    device = model.get_input_embeddings().weight.device
    per_pass = blocks_per_pass or len(decoder.blocks)
    passes = range(0, len(decoder.blocks), per_pass)
    input_sums: dict[str, SymmetricAccumulator] = {}
    gradient_sums: dict[str, SymmetricAccumulator] = {}
    norms: dict[str, Tensor] = {}
    total = 0.0
    again = checkpointed(decoder.blocks) if gradients and checkpoint_activations else contextlib.nullcontext()
    with (
        frozen(model),
        evaluation_mode(model),
        fused_pointwise(model),
        again,
        repeatable(),
        torch.set_grad_enabled(gradients),
    ):
        forward = ForwardPasses(model, device, dtype)
        for first in passes:
            linears = [linear for linear in decoder.linears if first <= linear.depth < first + per_pass]
            sums = _Accumulators(
                linears,
                gradients,
                device,
                inputs=inputs,
                output_factors=output_factors,
                squared_norms=squared_norms,
                dtype=dtype,
            )
            total = 0.0
            start = model.get_input_embeddings() if first == 0 else decoder.blocks[first]
            with sums.hooked(), starting_at(start) if gradients else contextlib.nullcontext():
                for batch, (input_ids, mask) in enumerate(calibration.batches(batch_size, device), 1):
                    of_batch = draws[parts[batch - 1]] if fisher == "sampled" else None
                    sums.mask, sums.recording = mask, True
                    logits = forward.logits(input_ids, mask, with_gradient=gradients)
                    loss = next_token_loss(logits, input_ids, mask, of_batch)
                    sums.recording = False  # a block that runs again for its activations must not count again
                    if logits.gradient is not None:
                        logits.source.register_hook(_first_on_device)
                        logits.source.backward(logits.gradient)
                    del logits
                    total += sums.check(loss, batch, batches, range(parts[batch - 1].start, parts[batch - 1].stop))
                    if progress is not None:
                        progress(first // per_pass * batches + batch, len(passes) * batches)
            readers, own = _keepers(linears, owners)
            for done, kept, keepers in ((input_sums, sums.inputs, readers), (gradient_sums, sums.gradients, own)):
                for name in list(kept):
                    value = kept.pop(name)  # nothing else holds it: what is stored elsewhere is freed here
                    if _added_up(value, ranks, keepers.get(name)):
                        done[name] = value if store is None else store(value)
                    del value
            norms |= {name: _of_all(found, calibration) for name, found in sums.squared_norms.items()}
    return Curvature(ranks.total(total) / targets, tokens, input_sums, gradient_sums, norms)


class _Accumulators:
    """Sums of outer products of every linear's inputs and output gradients, filled by hooks."""

    def __init__(
        self,
        linears: list[PrunableLinear],
        gradients: bool,
        device: torch.device,
        *,
        inputs: bool,
        output_factors: bool,
        squared_norms: bool,
        dtype: torch.dtype | None,
    ) -> None:
        self.mask: Tensor | None = None  # of the batch that is running
        self.recording = True
        self.inputs: dict[str, SymmetricAccumulator] = {}
        self.gradients: dict[str, SymmetricAccumulator] = {}
        self.squared_norms: dict[str, list[Tensor]] = {x.name: [] for x in linears} if squared_norms else {}
        # Of inputs and gradients without second moments, which would tell, too, where NaN begins.
        self._input_sums: dict[str, Tensor] = {}
        self._gradient_sums: dict[str, Tensor] = {}
        self._linears, self._dtype = linears, dtype
        self._differentiated = [linear.name for linear in linears] if gradients else []
        self._reached: set[str] = set()
        self._with_ones = {linear.input_group for linear in linears if linear.has_bias}
        for linear in linears:
            weight = linear.module.get_parameter("weight")
            wide = torch.promote_types(weight.dtype, torch.float32)
            home = device if weight.device.type == "cpu" else weight.device  # weights may wait in main memory
            if inputs and linear.input_group == linear.name:
                size = linear.columns + (linear.name in self._with_ones)
                self.inputs[linear.name] = SymmetricAccumulator.zeros(size, dtype=wide, device=home)
            if gradients and output_factors:
                self.gradients[linear.name] = SymmetricAccumulator.zeros(linear.rows, dtype=wide, device=home)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Context manager with hooks on the linears; removed on exit."""
        handles = [
            linear.module.register_forward_hook(lambda _, args, y, linear=linear: self._record(linear, args[0], y))
            for linear in self._linears
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, linear: PrunableLinear, x: Tensor, y: Tensor) -> None:
        if not self.recording:
            return
        # Some models flatten [batch, length] to one dimension on the way.
        mask = None if self.mask is None else self.mask.to(x.device).reshape(x.shape[:-1])
        if linear.name in self.inputs:
            a = x.detach() if self._dtype is None else x.detach().to(self._dtype)  # as the linear itself reads it
            ones_column = linear.name in self._with_ones
            with torch.autocast(a.device.type, enabled=False):
                gram_accumulate_(self.inputs[linear.name], a, mask=mask, ones_column=ones_column)
        elif linear.input_group == linear.name:
            a = x.detach() if mask is None else x.detach().masked_fill(~mask[..., None], 0.0)
            self._input_sums[linear.name] = a.sum(dtype=torch.promote_types(a.dtype, torch.float32))
        if self._differentiated:
            if not y.requires_grad:
                raise UnsupportedModelError(f"no gradient can flow through {linear.name}")
            y.register_hook(lambda g: self._record_gradient(linear.name, g, mask))

    def _record_gradient(self, name: str, g: Tensor, mask: Tensor | None) -> None:
        self._reached.add(name)
        if name in self.gradients:
            gram_accumulate_(self.gradients[name], g, mask=mask)
        if name in self.squared_norms:
            wide = torch.promote_types(g.dtype, torch.float32)
            norms = torch.linalg.vector_norm(g, dim=-1, dtype=wide).square_()
            if mask is not None:
                norms.masked_fill_(~mask, 0.0)
            self.squared_norms[name].append(norms)
            if name not in self.gradients:
                self._gradient_sums[name] = norms.sum()

    def check(self, loss: Tensor, batch: int, batches: int, windows: range) -> float:
        """The loss, after making sure that everything is finite, with one host synchronization.

        Locations are gone through in the order of computation (inputs forward, the loss, gradients backward), so
        that the one named is where the trouble began.
        """
        for name in self._differentiated:
            if name not in self._reached:
                raise UnsupportedModelError(f"the loss has no gradient with respect to the output of {name}")
        self._reached.clear()
        sums = {name: A.diagonal().sum() for name, A in self.inputs.items()} | self._input_sums
        locations = {f"the inputs of {name}": value for name, value in sums.items()}
        locations["the loss"] = loss
        norms = {name: G.diagonal().sum() for name, G in self.gradients.items()} | self._gradient_sums
        for name in filter(norms.__contains__, reversed(self._differentiated)):
            locations[f"the gradients of {name}"] = norms[name]
        values = dict(zip(locations, to_list(list(locations.values())), strict=True))
        for location, value in values.items():
            if not math.isfinite(value):
                raise BadBatchError(location, batch, batches, windows)
        return values["the loss"]


def _keepers(
    linears: list[PrunableLinear], owners: Mapping[str, int] | None
) -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Ranks that keep sums of inputs, by input group, and those that keep a linear's of gradients; none named: all."""
    readers: dict[str, set[int]] = {}
    own: dict[str, set[int]] = {}
    if owners is None:
        return readers, own
    for linear in linears:
        readers.setdefault(linear.input_group, set()).add(owners[linear.name])
        own[linear.name] = {owners[linear.name]}
    return readers, own


def _added_up(sums: SymmetricAccumulator, ranks: Ranks, keepers: set[int] | None) -> bool:
    """Add up sums of all ranks in place; True where this one keeps them."""
    ranks.sum_(sums.storage, *keepers if keepers is not None and len(keepers) == 1 else ())
    return keepers is None or ranks.index in keepers


def _of_all(norms: list[Tensor], calibration: Calibration) -> Tensor:
    """What batches of this rank found of every token, and other ranks of theirs, ``[samples, seqlen]``."""
    own = torch.cat(norms).view(-1, calibration.input_ids.shape[1])
    found = own.new_zeros(calibration.input_ids.shape)
    found[calibration.own] = own
    return calibration.ranks.sum_(found)


def _first_on_device(gradient: Tensor) -> None:
    """Allocate something small on autograd's thread: cuBLAS warns where it is the first there, without a context."""
    gradient.new_zeros(1)
