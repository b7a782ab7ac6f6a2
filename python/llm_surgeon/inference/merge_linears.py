"""Linears that read one tensor, such as q, k and v, or gate and up, computed for a single token by one product.

A step of decoding one sequence reads every weight once, in many short launches: fewer and longer ones are faster.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llm_surgeon.models.shared_inputs import shared_inputs


@contextlib.contextmanager
def joined(model: PreTrainedModel) -> Iterator[None]:
    """Linears called one after the other with one tensor share a launch for a while, where that is a single token.

    Which ones these are, a forward pass over two tokens shows. Their weights are views of one tensor meanwhile, so that
    they take no more memory; outputs are the same up to rounding. With more tokens, and wherever a linear is called
    with something else, every linear computes its own: its output is then contiguous, as what follows may want it.
    """
    with contextlib.ExitStack() as stack:
        plain = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
        for linears in filter(_can_be_joined, shared_inputs(model, plain)):
            group = _Group(linears)
            for position, linear in enumerate(linears):
                linear.forward = functools.partial(group.output, position)  # type: ignore[method-assign]
                stack.callback(_separate, linear)
        yield


class _Group:
    """Linears that are called in this order with one input."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self._linears, self._sizes = linears, [linear.out_features for linear in linears]
        self._weight = torch.cat([linear.weight.detach() for linear in linears])
        self._bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        for linear, rows in zip(linears, self._weight.split(self._sizes), strict=True):
            linear.weight.data = rows
        self._waiting: tuple[Tensor, int | None, tuple[Tensor, ...]] | None = None  # input, its version, outputs

    def output(self, position: int, x: Tensor) -> Tensor:
        """What the linear at ``position`` returns for ``x``."""
        linear = self._linears[position]
        if x.numel() != x.shape[-1] or torch.is_grad_enabled():
            return functional.linear(x, linear.weight, linear.bias)
        # A tensor written to in between is another input. torch.compile traces no versions.
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        if position == 0:
            outputs = functional.linear(x, self._weight, self._bias).split(self._sizes, dim=-1)
            self._waiting = x, version, outputs
        if self._waiting is None or self._waiting[0] is not x or self._waiting[1] != version:
            return functional.linear(x, linear.weight, linear.bias)
        output = self._waiting[2][position]
        if position == len(self._sizes) - 1:
            self._waiting = None  # what is no longer needed is freed
        return output


def _separate(linear: nn.Linear) -> None:
    del linear.forward
    linear.weight.data = linear.weight.data.clone()


def _can_be_joined(group: list[nn.Linear]) -> bool:
    kinds = {(linear.weight.dtype, linear.weight.device, linear.bias is None) for linear in group}
    return len(set(group)) == len(group) > 1 and len(kinds) == 1
