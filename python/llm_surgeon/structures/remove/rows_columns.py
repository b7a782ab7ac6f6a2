"""Take zero rows and columns out of a model's matrices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.errors import InputError, UnsupportedModelError
from llm_surgeon.formats.modeling_pruned import resize_block
from llm_surgeon.isolation import isolated
from llm_surgeon.models.checks import check_shrinkable
from llm_surgeon.models.decoder import Decoder, PrunableLinear, check_finite, find_decoder
from llm_surgeon.models.footprint import is_compact
from llm_surgeon.models.rebuild import become_pruned
from llm_surgeon.models.state import ModelState
from llm_surgeon.models.wrappers import unwrapped
from llm_surgeon.structures.find.dimension import Dimension
from llm_surgeon.structures.find.dimensions import find_dimensions
from llm_surgeon.structures.remove.groups import remove_groups
from llm_surgeon.structures.remove.verify import probe_logits, same_logits, verified


@dataclass(frozen=True)
class Compacted:
    """Weights of the decoder's linears (multiply-accumulates per token): all, and those that are left.

    Attributes:
        neurons: taken out of the model altogether; linears: those that gather inputs or outputs.
        sizes: of a checkpoint, what :func:`model_size` finds ``"before"`` and ``"after"``.
    """

    before: int
    after: int
    neurons: int
    linears: int
    sizes: dict[str, dict[str, float]] = field(default_factory=dict)


def compact(model: Any, multiple: int = 8) -> Compacted:
    """Remove zero rows and columns of the decoder's linears, in place.

    Neurons that nothing reads, or that are always zero, go altogether. Other linears compute with what is left of
    their matrices, gathering inputs and outputs, where that saves a twentieth of their weights at least.

    Args:
        multiple: zeros stay where they fill sizes up to multiples of this: tensor cores want rows of 16 bytes, 8
            numbers of 16 bits.

    Failed or interrupted it leaves the model as it was.

    Raises:
        InputError: the model is compact already, or none that can be.
        NumericalError: a tensor holds NaN or infinity, or the compact model computes something else.
    """
    state = ModelState(model)
    try:
        return _compact(unwrapped(model), state, multiple)
    except BaseException:
        state.restore()
        raise


@isolated()
def _compact(model: Any, state: ModelState, multiple: int) -> Compacted:
    """:func:`compact`, whose caller puts the model's ``state`` back if anything is raised."""
    if any(map(is_compact, model.modules())):
        raise InputError(f"{type(model).__name__} is compact already")
    decoder = find_decoder(model)
    check_shrinkable(model)
    check_finite(model)
    parameters = [p for linear in decoder.linears for p in linear.module.parameters(recurse=False)]
    state.copy_weights(parameters, at_once=True)
    before = decoder.weights
    with verified(model, probe_logits(model), "the compact model's logits differ from the model's"):
        neurons = _fold(model, decoder, multiple)
        left, linears = 0, 0
        for linear in decoder.linears:
            rows, columns = _alive(linear)
            # Outputs that are gone read a zero row.
            rows, columns = _filled(rows, multiple, spare=1), _filled(columns, multiple)
            kept = int(rows.sum()) * int(columns.sum())
            if kept <= 0.95 * linear.rows * linear.columns:
                _replace(model, decoder, linear, rows, columns)
                linears += 1
            else:
                kept = linear.rows * linear.columns
            left += kept
        if linears:
            become_pruned(model, decoder)
    return Compacted(before, left, neurons, linears)


def _alive(linear: PrunableLinear) -> tuple[Tensor, Tensor]:
    """Rows, biases included, and columns that are not zero throughout."""
    matrix = linear.matrix() != 0.0
    return matrix.any(dim=1), matrix[:, : linear.columns].any(dim=0)


def _filled(alive: Tensor, multiple: int, spare: int = 0) -> Tensor:
    """``alive`` and as many of the others as make their number a multiple, ``spare`` at least; one in any case."""
    others = (~alive).nonzero()[:, 0]
    count = len(alive) - len(others)
    wanted = -(-max(count + min(spare, len(others)), 1) // multiple) * multiple
    alive = alive.clone()
    alive[others[: wanted - count]] = True
    return alive


def _fold(model: PreTrainedModel, decoder: Decoder, multiple: int) -> int:
    """Remove neurons whose column or whose producers' row is zero; how many went."""
    try:
        dimensions = [dimension for dimension in find_dimensions(model, decoder) if not dimension.is_heads]
    except UnsupportedModelError:
        return 0  # gathering and scattering needs no structure
    before = probe_logits(model)
    originals = [(linear, linear.matrix(torch.float64)) for linear in decoder.linears]
    for unread_only in (False, True):
        removed = [(dimension, _dead(dimension, unread_only, multiple)) for dimension in dimensions]
        for dimension, parts in removed:
            _zero(dimension.consumer, columns=dimension.removed_columns(parts))
            for producer, rows in dimension.removed_rows(parts):
                _zero(producer, rows=rows)
        # A zero row means a zero neuron under most activations, but not under all.
        if same_logits(probe_logits(model), before):
            break
        for linear, matrix in originals:
            linear.write(matrix)
    remove_groups(model, decoder, removed)
    return sum(int(parts.sum()) for _, parts in removed)


def _dead(dimension: Dimension, unread_only: bool, multiple: int) -> Tensor:
    dead = ~_alive(dimension.consumer)[1][dimension.columns[:, 0]]
    if not unread_only:
        for kind, producer in dimension.producers.items():
            dead |= ~_alive(producer)[0][dimension.rows[kind]].any(dim=1)
    return ~_filled(~dead, multiple)[:, None]


def _zero(linear: PrunableLinear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    matrix = linear.matrix(torch.float64)
    if rows is not None:
        matrix[rows] = 0.0
    if columns is not None:
        matrix[:, : linear.columns][:, columns] = 0.0
    linear.write(matrix)


def _replace(model: PreTrainedModel, decoder: Decoder, linear: PrunableLinear, rows: Tensor, columns: Tensor) -> None:
    """Put a linear over the rows and columns that are alive in the place of ``linear``."""
    sizes = [int(rows.sum()), int(columns.sum()), linear.rows, linear.columns]
    block, old = decoder.blocks[linear.depth], linear.module.get_parameter("weight")
    matrix = linear.matrix(old.dtype)
    resize_block(block, {linear.kind: sizes})
    new = block.get_submodule(linear.kind).to(old.device, old.dtype)
    with torch.no_grad():
        new.get_parameter("weight").copy_(matrix[:, : linear.columns][rows][:, columns])
        if linear.has_bias:
            new.get_parameter("bias").copy_(matrix[rows, -1])
    gone = (~_alive(linear)[0][rows]).nonzero()[:, 0]  # rows of the new weight that are zero
    locations = rows.cumsum(dim=0) - 1
    new.get_buffer("row_index").copy_(locations if bool(rows.all()) else locations.where(rows, gone[0]))
    new.get_buffer("column_index").copy_(columns.nonzero()[:, 0])
    modules = dict(getattr(model.config, "pruned_modules", {}))
    modules[str(linear.depth)] = {**modules.get(str(linear.depth), {}), linear.kind: sizes}
    model.config.pruned_modules = modules
