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

from llm_surgeon.errors import NumericalError, UnsupportedModelError, first_line
from llm_surgeon.formats import modeling_pruned
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.models.rebuild import accepts, adopt, build_block, layer_config, reloaded, weight_shape
from llm_surgeon.models.state import ModelState
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.find.probe import TOKENS

# Logits may differ by rounding, as sums are made over fewer (zero) terms.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_LOOSE = 0.1


def narrow(model: PreTrainedModel, decoder: Decoder, removed: Sequence[tuple[Dimension, Tensor]]) -> None:
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
    """Linears read zeros in the place of the parts that go, for a while."""

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


def become_pruned(model: PreTrainedModel, decoder: Decoder) -> None:
    """Change the model's class to the one that rebuilds its blocks, and its saved form accordingly."""
    cls, first = type(model), decoder.linears[0]
    model.config.pruned_blocks = first.name.removesuffix(f".{first.depth}.{first.kind}")
    if not hasattr(model.config, "pruned_modules"):
        model.config.pruned_modules = {}
    if hasattr(cls, "is_pruned"):
        return
    try:
        model.__class__ = getattr(modeling_pruned, f"Pruned{cls.__name__}")
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{cls.__name__} is no class of transformers: keep one width for all blocks with uniform"
        ) from error
    type(model).register_for_auto_class("AutoModelForCausalLM")
    # Tensors that transformers renamed as it loaded them would be saved under their old names, and only its own classes
    # are loaded from these.
    model._weight_conversions = None


def _probe_ids(model: PreTrainedModel) -> Tensor:
    """Token ids of two whole sequences."""
    embedding = model.get_input_embeddings().weight
    return torch.arange(2 * TOKENS, device=embedding.device).view(2, -1) % embedding.shape[0]


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits of a few tokens, those a probe reads: of two whole sequences, and of two of which one is padded.

    Raises:
        UnsupportedModelError: the model's class does not run at its sizes.
    """
    ids = _probe_ids(model)
    mask = torch.ones_like(ids)
    mask[1, : TOKENS // 4] = 0  # attention takes other ways where there is a mask
    try:
        with evaluation_mode(model):
            whole = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
            padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the model's own code says to sizes that it cannot run at
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run at these sizes: {first_line(error)}"
        ) from error
    return torch.cat([whole, padded])


@torch.no_grad()
def decodes(model: PreTrainedModel) -> bool:
    """Whether the model gives the same logits token by token, as ``generate`` asks for them, as all at once.

    A model whose class has no such cache, or fails with it, does not.
    """
    ids, found = _probe_ids(model), []
    try:
        with evaluation_mode(model):
            whole = model(input_ids=ids, use_cache=False).logits
            cache = None
            for part in ids.split([TOKENS // 2] + [1] * (TOKENS - TOKENS // 2), dim=1):
                output = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                found.append(output.logits)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the model's own code says: then it does not
        return False
    return cache is not None and same_logits(torch.cat(found, dim=1), whole, rounding=1e-5)


def check_reloads(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedModelError` unless a saved copy of ``model`` loads and computes the same."""
    # Buffers such as rotary frequencies are made anew, in float32.
    if not same_logits(probe_logits(reloaded(model)), probe_logits(model), rounding=1e-5):
        raise UnsupportedModelError(
            f"{type(model).__name__} of these sizes cannot be loaded again: its class computes other logits"
        )


@contextmanager
def verified(model: PreTrainedModel, before: Tensor | None, message: str, rounding: float = 0.0) -> Iterator[None]:
    """A change of sizes that leaves :func:`probe_logits` as ``before``, the cache right and the model fit to be saved.

    Without ``before`` logits are not compared.

    Raises:
        NumericalError: ``message``: the logits differ. UnsupportedModelError: the class cannot run, decode from its
            cache what it could before, or load at these sizes. The model is as it was in all cases.
    """
    could_decode, state = decodes(model), ModelState(model)
    try:
        yield
        after = probe_logits(model)
        if before is not None and not same_logits(after, before, rounding):
            raise NumericalError(message)
        if could_decode and not decodes(model):
            raise UnsupportedModelError(f"{type(model).__name__} does not generate at these sizes: its cache fails")
        check_reloads(model)
    except BaseException:
        state.restore()
        raise


def same_logits(x: Tensor, y: Tensor, rounding: float = 0.0) -> bool:
    """Whether logits agree, up to the rounding of sums over fewer (zero) terms in their dtype, or ``rounding``."""
    difference = float((x - y).abs().max() / y.abs().max())
    return difference <= max(rounding, _TOLERANCE.get(y.dtype, _LOOSE))


@contextmanager
def undone(model: PreTrainedModel) -> Iterator[None]:
    """A change of sizes is tried, and taken back."""
    state = ModelState(model)
    try:
        yield
    finally:
        state.restore()
