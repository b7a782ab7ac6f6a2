"""The output head: logits from the last hidden states, computed for a chunk of tokens at a time."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.models.checks import PROBE_SHAPE
from surgeon_kernels.linalg.half_products import addmm_half_, aligned_empty

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of models what their heads turned out to be, and what they were then: their hooks, and the head.
_probed: weakref.WeakKeyDictionary[nn.Module, tuple[object, bool]] = weakref.WeakKeyDictionary()


class HeadLogits:
    """Logits ``W h + b`` of last hidden states ``h`` ``[..., H]``: a :class:`~llm_surgeon.models.loss.Logits`.

    Hidden states are multiplied in the dtype of ``weight`` ``[V, H]`` and summed in float32 (float64 for float64), and
    so are the logits of a chunk; those of all tokens are never there at once. Without a gradient only the hidden states
    in that dtype are held.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, with_gradient: bool = False) -> None:
        self._weight, self._bias = weight.detach(), bias if bias is None else bias.detach()
        self._hidden = hidden.detach().flatten(0, -2).to(weight.dtype)
        self.source = hidden if with_gradient else self._hidden
        self.gradient = hidden.new_empty(hidden.shape) if with_gradient else None

    @property
    def shape(self) -> tuple[int, int]:
        return self._hidden.shape[0], self._weight.shape[0]

    def rows(self, chunk: slice) -> Tensor:
        z = _product(self._hidden[chunk], self._weight.T)
        return z if self._bias is None else z.add_(self._bias)

    def put(self, chunk: slice, gradient: Tensor) -> None:
        assert self.gradient is not None
        self.gradient.flatten(0, -2)[chunk] = _product(gradient.to(self._weight.dtype), self._weight)


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output head, if logits are what it makes of the last hidden states; None where more is done to either.

    A model that scales or caps its logits is told by two passes over a few tokens, with the head and without it, when
    it is first asked about, and again when it has other hooks, another head or a ``forward`` of its own.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head) or any(getattr(head, hooks) for hooks in _HOOKS):
        return None
    as_it_is = weakref.ref(head), vars(model).get("forward"), *(tuple(getattr(model, hooks)) for hooks in _HOOKS)
    before, plain = _probed.get(model, (None, False))
    if before != as_it_is:
        plain = _is_plain(model, head)
        _probed[model] = as_it_is, plain
    return head if plain else None


@torch.no_grad()
def _is_plain(model: PreTrainedModel, head: nn.Linear) -> bool:
    ids = torch.arange(PROBE_SHAPE[1], device=head.weight.device)[None] % head.weight.shape[0]
    logits = model(input_ids=ids, use_cache=False).logits
    with left_out(head):
        hidden = model(input_ids=ids, use_cache=False).logits
    return hidden.shape[-1] == head.in_features and torch.equal(head(hidden.to(head.weight.dtype)), logits)


@contextlib.contextmanager
def left_out(head: nn.Module) -> Iterator[None]:
    """Context manager in which ``head`` returns what it is given; restored on exit."""
    try:
        head.forward = lambda hidden: hidden
        yield
    finally:
        vars(head).pop("forward", None)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``x y``, summed and returned in float32 at least."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return addmm_half_(aligned_empty((x.shape[0], y.shape[1]), torch.float32, x.device), x, y, beta=0.0)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) @ y.to(dtype)
