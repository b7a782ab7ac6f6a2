"""The data's cross-entropy, and its gradient with respect to the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llm_surgeon.data.calibration import Calibration
from llm_surgeon.errors import BadBatchError, InputError

# Logits held in float32 at once.
CHUNK = 1 << 24


def count_tokens(model: PreTrainedModel, calibration: Calibration) -> tuple[int, int]:
    """Numbers of real tokens and of next tokens to predict.

    Raises:
        InputError: there is no next token to predict, or a token that the model does not know.
    """
    input_ids, mask = calibration.input_ids, calibration.attention_mask
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    targets = int(_precedes_real(real).sum())
    if targets == 0:
        raise InputError("the calibration data are empty: no sequence has two tokens in a row")
    # An output head may know fewer tokens than the embedding.
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    vocabulary, largest = min(end.weight.shape[0] for end in ends), int(input_ids.max())
    if largest >= vocabulary:
        raise InputError(f"the calibration data hold token {largest}, but the vocabulary has {vocabulary}")
    return int(real.sum()), targets


def _precedes_real(real: Tensor) -> Tensor:
    """True where a real token is followed by a real token, bool ``[batch, length]``."""
    out = torch.zeros_like(real)
    out[:, :-1] = real[:, :-1] & real[:, 1:]
    return out


class Logits(Protocol):
    """Logits at the end of a forward pass as rows of tokens, ``[N, V]``, of which a chunk is asked for at a time.

    Attributes:
        source: tensor that the backward pass starts from.
        gradient: of the loss with respect to ``source``, once it was put for all chunks; ``None`` if it is not wanted.
    """

    source: Tensor
    gradient: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """N and V."""

    def rows(self, chunk: slice) -> Tensor:
        """Logits of some tokens, of any floating dtype."""

    def put(self, chunk: slice, gradient: Tensor) -> None:
        """Take the loss's gradient with respect to the logits of some tokens, and make that of ``source`` of it."""


class WholeLogits:
    """Logits that a model has computed at once: a :class:`Logits`.

    Their gradient is written over those that the backward pass does not need: they are the largest tensor of all.
    """

    def __init__(self, logits: Tensor, *, with_gradient: bool = False) -> None:
        self.source, self._rows = logits, logits.detach().flatten(0, 1)
        own = self._rows if _overwritable(logits) else None
        self._gradient = (torch.empty_like(self._rows) if own is None else own) if with_gradient else None
        self.gradient = None if self._gradient is None else self._gradient.view_as(logits)

    @property
    def shape(self) -> tuple[int, int]:
        return self._rows.shape[0], self._rows.shape[1]

    def rows(self, chunk: slice) -> Tensor:
        return self._rows[chunk]

    def put(self, chunk: slice, gradient: Tensor) -> None:
        assert self._gradient is not None
        self._gradient[chunk] = gradient


@torch.no_grad()
def next_token_loss(
    logits: Logits,
    input_ids: Tensor,
    mask: Tensor | None,
    draws: Tensor | None = None,
) -> Tensor:
    """Sum of the data's token cross-entropies; the gradient of the sum is put into ``logits``, where it is wanted.

    The gradient, ``softmax(z) - onehot(label)`` at every position with a label, is written down instead of derived by
    autograd, and so only a chunk of it is ever held in float32. With ``draws``, uniform in [0, 1), ``[batch, length]``,
    the gradient's labels (not the loss's) are drawn from the softmax by them, at every real position.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    has_target = _precedes_real(real)
    used = has_target if draws is None else real
    device = logits.source.device
    labels, has_target, used = (t.flatten().to(device) for t in (input_ids.roll(-1, dims=1), has_target, used))
    uniform = None if draws is None else draws.flatten().to(device)
    loss = torch.zeros((), dtype=torch.promote_types(logits.source.dtype, torch.float32), device=device)
    for chunk in _chunks(logits):
        log_p = _log_probabilities(logits, chunk)
        label = labels[chunk, None]
        loss -= log_p.gather(1, label)[:, 0].masked_fill(~has_target[chunk], 0.0).sum()
        if logits.gradient is not None:
            p = log_p.exp_()
            if uniform is not None:
                label = _sample(p, uniform[chunk, None])
            p.scatter_add_(1, label, p.new_full(label.shape, -1.0))
            logits.put(chunk, p.masked_fill_(~used[chunk, None], 0.0))
    return loss


@torch.no_grad()
def divergence(logits: Logits, wanted: Logits, mask: Tensor | None) -> Tensor:
    """Sum over real tokens of ``KL(p ‖ q)``, ``p = softmax(wanted)``, ``q = softmax(logits)``.

    Its gradient ``q - p`` is put into ``logits``, where it is wanted.
    """
    device = logits.source.device
    padding = None if mask is None else ~mask.flatten().to(device)[:, None]
    loss = torch.zeros((), dtype=torch.promote_types(logits.source.dtype, torch.float32), device=device)
    for chunk in _chunks(logits):
        log_p, log_q = _log_probabilities(wanted, chunk), _log_probabilities(logits, chunk)
        p = log_p.exp()
        # Logits of minus infinity, of tokens that cannot be, add nothing.
        terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0.0, 0.0)
        loss += (terms if padding is None else terms.masked_fill_(padding[chunk], 0.0)).sum()
        if logits.gradient is not None:
            gradient = log_q.exp_().sub_(p)
            logits.put(chunk, gradient if padding is None else gradient.masked_fill_(padding[chunk], 0.0))
    return loss


def _chunks(logits: Logits) -> Iterator[slice]:
    """Ranges of tokens whose logits are held in float32 at once."""
    tokens, vocabulary = logits.shape
    step = max(1, CHUNK // vocabulary)
    return (slice(start, start + step) for start in range(0, tokens, step))


def _log_probabilities(logits: Logits, chunk: slice) -> Tensor:
    """``log softmax`` of some tokens' logits, float32 (float64 for float64 ones), a new tensor."""
    z = logits.rows(chunk)
    return z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(dim=1)


def differentiable_loss(logits: Tensor, input_ids: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """Sum or mean of the data's token cross-entropies, float32, for autograd to go back through.

    Args:
        logits: ``[batch, length, vocabulary]``, also those of the last position, which predicts nothing.
        reduction: ``"sum"`` or ``"mean"``.
    """
    labels = input_ids[:, 1:]
    if mask is not None:
        labels = labels.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction=reduction)


def finite_loss(loss: Tensor, batch: int, batches: int, windows: range) -> float:
    """The value of a batch's loss; :class:`BadBatchError` where it is NaN or infinite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise BadBatchError("the loss", batch, batches, windows)
    return value


def _overwritable(logits: Tensor) -> bool:
    """True where the logits come straight from a matrix product, whose backward pass reads only its factors.

    Not where they are a view of that product (a head with a bias): autograd derives the backward step of a changed view
    anew, and the interpreter dies when a hook is then added to it.
    """
    step = logits.grad_fn
    if step is not None and step.name() == "UnsafeViewBackward0":
        step = step.next_functions[0][0]
    return step is not None and step.name() in ("MmBackward0", "AddmmBackward0")


def _sample(p: Tensor, uniform: Tensor) -> Tensor:
    """First entry of each row of ``p`` ``[n, V]`` up to which its sum exceeds the share ``uniform`` ``[n, 1]`` of it.

    NaN passes: it is reported with the name of its layer.
    """
    sums = p.cumsum(dim=1)
    return torch.searchsorted(sums, uniform.to(p.dtype) * sums[:, -1:], right=True).clamp_max_(p.shape[1] - 1)
