"""The linears whose outputs are added to the residual stream as they are, up to a factor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.offload import resident
from llm_surgeon.models.probe import StubbedBlock, agree, capture_all_inputs, random_outputs

# A scale below this is rounding: of a linear whose output reaches the stream through others only, which are held fixed.
_SMALLEST_SCALE = 1e-4


def find_writers(model: PreTrainedModel, decoder: Decoder) -> dict[str, float]:
    """Name and scale ``s`` of every linear of blocks that compute ``h + Σ s y`` of their input and writers' outputs.

    Verified by runs of each block in which the outputs of its linears are held fixed, all or all but one. A block in
    which a norm follows the sum or a writer (Gemma 2), or which cannot be probed, has no writers.
    """
    writers: dict[str, float] = {}
    device = model.get_input_embeddings().weight.device
    try:
        captured = capture_all_inputs(model, decoder.blocks)
    except UnsupportedModelError:
        return {}
    for depth, block in enumerate(decoder.blocks):
        linears = [linear for linear in decoder.linears if linear.depth == depth]
        try:
            with resident(block, device):
                scales = _scales(block, linears, *captured[depth])
        except UnsupportedModelError:
            continue
        writers |= {linear.name: scales[linear.kind] for linear in linears if linear.kind in scales}
    return writers


def _scales(
    block: nn.Module, linears: list[PrunableLinear], hidden: Tensor, inputs: dict[str, Any]
) -> dict[str, float]:
    """The scale of every writer by its kind; none unless they are all that is added."""
    hidden = hidden.to(linears[0].weight.device)  # models may lie on several
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
