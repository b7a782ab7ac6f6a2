"""Optimizers of a recovery: AdamW, and for linears the natural gradient by their Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.curvature.estimate import estimate_curvature
from llm_surgeon.curvature.factors import numerical_errors
from llm_surgeon.data.calibration import Calibration
from llm_surgeon.models.decoder import Decoder
from llm_surgeon.recovery.zeros import weight_of
from surgeon_kernels import spd_inverse

# Tokens that the curvature is estimated on, and the damping of both factors: larger than for a solve, as the curvature
# is that of the start.
_CURVATURE_TOKENS, _DAMPING = 65_536, 0.1
_MOMENTUM = 0.95
# Root mean square of AdamW's steps, in units of the learning rate: with it one learning rate suits both (Liu et al.,
# "Muon is scalable for LLM training", 2025).
_ADAMW_RMS = 0.2


@dataclass(frozen=True)
class Preconditioner:
    """``D = M ∘ (G⁻¹ ∇W A⁻¹)`` of one linear, M the pattern of its nonzero weights.

    Attributes:
        g, a: ``G⁻¹`` ``[R, R]`` and ``A⁻¹`` ``[C, C]`` of the damped factors.
        zero: bool in the shape of the weight, True where it is zero and stays it.
        transposed: the weight is stored as ``Wᵀ``.
    """

    g: Tensor
    a: Tensor
    zero: Tensor
    transposed: bool

    def direction(self, gradient: Tensor) -> Tensor:
        product = self.a @ gradient @ self.g if self.transposed else self.g @ gradient @ self.a
        return product.masked_fill_(self.zero, 0.0)


class NaturalGradient(Optimizer):
    """``W ← W - lr · 0.2 V / rms(V)``, ``V ← μ V + D``: momentum of natural gradients, μ = 0.95.

    The root mean square is that over the kept weights of all linears, so that layers keep the natural gradient's
    proportions; steps are as long as AdamW's of the same learning rate.
    """

    def __init__(self, preconditioners: Mapping[nn.Parameter, Preconditioner], lr: float) -> None:
        super().__init__(list(preconditioners), {"lr": lr})
        self._preconditioners = dict(preconditioners)
        self._kept = sum(int((~each.zero).sum()) for each in preconditioners.values())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        moving = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in moving:
            direction = self._preconditioners[parameter].direction(parameter.grad)
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].mul_(_MOMENTUM).add_(direction)
        if not moving:
            return
        momenta = [self.state[parameter]["momentum"] for parameter in moving]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(momenta)))
        scale = -group["lr"] * _ADAMW_RMS * self._kept**0.5 / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        for parameter, momentum in zip(moving, momenta, strict=True):
            parameter.add_(momentum * scale)


def adamw(parameters: Iterable[nn.Parameter], config: RecoverConfig) -> Optimizer:
    """AdamW; matrices alone decay, not norms and biases."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.dim() > 1].append(parameter)
    options = [
        {"params": each, "weight_decay": config.weight_decay if decays else 0.0}
        for decays, each in groups.items()
        if each
    ]
    on_gpu = any(parameter.is_cuda for each in groups.values() for parameter in each)
    return AdamW(options, lr=config.learning_rate, fused=on_gpu)


def preconditioners(
    model: PreTrainedModel,
    decoder: Decoder,
    windows: Calibration,
    batch_size: int,
    dtype: torch.dtype | None,
    seed: int,
) -> dict[nn.Parameter, Preconditioner]:
    """Preconditioners of the weights of all linears that are trained, by the curvature on the first ``windows``.

    Args:
        batch_size, dtype, seed: see :func:`~llm_surgeon.curvature.estimate.estimate_curvature`.

    Raises:
        NumericalError: a factor has no inverse; the message names it.
    """
    ids, mask = windows.input_ids, windows.attention_mask
    count = max(1, _CURVATURE_TOKENS // ids.shape[1])
    some = replace(windows, input_ids=ids[:count], attention_mask=None if mask is None else mask[:count])
    curvature = estimate_curvature(
        model, decoder, some, batch_size=batch_size, dtype=dtype, fisher="sampled", seed=seed
    )
    found: dict[nn.Parameter, Preconditioner] = {}
    inverses: dict[str, Tensor] = {}  # linears that share their input follow each other
    for linear in decoder.linears:
        weight = weight_of(linear.module)
        if not weight.requires_grad:
            continue
        G, A = curvature.factors(linear)
        assert G is not None
        group, columns = linear.input_group, linear.columns
        with numerical_errors():
            if group not in inverses:
                inputs = A[:columns, :columns].contiguous()
                inverses = {group: spd_inverse(inputs, _DAMPING, name=f"A of {group}").inverse}
            g = spd_inverse(G, _DAMPING, name=f"G of {linear.name}").inverse
        transposed = isinstance(linear.module, Conv1D)
        found[weight] = Preconditioner(g, inverses[group], weight.detach() == 0, transposed)
    return found
