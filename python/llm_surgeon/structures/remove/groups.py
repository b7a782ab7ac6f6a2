"""Take removed groups out of a model's matrices, for good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.formats import modeling_pruned
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.rebuild import accepts, adopt, become_pruned, build_block, layer_config, weight_shape
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.remove.verify import probe_logits, verified


def remove_groups(model: PreTrainedModel, decoder: Decoder, removed: Sequence[tuple[Dimension, Tensor]]) -> None:
    """Remove parts whose weights are zero: matrices, configuration and, where blocks come to differ, the model's class.

    A model whose blocks keep equal sizes stays of its class; any other becomes a ``Pruned...`` of
    :mod:`modeling_pruned`, whose code travels with the checkpoint. The logits of a few tokens are compared with those
    of the model whose removed parts are masked: so it may also be tried with weights that are not zero.

    Args:
        removed: dimensions with the parts that go, bool ``[groups, parts]``.

    Raises:
        UnsupportedModelError: no class builds or runs the smaller model. NumericalError: it computes something else.
            The model is as it was then.
    """
    with _masked(removed):
        before = probe_logits(model)
    with verified(model, before, "the smaller model's logits differ from the zeroed model's"):
        cuts = _cuts(decoder, removed)
        for linear in decoder.linears:
            _cut(linear, *cuts[linear.name])
        _resize(model, decoder, removed)


@contextmanager
def _masked(removed: Sequence[tuple[Dimension, Tensor]]) -> Iterator[None]:
    """Context manager in which linears read zeros in the place of the parts that go; restored on exit."""

    def mask(columns: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].masked_fill(columns, 0.0), *args[1:]

    with ExitStack() as hooks:
        for dimension, parts in removed:
            columns = dimension.removed_columns(parts)
            hooks.enter_context(dimension.consumer.module.register_forward_pre_hook(partial(mask, columns)))
        yield


def _cuts(decoder: Decoder, removed: Sequence[tuple[Dimension, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Kept rows and columns of every linear."""
    kept = {}
    for linear in decoder.linears:
        device = linear.module.get_parameter("weight").device
        ones = torch.ones(linear.rows + linear.columns, dtype=torch.bool, device=device)
        kept[linear.name] = (ones[: linear.rows], ones[linear.rows :])
    for dimension, parts in removed:
        kept[dimension.consumer.name][1][dimension.removed_columns(parts)] = False
        for producer, rows in dimension.removed_rows(parts):
            kept[producer.name][0][rows] = False
    return kept


def _cut(linear: PrunableLinear, rows: Tensor, columns: Tensor) -> None:
    if bool(rows.all()) and bool(columns.all()):
        return
    module, old = linear.module, linear.module.get_parameter("weight")
    matrix = linear.matrix(old.dtype)
    weight = matrix[:, : linear.columns][rows][:, columns]
    if linear.has_bias:
        module.bias = nn.Parameter(matrix[rows, -1].contiguous(), module.get_parameter("bias").requires_grad)
    conv = isinstance(module, Conv1D)
    module.weight = nn.Parameter((weight.T if conv else weight).contiguous(), old.requires_grad)
    names = ("nf", "nx") if conv else ("out_features", "in_features")
    for name, size in zip(names, weight.shape, strict=True):
        setattr(module, name, size)


def _resize(model: PreTrainedModel, decoder: Decoder, removed: Sequence[tuple[Dimension, Tensor]]) -> None:
    """Tell every block, and the model's configuration, its new sizes."""
    config, depths = model.config, range(len(decoder.blocks))
    former = getattr(config, "pruned_modules", {})
    modules: list[dict[str, Any]] = [dict(former.get(str(depth), {})) for depth in depths]
    changes: list[dict[str, int]] = [
        {name: getattr(config.per_layer_config[depth], name) for name in config.per_layer_attributes or ()}
        for depth in depths
    ]
    for dimension, parts in (pair for pair in removed if bool(pair[1].any())):
        full = dimension.quantities(dimension.groups, dimension.parts)
        missing = {name: full[of] for name, of in dimension.rule.config.items() if not hasattr(config, name)}
        vars(config).update(missing | dimension.rule.constants)
        left = (~parts).sum(dim=1)
        sizes = dimension.quantities(int((left > 0).sum()), int(left.max()))
        changes[dimension.depth] |= {name: sizes[of] for name, of in dimension.rule.config.items()}
        modules[dimension.depth] |= {name: sizes[of] for name, of in dimension.rule.attributes.items()}
    config.per_layer_config = None
    common = {name: value for name, value in changes[0].items() if all(c.get(name) == value for c in changes)}
    if not accepts(config, common):  # as sizes of single blocks they are not looked at
        common = {}
    vars(config).update(common)
    changes = [{name: value for name, value in change.items() if name not in common} for change in changes]
    alike = not any(changes)
    for depth, block in enumerate(decoder.blocks):
        own = config if alike else layer_config(config, changes[depth])
        built = build_block(block, own, depth)
        if built is None:
            raise UnsupportedModelError(f"{type(block).__name__} cannot be built with {changes[depth]}")
        adopt(block, built)
        for linear in (linear for linear in decoder.linears if linear.depth == depth):
            if weight_shape(built.get_submodule(linear.kind)) != (linear.rows, linear.columns):
                modules[depth][linear.kind] = [linear.rows, linear.columns]
            else:
                modules[depth].pop(linear.kind, None)
        modeling_pruned.resize_block(block, {k: v for k, v in modules[depth].items() if not isinstance(v, list)})
    if not alike:
        config.per_layer_config = dict(enumerate(changes))
        config.allow_global_per_layer_attribute_access = True  # the configurations' own checks read the dense sizes
    if not alike or any(modules):
        config.pruned_modules = {str(depth): change for depth, change in enumerate(modules) if change}
        become_pruned(model, decoder)
