"""SparseGPT (Frantar & Alistarh, ICML 2023): one pass over the blocks, each linear on its own inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.config.prune import PruneConfig
from llm_surgeon.curvature.factors import numerical_errors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import InputError, NumericalError
from llm_surgeon.models.block_batches import BlockBatch, record_batch
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.passes import evaluation_mode
from surgeon_kernels import (
    SymmetricAccumulator,
    cholesky_with_jitter,
    gram_accumulate_,
    k_smallest,
    nm_select,
)


def sparsegpt_layer(
    weight: Tensor,
    hessian: Tensor,
    *,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    damp: float = 0.01,
    name: str = "layer",
) -> tuple[Tensor, Tensor]:
    """Prune one linear layer, the columns to the right making up for every removed weight.

    With ``H = mean(a aᵀ)``, damped, and ``H⁻¹ = Uᵀ U`` (``U`` upper triangular), columns are visited from
    left to right. A weight ``W_rc`` costs ``(W_rc / U_cc)²``, its exact optimal-brain-surgeon cost when only
    columns right of it can still change; removing it subtracts ``(W_rc / U_cc) U_c,c:`` from ``W_r,c:``.
    Columns right of the current block receive their updates together when it ends: the same result, faster.

    Args:
        weight: ``[R, C]`` without its bias, which this method leaves as it is.
        hessian: ``H``, ``[C, C]``, undamped. A column whose input is always zero has its weights set to zero.
        sparsity: fraction to remove, in [0, 1]: exactly ``round(sparsity R C)`` weights, chosen block by
            block. Not read when there is a ``pattern``.
        pattern: ``(n, m)`` to keep ``n`` of every ``m`` consecutive columns, chosen when a group is reached.
        block: columns among which the weights to remove are chosen together. With a pattern it is lowered to
            a multiple of ``m`` (but at least ``m``) and has no influence on the result.
        damp: added to the diagonal of ``H``, relative to its mean.
        name: names the layer in errors.

    Returns:
        The new weight, float32 or (for a float64 ``weight``) float64, and ``pruned``, bool ``[R, C]``,
        True where a weight was removed. Of equal costs the first row, then the first column, goes first.

    Raises:
        InputError: ``C`` is not divisible by ``m``, or an argument is out of range.
        NumericalError: NaN or infinity in ``weight`` or ``hessian``, or no factorisation of ``H``.
    """
    R, C = weight.shape
    if hessian.shape != (C, C):
        raise InputError(f"{name}: the Hessian must be [{C}, {C}], not {list(hessian.shape)}")
    if not 0 <= sparsity <= 1:
        raise InputError(f"{name}: sparsity must be in [0, 1], not {sparsity}")
    if block < 1:
        raise InputError(f"{name}: block must be at least 1, not {block}")
    if pattern is not None:
        _check_pattern(pattern, C, name)
        block = max(pattern[1], block - block % pattern[1])
    if not weight.isfinite().all():
        raise NumericalError(f"{name}: the weight holds NaN or infinity")

    W = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    W[:, hessian.diagonal() == 0] = 0.0
    U = _inverse_factor(hessian.to(W.dtype), damp, name)
    scale = U.diagonal()
    pruned = torch.zeros_like(W, dtype=torch.bool)
    for start in range(0, C, block):
        end = min(start + block, C)
        if pattern is None:
            # Rounding the running total, not each block's share, makes the layer's total exact.
            quota = round(sparsity * R * end) - round(sparsity * R * start)
            costs = (W[:, start:end] / scale[start:end]).square()
            pruned[:, start:end] = k_smallest([costs], quota)[1][0]
        errors = W.new_empty(R, end - start)
        for c in range(start, end):
            if pattern is not None and c % pattern[1] == 0:
                group = slice(c, c + pattern[1])
                pruned[:, group] = nm_select((W[:, group] / scale[group]).square(), *pattern)
            error = W[:, c] * pruned[:, c] / scale[c]
            W[:, c:end].addr_(error, U[c, c:end], alpha=-1)
            errors[:, c - start] = error
        W[:, end:].addmm_(errors, U[start:end, end:], alpha=-1)
    return W.masked_fill_(pruned, 0.0), pruned


@torch.no_grad()
def prune_sparsegpt(
    model: PreTrainedModel,
    decoder: Decoder,
    calibration: Calibration,
    config: PruneConfig,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Prune every linear of the decoder in place with :func:`sparsegpt_layer`, one block after the other.

    A block's inputs are the outputs of the pruned blocks before it. The Hessians of all its linears are taken
    in one pass through the block as it was, then all are pruned; a second pass gives the next block's inputs.

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
            _check_pattern(pattern, linear.columns, linear.name)
    batch_size = config.batch_size or max(1, 4096 // calibration.input_ids.shape[1])
    masks: dict[str, Tensor] = {}
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model):
        batches = [
            record_batch(model, decoder, input_ids, mask) for input_ids, mask in calibration.batches(batch_size, device)
        ]
        for depth, block in enumerate(decoder.blocks):
            linears = [linear for linear in decoder.linears if linear.depth == depth]
            hessians = _hessians(block, linears, batches)
            for linear in linears:
                hessian = hessians[linear.input_group].full()
                matrix = linear.matrix(hessian.dtype)  # [W | b]
                matrix[:, : linear.columns], masks[linear.name] = sparsegpt_layer(
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
            for batch in batches:
                batch.hidden = batch.run(block)
    return masks


def _hessians(
    block: nn.Module, linears: list[PrunableLinear], batches: list[BlockBatch]
) -> dict[str, SymmetricAccumulator]:
    """``H = mean(a aᵀ)`` of every input group of a block, over all tokens that are not padding."""
    readers = [linear for linear in linears if linear.name == linear.input_group]
    tokens = max(1, sum(batch.tokens for batch in batches))
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
    return hessians


def _check_pattern(pattern: tuple[int, int], columns: int, name: str) -> None:
    n, m = pattern
    if not 0 < n < m:
        raise InputError(f"{name}: an N:M pattern needs 0 < N < M, not {n}:{m}")
    if columns % m:
        raise InputError(f"{name}: {n}:{m} needs a number of inputs divisible by {m}, not {columns}")


def _inverse_factor(H: Tensor, damp: float, name: str) -> Tensor:
    """Upper triangular ``U`` with ``(H + damping)⁻¹ = Uᵀ U``, by one Cholesky factorisation.

    With ``J`` the reversal of the order and ``J H J = L Lᵀ``: ``H = V Vᵀ`` for the upper triangular
    ``V = J L J``, so ``U = V⁻¹ = J L⁻¹ J``.
    """
    H = H.clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    # Dead inputs have no correlations, so any positive value does; the mean leaves the damping as it is.
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    with numerical_errors():
        L, _ = cholesky_with_jitter(H.flip(0, 1), damp, name=f"{name}: the Hessian of the inputs")
    identity = torch.eye(len(L), dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1)
