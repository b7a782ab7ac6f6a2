"""Methods that prune each linear on its own, block after block, to reproduce what it computes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.stages import stages
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.distributed import Ranks
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.methods.sequential import Targets, token_weights
from llm_surgeon.models.block_batches import BlockBatch, record_batches
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.models.writers import find_writers
from surgeon_kernels import SymmetricAccumulator, gram_accumulate_


class LayerMethod(Protocol):
    """Choice of the weights of one linear that go, and of the others' new values."""

    def __call__(
        self,
        weight: Tensor,
        hessian: Tensor,
        *,
        sparsity: float,
        pattern: tuple[int, int] | None,
        damp: float,
        name: str,
    ) -> tuple[Tensor, Tensor]:
        """New weight ``[R, C]`` and ``pruned``, bool ``[R, C]``.

        Args:
            weight: ``[R, C]``, without its bias, which stays.
            hessian: ``mean(a aᵀ)`` of the inputs, ``[C, C]``, undamped.
            sparsity: fraction to remove, where there is no ``pattern``.
            pattern: ``(n, m)`` to keep ``n`` of every ``m`` consecutive columns.
            damp: damping of ``hessian``, relative to its mean diagonal.
            name: names the linear in errors.
        """


@torch.no_grad()
def prune_layers(
    layer_method: LayerMethod,
    model: PreTrainedModel,
    decoder: Decoder,
    calibration: Calibration,
    config: PruneConfig,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Prune every linear of the decoder in place with ``layer_method``, one block after the other.

    A block's inputs are the outputs of the pruned blocks before it. The Hessians of all its linears are taken
    in one pass through the block as it was, then all are pruned; a second pass gives the next block's inputs.

    With ``update="sequential"`` the inputs of every linear are those that all linears before it leave, and it aims at
    what the dense model computes: it is pruned around the target of :mod:`~llm_surgeon.methods.sequential`, where every
    token counts alike, as GPTAQ (Li et al., ICML 2025) does for rounding.

    Args:
        progress: called as ``progress(linears_pruned, linears)``.

    Returns:
        ``pruned`` of every linear by its name, bool ``[R, C]``, the bias not included.

    Raises:
        InputError: the width of a layer does not fit the N:M pattern; nothing has been changed then.
        NumericalError: NaN or infinity met; the message names the layer. Earlier layers are already pruned.
    """
    structure = config.structure_record
    pattern = (structure.n, structure.m) if structure.m else None
    if pattern is not None:
        for linear in decoder.linears:
            check_pattern(pattern, linear.columns, linear.name)
    masks: dict[str, Tensor] = {}
    problems = _corrected_problems if config.sequential else _problems
    with evaluation_mode(model):
        for linear, matrix, hessian in problems(model, decoder, calibration, config):
            matrix[:, : linear.columns], masks[linear.name] = layer_method(
                matrix[:, : linear.columns],
                hessian,
                sparsity=config.sparsity,
                pattern=pattern,
                damp=config.damp_a,
                name=linear.name,
            )
            linear.write(matrix)
            if progress is not None:
                progress(len(masks), len(decoder.linears))
    return masks


def _problems(
    model: PreTrainedModel, decoder: Decoder, calibration: Calibration, config: PruneConfig
) -> Iterator[tuple[PrunableLinear, Tensor, Tensor]]:
    """Every linear with ``[W | b]`` and its Hessian; it has its new weights when the next one is asked for."""
    device = model.get_input_embeddings().weight.device
    of_windows, ranks = calibration.batches(_batch_size(calibration, config), device), calibration.ranks
    batches = list(record_batches(model, decoder, of_windows))
    for depth, block in enumerate(decoder.blocks):
        linears = [linear for linear in decoder.linears if linear.depth == depth]
        hessians = _hessians(block, linears, batches, ranks)
        for linear in linears:
            hessian = hessians[linear.input_group].full()
            yield linear, linear.matrix(hessian.dtype), hessian
        for batch in batches:
            batch.hidden = batch.run(block)


def _corrected_problems(
    model: PreTrainedModel, decoder: Decoder, calibration: Calibration, config: PruneConfig
) -> Iterator[tuple[PrunableLinear, Tensor, Tensor]]:
    """As :func:`_problems`, with what makes up for the losses of the linears before in place of ``[W | b]``."""
    weights = token_weights([], calibration)
    for stage in stages(
        model,
        decoder,
        calibration,
        lambda readers: weights,
        writers=find_writers(model, decoder),
        batch_size=_batch_size(calibration, config),
    ):
        aims = Targets(stage, config)
        for linear in stage.readers:
            target, a = aims.of(linear)
            yield linear, target, a.undamped()[: linear.columns, : linear.columns]


def _batch_size(calibration: Calibration, config: PruneConfig) -> int:
    return config.batch_size or max(1, 4096 // calibration.input_ids.shape[1])


def _hessians(
    block: nn.Module, linears: list[PrunableLinear], batches: list[BlockBatch], ranks: Ranks
) -> dict[str, SymmetricAccumulator]:
    """``H = mean(a aᵀ)`` of every input group of a block, over all tokens that are not padding."""
    readers = [linear for linear in linears if linear.name == linear.input_group]
    tokens = max(1.0, ranks.total(sum(batch.tokens for batch in batches)))
    hessians: dict[str, SymmetricAccumulator] = {}

    def accumulate(linear: PrunableLinear, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        (a,) = args  # [batch, seqlen, C], or flat (OPT's feed-forward)
        if linear.name not in hessians:
            dtype = torch.promote_types(linear.module.get_parameter("weight").dtype, torch.float32)
            hessians[linear.name] = SymmetricAccumulator.zeros(linear.columns, dtype=dtype, device=a.device)
        H = hessians[linear.name]
        mask = None if batch.mask is None else batch.mask.to(a.device).view(a.shape[:-1])
        gram_accumulate_(H, a, mask=mask, alpha=1 / tokens)
        if not H.diagonal().isfinite().all():
            place = f"block {linear.depth}, batch {index} of {len(batches)}"
            raise NumericalError(f"NaN or infinity in the inputs of {linear.name} ({place})")

    with ExitStack() as hooks:
        for linear in readers:
            hooks.enter_context(linear.module.register_forward_pre_hook(partial(accumulate, linear)))
        for index, batch in enumerate(batches, 1):  # noqa: B007, read by accumulate
            batch.run(block)
    for H in hessians.values():
        ranks.sum_(H.storage)
    return hessians


def check_pattern(pattern: tuple[int, int], columns: int, name: str) -> None:
    n, m = pattern
    if not 0 < n < m:
        raise InputError(f"{name}: an N:M pattern needs 0 < N < M, not {n}:{m}")
    if columns % m:
        raise InputError(f"{name}: {n}:{m} needs a number of inputs divisible by {m}, not {columns}")
