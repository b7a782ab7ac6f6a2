"""Take channels of the residual stream out of a model: first zero, then for good."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.formats import modeling_pruned
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.probe import capture_inputs
from llm_surgeon.models.rebuild import become_pruned, build_block, reloaded, weight_shape
from llm_surgeon.structures.find.residual import Residual
from llm_surgeon.structures.remove.verify import probe_logits, verified

# Norms compute in float32 in models of any dtype, and here over other numbers of channels.
_ROUNDING = 1e-5


@torch.no_grad()
def zero_channels(residual: Residual, removed: Tensor) -> None:
    """Take channels, bool ``[width]``, out of the stream; what is left is centred where norms subtract the mean.

    A layer norm does not see a constant added to the channels it reads, so making the mean of those that are left zero
    changes nothing for a norm over them alone; and with zeros for the others the mean over all is theirs too.
    """
    kept = ~removed
    for embedding in residual.embeddings:
        embedding.weight[:, removed] = 0.0
        if residual.centred:
            embedding.weight[:, kept] -= embedding.weight[:, kept].mean(dim=1, keepdim=True)
    for writer in residual.writers:
        matrix = writer.matrix(torch.promote_types(writer.module.get_parameter("weight").dtype, torch.float32))
        matrix[removed] = 0.0
        if residual.centred:
            matrix[kept] -= matrix[kept].mean(dim=0, keepdim=True)
        writer.write(matrix)


@torch.no_grad()
def remove_channels(
    model: PreTrainedModel, decoder: Decoder, residual: Residual, removed: Tensor, *, compared: bool = True
) -> None:
    """Remove channels that are zero, for good; where they are not, the model's logits are not ``compared``.

    A norm over d' of d channels divides by the root of the mean of fewer squares: the stream is scaled by
    ``√(d'/d)`` where it is written, and the norms' weights by ``√(d/d')``, so that the two models agree.

    Raises:
        NumericalError: the narrower model computes something else. UnsupportedModelError: no class builds or runs it.
            The model is as it was.
    """
    before, stream = probe_logits(model) if compared else None, capture_inputs(model, decoder.blocks[0])[0]
    kept, scale = ~removed, math.sqrt(int((~removed).sum()) / residual.width)
    message = "the narrower model's logits differ from the zeroed model's: keep its width"
    with verified(model, before, message, _ROUNDING):
        if not residual.tied:
            head = residual.head
            head.weight = nn.Parameter(head.weight[:, kept].contiguous(), head.weight.requires_grad)
            head.in_features = head.weight.shape[1]
        for linear in {x.name: x for x in (*residual.readers, *residual.writers)}.values():
            _slice(linear, kept, linear in residual.readers, linear in residual.writers, scale)
        _set_embeddings(residual, kept, scale)
        for norm in (*residual.norms, *residual.output_norms):
            _slice_norm(norm, kept, residual.offsets.get(norm, 0.0), 1 / scale if norm in residual.norms else 1.0)
        _resize(model, decoder, residual.width, int(kept.sum()))
        _adopt_sizes(model, reloaded(model))
        # Some models multiply the embedding by the root of the width.
        now = capture_inputs(model, decoder.blocks[0])[0]
        more = scale * float((stream[..., kept] * now).sum() / now.square().sum())
        if abs(more - 1.0) < torch.finfo(model.dtype).eps:
            more = 1.0
        _set_embeddings(residual, torch.ones_like(kept[kept]), more)
        if residual.tied:  # the head has been scaled with the embedding
            offset = residual.offsets[residual.final_norm]
            _slice_norm(residual.final_norm, torch.ones_like(kept[kept]), offset, 1 / (scale * more), bias=True)


def _set_embeddings(residual: Residual, kept: Tensor, factor: float) -> None:
    for embedding in residual.embeddings:
        old = embedding.weight
        weight = nn.Parameter((old[:, kept] * factor).contiguous(), old.requires_grad)
        if residual.tied and old is residual.head.weight:
            residual.head.weight, residual.head.in_features = weight, weight.shape[1]
        embedding.weight, embedding.embedding_dim = weight, weight.shape[1]


def _slice_norm(norm: nn.Module, kept: Tensor, offset: float, factor: float, *, bias: bool = False) -> None:
    """Keep some channels and multiply the gain, ``weight + offset``, by ``factor``; with ``bias`` the bias, too."""
    for name, parameter in list(norm.named_parameters(recurse=False)):
        part = parameter[kept]
        if name == "weight":
            part = (part.to(torch.promote_types(part.dtype, torch.float32)) + offset) * factor - offset
        elif bias:
            part = part * factor
        setattr(norm, name, nn.Parameter(part.to(parameter.dtype), parameter.requires_grad))
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (int(kept.sum()),)


def _adopt_sizes(model: PreTrainedModel, built: PreTrainedModel) -> None:
    """Give the modules of ``model`` the numbers, buffers that are not stored included, of ``built``'s."""
    for name, module in built.named_modules():
        own = model.get_submodule(name)
        for key, value in vars(module).items():
            if type(value) in (int, float) and vars(own).get(key, value) != value:
                vars(own)[key] = value
        buffers = dict(own._buffers)
        for key in own._non_persistent_buffers_set:
            old, new = buffers[key], module._buffers[key]
            if old is not None and new is not None and not torch.allclose(old.double(), new.double(), rtol=1e-3):
                buffers[key] = new.to(old.dtype)
        vars(own)["_buffers"] = buffers


def _slice(linear: PrunableLinear, kept: Tensor, reads: bool, writes: bool, scale: float) -> None:
    module = linear.module
    matrix = linear.matrix(module.get_parameter("weight").dtype)
    if writes:
        matrix = matrix[kept] * scale
    if linear.has_bias:
        module.bias = nn.Parameter(matrix[:, -1].contiguous(), module.get_parameter("bias").requires_grad)
        matrix = matrix[:, :-1]
    if reads:
        matrix = matrix[:, kept]
    conv = isinstance(module, Conv1D)
    module.weight = nn.Parameter(
        (matrix.T if conv else matrix).contiguous(), module.get_parameter("weight").requires_grad
    )
    for attribute, size in zip(("nf", "nx") if conv else ("out_features", "in_features"), matrix.shape, strict=True):
        setattr(module, attribute, size)


def _resize(model: PreTrainedModel, decoder: Decoder, old: int, new: int) -> None:
    """Tell the configuration the width; what it cannot say of a block goes to ``pruned_modules``."""
    config: Any = model.config
    told = "head_dim" in (config.per_layer_attributes or ()) or getattr(config, "head_dim", None) is not None
    if not told and hasattr(config, "num_attention_heads"):
        config.head_dim = old // config.num_attention_heads
    for attribute in ("hidden_size", "word_embed_proj_dim"):  # transformers' own names, aliases resolved
        if getattr(config, attribute, None) == old:
            setattr(config, attribute, new)
    modules: dict[str, dict[str, Any]] = {}
    for depth, block in enumerate(decoder.blocks):
        built = build_block(block, config.per_layer_config[depth], depth)
        if built is None:
            raise UnsupportedModelError(f"{type(block).__name__} cannot be built with a width of {new}")
        changes: dict[str, Any] = {}
        for linear in (linear for linear in decoder.linears if linear.depth == depth):
            if weight_shape(built.get_submodule(linear.kind)) != (linear.rows, linear.columns):
                changes[linear.kind] = [linear.rows, linear.columns]
        for path, module in built.named_modules():
            if isinstance(module, (nn.Linear, Conv1D, nn.LayerNorm)):
                continue
            own = vars(block.get_submodule(path))
            for key, value in vars(module).items():
                if type(value) in (int, float) and own.get(key, value) != value and own[key] != old:
                    changes[f"{path}.{key}" if path else key] = own[key]
        if changes:
            modules[str(depth)] = changes
    if modules:
        config.pruned_modules = modules
        become_pruned(model, decoder)
        for number, change in modules.items():
            modeling_pruned.resize_block(
                decoder.blocks[int(number)],
                {path: value for path, value in change.items() if not isinstance(value, list)},
            )
