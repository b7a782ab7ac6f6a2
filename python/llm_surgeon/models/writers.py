"""The linears whose outputs are added to the residual stream as they are, up to a factor."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.probe import StubbedBlock, agree, capture_inputs, random_outputs

# A scale below this is rounding: of a linear whose output reaches the stream through others only, which are held fixed.
_SMALLEST_SCALE = 1e-4


def find_writers(model: PreTrainedModel, decoder: Decoder) -> dict[str, float]:
    """Name and scale ``s`` of every linear of blocks that compute ``h + Σ s y`` of their input and writers' outputs.

    Verified by runs of each block in which the outputs of its linears are held fixed, all or all but one. A block in
    which a norm follows the sum or a writer (Gemma 2), or which cannot be probed, has no writers.
    """
    writers: dict[str, float] = {}
    for depth, block in enumerate(decoder.blocks):
        linears = [linear for linear in decoder.linears if linear.depth == depth]
        try:
            scales = _scales(model, block, linears)
        except UnsupportedModelError:
            continue
        writers |= {linear.name: scales[linear.kind] for linear in linears if linear.kind in scales}
    return writers


def _scales(model: PreTrainedModel, block: nn.Module, linears: list[PrunableLinear]) -> dict[str, float]:
    """The scale of every writer by its kind; none unless they are all that is added."""
    hidden, inputs = capture_inputs(model, block)
    stubbed = StubbedBlock(block, linears, inputs)
    outputs, others = (random_outputs(linears, seed, hidden.device) for seed in (0, 1))
    _, base = stubbed.run(outputs, hidden)
    scales: dict[str, float] = {}
    for linear in linears:
        change = others[linear.kind] - outputs[linear.kind]
        if change.shape == base.shape:
            _, out = stubbed.run({**outputs, linear.kind: others[linear.kind]}, hidden)
            scale = float(((out - base) * change).sum() / change.square().sum())
            if abs(scale) > _SMALLEST_SCALE:
                scales[linear.kind] = scale
    total = hidden + sum(scale * outputs[kind] for kind, scale in scales.items())
    return scales if agree(base, total) else {}
