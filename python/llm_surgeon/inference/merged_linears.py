"""Linears that read the same input, such as q, k and v, or gate and up, computed by one launch.

One large product fills a GPU better than several small ones, and decoding is a long chain of small ones. The modules
stay as they are: the first of a group to be called computes the outputs of all, and the others, called next with the
very same tensor, take theirs. A layer that finds no output waiting computes its own, and so does every layer of a long
prompt, which fills a GPU anyway. Nothing changes on disk.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llm_surgeon.formats.packed_linear import PackedLinear, frozen_parameter, tune_once
from llm_surgeon.inference.pack import packed_linears
from surgeon_kernels import Packed24
from surgeon_kernels.sparse24.linear_2_4 import Linear24Weight, linear_2_4, prepare_2_4
from surgeon_kernels.sparse24.linear_2_4_layout import UNIT_ROWS

if TYPE_CHECKING:  # it would bring transformers' models, which bring this: see _registration.py
    from transformers import PreTrainedModel

Module = TypeVar("Module", bound=nn.Module)

# Tokens from which a layer alone is as fast as its share of the group, and leaves its outputs contiguous.
_ALONE_FROM = 1024
_numbers = itertools.count(1)


class _Waiting:
    """Input, its version, number of the group and outputs of the group whose first layer was called last."""

    entry: tuple[Tensor, int | None, int, Tensor] | None = None


_waiting = _Waiting()


class MergedPackedLinear(PackedLinear):
    """A layer of a group; the first one's ``fragments`` hold the weights of all, the others' are views of them.

    Once it is moved, cast or loaded anew it is an ordinary :class:`PackedLinear` again.
    """

    group = 0  # none
    group_rows = 0
    first_row = 0
    last = False

    @property
    def packed(self) -> Packed24:
        if self.fragments is None:
            return super().packed
        return self._own(self.fragments).packed()

    def forward(self, x: Tensor) -> Tensor:
        fragments = self.fragments
        if not self.group or fragments is None:
            return super().forward(x)
        if x.numel() >= _ALONE_FROM * self.in_features:
            return linear_2_4(x, self._own(fragments))
        # A tensor written to in between is another input. torch.compile traces no versions.
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        if self.first_row == 0:
            outputs = self.outputs_of_all(x)
            _waiting.entry = x, version, self.group, outputs
        else:
            entry = _waiting.entry
            if entry is None or entry[0] is not x or entry[1] != version or entry[2] != self.group:
                return linear_2_4(x, self._own(fragments))
            outputs = entry[3]
            if self.last:
                _waiting.entry = None
        return outputs[..., self.first_row : self.first_row + self.out_features]

    def leads(self, layers: Sequence[PackedLinear]) -> bool:
        """True if ``layers`` are those of the group, and this one is the first."""
        if not self.group or self.first_row or {getattr(layer, "group", 0) for layer in layers} != {self.group}:
            return False
        return sum(layer.out_features for layer in layers) == self.group_rows

    def outputs_of_all(self, x: Tensor) -> Tensor:
        """``[..., Σ R]``, of all layers of the group that this one leads."""
        assert self.fragments is not None
        return linear_2_4(x, self._kernel_weight(self.fragments)._replace(rows=self.group_rows, compressed=None))

    def _own(self, fragments: Tensor) -> Linear24Weight:
        """This layer's weight; ``fragments`` of the first layer go on with those of the others."""
        return self._kernel_weight(fragments[: -(-self.out_features // UNIT_ROWS)])

    def _set_packed(self, packed: Packed24) -> None:
        super()._set_packed(packed)
        self.group = 0


def merge_packed_linears(model: PreTrainedModel) -> list[list[str]]:
    """Let one launch compute the packed layers without biases that are called one after the other with one input.

    Which ones these are, a forward pass over two tokens shows. Outputs may differ in rounding from those of the
    layers alone, as a product of another size can be summed in another order. Layers that have no kernel (not on
    CUDA, say) stay as they are. A model to be compiled must not write to the input between two layers of a group.

    Returns:
        The names of the layers of each group.
    """
    names = {layer: name for name, layer in packed_linears(model)}
    merged = []
    for group in filter(_mergeable_packed, shared_inputs(model, names)):
        _merge_packed(group)
        merged.append([names[layer] for layer in group])
    return merged


def _merge_packed(group: Sequence[PackedLinear]) -> None:
    together = Packed24(*map(torch.cat, zip(*(layer.packed for layer in group), strict=True)))
    prepared = prepare_2_4(together)
    tune_once(prepared)
    number, row = next(_numbers), 0
    for layer in group:
        rows = prepared.fragments[row // UNIT_ROWS : -(-(row + layer.out_features) // UNIT_ROWS)]
        layer.__class__ = MergedPackedLinear
        assert isinstance(layer, MergedPackedLinear)
        layer.fragments = frozen_parameter(rows if row else prepared.fragments)
        layer.group, layer.group_rows, layer.first_row = number, prepared.rows, row
        layer.last = layer is group[-1]
        row += layer.out_features


def _mergeable_packed(layers: Sequence[PackedLinear]) -> bool:
    if len(set(layers)) < max(2, len(layers)):  # one alone, or one called twice
        return False
    if any(layer.fragments is None or layer.bias is not None or getattr(layer, "group", 0) for layer in layers):
        return False
    kinds = {(layer.in_features, layer.packed.values.dtype, layer.packed.values.device) for layer in layers}
    return len(kinds) == 1 and not any(layer.out_features % UNIT_ROWS for layer in layers)


@contextlib.contextmanager
def merge_linears(model: PreTrainedModel) -> Iterator[None]:
    """Context manager: linears called one after the other with one tensor share a launch where that is a single token.

    Which ones these are, a forward pass over two tokens shows. Their weights are views of one tensor until the exit, so
    that they take no more memory; outputs are the same up to rounding. With more tokens, and wherever a linear is
    called with something else, every linear computes its own: its output is then contiguous, as what follows may want
    it.
    """
    with contextlib.ExitStack() as stack:
        plain = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
        for linears in filter(_mergeable, shared_inputs(model, plain)):
            group = _Merged(linears)
            for position, linear in enumerate(linears):
                linear.forward = functools.partial(group.output, position)  # type: ignore[method-assign]
                stack.callback(_separate, linear)
        yield


def merged_product(linears: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """``x [..., C] → [..., Σ R]``, what ``linears`` compute of ``x`` side by side, by one launch where they allow it.

    Dense ones of one dtype on one device do, and packed ones without biases that have a kernel. Their weights are views
    of one tensor from then on. Others are called one after the other. A result holds as long as the layers are neither
    moved nor cast nor loaded anew.
    """
    if all(type(linear) is nn.Linear and "forward" not in vars(linear) for linear in linears):
        dense = cast("Sequence[nn.Linear]", linears)
        if _mergeable(dense):
            return functools.partial(_product, *_merge(dense))
    elif all(isinstance(linear, PackedLinear) for linear in linears):
        packed = cast("Sequence[PackedLinear]", linears)
        if _mergeable_packed(packed):
            _merge_packed(packed)
        first = packed[0]
        if isinstance(first, MergedPackedLinear) and first.leads(packed):
            return first.outputs_of_all
    return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return functional.linear(x, weight, bias)


def _merge(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of all, the former as a tensor that those of the linears are views of from now on."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    for linear, rows in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = rows
    return weight, bias


class _Merged:
    """Linears that are called in this order with one input."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self._linears, self._sizes = linears, [linear.out_features for linear in linears]
        self._weight, self._bias = _merge(linears)
        self._waiting: tuple[Tensor, int | None, tuple[Tensor, ...]] | None = None  # input, its version, outputs

    def output(self, position: int, x: Tensor) -> Tensor:
        """Output of the linear at ``position`` for ``x``."""
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


def _mergeable(group: Sequence[nn.Linear]) -> bool:
    kinds = {(linear.weight.dtype, linear.weight.device, linear.bias is None) for linear in group}
    return len(set(group)) == len(group) > 1 and len(kinds) == 1


def shared_inputs(model: PreTrainedModel, modules: Iterable[Module]) -> list[list[Module]]:
    """``modules`` in the order of a forward pass over two tokens, those together that one tensor goes to in turn.

    A module that is called twice stands there twice; one that is not called, nowhere.
    """
    groups: list[list[Module]] = []
    inputs: list[Tensor] = []  # kept alive, so that no two have one address

    def note(module: Module, arguments: tuple[Tensor, ...]) -> None:
        if not inputs or arguments[0] is not inputs[-1]:
            groups.append([])
        inputs.append(arguments[0])
        groups[-1].append(module)

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return groups
