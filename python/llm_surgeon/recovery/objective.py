"""Losses of recoveries: of the tokens themselves, or of the distance from the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_surgeon.config.recover import RecoverConfig
from llm_surgeon.errors import InputError
from llm_surgeon.models.decoder import find_decoder
from llm_surgeon.models.loss import CHUNK, differentiable_loss
from llm_surgeon.models.passes import run_model


class TokenLoss:
    """Mean cross-entropy of the tokens."""

    def __call__(self, model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
        return differentiable_loss(run_model(model, ids, mask).logits, ids, mask, "mean")


class Distillation:
    """``(1 - w) T² KL(teacher ‖ student) + w CE + v · block_distance``, means over tokens.

    w is ``label_weight``, T ``temperature`` and v ``block_weight`` of the options.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, config: RecoverConfig) -> None:
        """``student`` is the model itself, without adapters around it.

        Raises:
            InputError: blocks are to be compared and the models have different ones.
        """
        self._teacher, self._config = teacher, config
        self._blocks = [find_decoder(model).blocks for model in (student, teacher)] if config.block_weight else [[], []]
        sizes = [(len(blocks), _width(model)) for blocks, model in zip(self._blocks, (student, teacher), strict=True)]
        if config.block_weight and sizes[0] != sizes[1]:
            raise InputError("block_weight needs a teacher of as many blocks and of the same width as the model")

    def __call__(self, model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
        config = self._config
        with _outputs(self._blocks[1]) as wanted, torch.no_grad():
            teacher = run_model(self._teacher, ids, mask).logits
        with _outputs(self._blocks[0]) as found:
            student = run_model(model, ids, mask).logits
        counted = None if mask is None else mask.flatten()
        loss = distillation_loss(student.flatten(0, 1), teacher.flatten(0, 1), config.temperature, counted)
        if config.label_weight:
            labels = differentiable_loss(student, ids, mask, "mean")
            loss = (1 - config.label_weight) * loss + config.label_weight * labels
        if found:
            distances = [block_distance(h, target, mask) for h, target in zip(found, wanted, strict=True)]
            loss = loss + config.block_weight * torch.stack(distances).mean()
        return loss


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
    """``T² Σ_v p_v (log p_v − log q_v)``, p and q the softmax of ``teacher / T`` and ``student / T``; mean over tokens.

    Args:
        student, teacher: logits ``[tokens, vocabulary]``, a chunk at a time computed in float32.
        counted: bool ``[tokens]``, the tokens that count; all where left out.

    The factor T² keeps gradients of the same size at every temperature (Hinton, Vinyals, Dean 2015).
    """
    loss: Tensor = _Divergence.apply(student, teacher, temperature, counted)
    return loss


def block_distance(h: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of ``|h - target|² / |target|²``, both ``[batch, length, width]``; float32.

    Every token is measured by its own norm: the first one's is up to a thousand times that of others in some models.
    """
    target = target.float()
    size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    distance = (h.float() - target).square().sum(-1) / size
    return distance.mean() if mask is None else (distance * mask).sum() / mask.sum()


class _Divergence(torch.autograd.Function):
    """:func:`distillation_loss`, its gradient ``T (q - p)`` written down: only it is kept, in the logits' dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, counted: Tensor | None) -> Tensor:
        gradient = torch.empty_like(student)
        loss = torch.zeros((), dtype=torch.float32, device=student.device)
        weight = torch.ones(len(student), device=student.device) if counted is None else counted.float()
        weight = (weight / weight.sum())[:, None]
        rows = max(1, CHUNK // student.shape[1])
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            log_q = F.log_softmax(student[part].float() / temperature, dim=-1)
            log_p = F.log_softmax(teacher[part].float() / temperature, dim=-1)
            p = log_p.exp()
            loss += temperature**2 * (weight[part] * p * (log_p - log_q)).sum()
            gradient[part] = (log_q.exp_() - p).mul_(temperature * weight[part])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None


@contextmanager
def _outputs(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Context manager with the hidden states that ``blocks`` return, in the order of computation."""
    found: list[Tensor] = []

    def note(_: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _width(model: nn.Module) -> int:
    size: int = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    return size
