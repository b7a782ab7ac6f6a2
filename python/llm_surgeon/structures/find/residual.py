"""The residual width of a model: every parameter that has it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llm_surgeon.errors import InputError, UnsupportedModelError
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.probe import Dependencies, StubbedBlock, capture_inputs
from llm_surgeon.structures.find.norms import norm_kind, sort_norms


@dataclass(frozen=True, eq=False)
class Residual:
    """Readers and writers of the residual stream, ``width`` channels wide.

    Attributes:
        readers, writers: the decoder's linears whose columns, or rows, are channels.
        embeddings: modules that start the stream, a channel a column.
        norms: modules that norm the stream; output_norms: those that norm what is then added to it.
        final_norm: the norm before the output head; tied: the head is the token embedding.
        centred: norms subtract the mean.
        offsets: norm -> what it adds to its weight before it multiplies by it (1 in Gemma's).
    """

    width: int
    readers: list[PrunableLinear]
    writers: list[PrunableLinear]
    embeddings: list[nn.Embedding]
    norms: list[nn.Module]
    output_norms: list[nn.Module]
    final_norm: nn.Module
    head: nn.Linear
    tied: bool
    centred: bool
    offsets: dict[nn.Module, float]


def find_residual(model: PreTrainedModel, decoder: Decoder) -> Residual:
    """Find every parameter with the residual width.

    Raises:
        UnsupportedModelError: a parameter of that width is none of a reader, writer, embedding, norm or the head; the
            message names it.
        InputError: the embeddings are tied, and layer norms would need them centred.
    """
    width = model.get_input_embeddings().weight.shape[1]
    head = model.get_output_embeddings()
    readers, writers = find_ends(model, decoder)
    explained = {id(linear.module) for linear in decoder.linears} | {id(head)}
    embeddings, candidates = [], {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if id(module) in explained or not any(width in parameter.shape for parameter in own.values()):
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            embeddings.append(module)
        elif own.keys() in ({"weight"}, {"weight", "bias"}) and all(x.shape == (width,) for x in own.values()):
            candidates[name] = module
        else:
            raise UnsupportedModelError(
                f"{name} has the residual width in a way that is not understood: keep the width"
            )
    norms, output_norms, outside = sort_norms(model, decoder, candidates, readers, writers)
    if not outside:
        raise UnsupportedModelError(f"{type(model).__name__} has no norm before its output head: keep the width")
    norms, output_norms = [*norms, outside[-1]], [*output_norms, *outside[:-1]]
    kinds = {module: norm_kind(name, module) for name, module in candidates.items()}
    centred = any(kinds[norm][1] for norm in norms)
    tied = head.weight is model.get_input_embeddings().weight
    if tied and centred:
        raise InputError(
            f"the output head of {type(model).__name__} is tied to the token embedding, and layer norms need that "
            "centred: its width cannot be changed"
        )
    for name, module in candidates.items():
        if module in output_norms and (centred or kinds[module][1] or getattr(module, "bias", None) is not None):
            raise UnsupportedModelError(f"{name} norms what is added to the residual stream: keep the width")
    offsets = {norm: kinds[norm][0] for norm in norms}
    return Residual(width, readers, writers, embeddings, norms, output_norms, outside[-1], head, tied, centred, offsets)


def find_ends(model: PreTrainedModel, decoder: Decoder) -> tuple[list[PrunableLinear], list[PrunableLinear]]:
    """The linears that read the residual stream, and those that write to it."""
    known: dict[Any, Dependencies] = {}
    readers, writers = [], []
    for depth, block in enumerate(decoder.blocks):
        linears = [linear for linear in decoder.linears if linear.depth == depth]
        signature = (type(block), *((x.kind, x.rows, x.columns) for x in linears))
        if signature not in known:
            hidden, inputs = capture_inputs(model, block)
            known[signature] = Dependencies(StubbedBlock(block, linears, inputs), linears, hidden)
        found = known[signature]
        readers += [linear for linear in linears if bool(found.residual_columns[linear.kind].all())]
        writers += [linear for linear in linears if bool(found.residual_rows[linear.kind].all())]
    return readers, writers


def kept_width(residual: Residual, sparsity: float, round_to: int, heads: int, least: float) -> int:
    """The largest width that removes ``sparsity`` of the linears' weights: a multiple of ``round_to`` and ``heads``.

    Raises:
        InputError: there is none.
    """
    step = math.lcm(round_to, heads)
    width = int(residual.width * (1 - sparsity) + 1e-9) // step * step
    if width < max(1, math.ceil(least * residual.width)):
        raise InputError(
            f"sparsity {sparsity:g} cannot be met: a width below {residual.width} must be a multiple of {step} "
            f"({heads} heads, round_to {round_to}) and at least {least:g} of it"
        )
    return width
