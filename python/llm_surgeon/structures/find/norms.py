"""Norms over the residual width: which of them read the residual stream, and what they do with their weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.decoder import Decoder, PrunableLinear
from llm_surgeon.models.probe import StubbedBlock, agree, capture_inputs, random_outputs

_PROBE_TOKENS = 4


def sort_norms(
    model: PreTrainedModel,
    decoder: Decoder,
    candidates: Mapping[str, nn.Module],
    readers: Sequence[PrunableLinear],
    writers: Sequence[PrunableLinear],
) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Those of ``candidates`` whose input is the residual stream; whose output is added to it; that are in no block.

    Others, in the middle of a block (of all queries, say), have that width by chance.

    Raises:
        UnsupportedModelError: a linear reads the stream as it is, whose scale a narrower norm does not take away; the
            message names it.
    """
    reading, adding = [], []
    inside: set[nn.Module] = set()
    for depth, block in enumerate(decoder.blocks):
        linears = [linear for linear in decoder.linears if linear.depth == depth]
        own = {name: module for name, module in block.named_modules() if module in set(candidates.values())}
        inside |= set(own.values())
        hidden, inputs = capture_inputs(model, block)
        stubbed = StubbedBlock(block, linears, inputs)
        outputs = random_outputs(linears, 0, hidden.device)
        ends = {linear.kind for linear in writers if linear.depth == depth}
        with _inputs_noted(stubbed.block, own) as seen:
            columns, _ = stubbed.run(outputs, hidden)
            base = dict(seen)
            stubbed.run({k: -2.0 * y if k in ends else y for k, y in outputs.items()}, hidden)
            by_writers = {name for name in base if not agree(seen[name], base[name])}
            stubbed.run(outputs, -2.0 * hidden)
            by_stream = {name for name in base if not agree(seen[name], base[name])}
            scaled, _ = stubbed.run({k: 4.0 * y if k in ends else y for k, y in outputs.items()}, 4.0 * hidden)
        for linear in (linear for linear in readers if linear.depth == depth):
            if float(scaled[linear.kind].norm()) > 2.0 * float(columns[linear.kind].norm()):
                raise UnsupportedModelError(f"{linear.name} reads the residual stream without a norm: keep the width")
        reading += [own[name] for name in own if name in by_stream]
        adding += [own[name] for name in own if name in by_writers - by_stream]
    return reading, adding, [module for module in candidates.values() if module not in inside]


@torch.no_grad()
def norm_kind(name: str, norm: nn.Module) -> tuple[float, bool]:
    """Offset that ``norm`` adds to its weight before it multiplies by it, and whether it subtracts the mean."""
    trial = copy.deepcopy(norm).double()
    width = norm.get_parameter("weight").shape[0]
    x = torch.randn(1, _PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(norm.get_parameter("weight").device)
    for parameter in trial.parameters():
        parameter.zero_()
    try:
        none = trial(x)
        trial.get_parameter("weight").fill_(1.0)
        one, shifted = trial(x), trial(x + 1.0)
    except Exception as error:  # whatever a module that is no norm says to such an input
        raise UnsupportedModelError(
            f"{name} has the residual width in a way that is not understood: keep the width"
        ) from error
    unit = one - none
    offset = round(float((none * unit).sum() / unit.square().sum().clamp_min(1e-30)), 4)
    if not agree(none + unit, (1.0 + offset) * unit):
        raise UnsupportedModelError(f"{name} has the residual width in a way that is not understood: keep the width")
    return offset, agree(shifted, one)


@contextmanager
def _inputs_noted(block: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The latest input of every module of ``block`` that ``modules`` names."""
    seen: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            seen[name] = args[0]

    with ExitStack() as hooks:
        for name in modules:
            hooks.enter_context(block.get_submodule(name).register_forward_pre_hook(partial(note, name)))
        yield seen
