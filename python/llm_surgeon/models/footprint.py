"""Footprint of a model: parameters, multiply-accumulates, memory, latency."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.formats.modeling_pruned import CompactLinear
from llm_surgeon.models.passes import evaluation_mode
from llm_surgeon.resources import available_memory

_TOKENS = 512
_REPEATS, _TURNS = 3, 7


def is_compact(module: nn.Module) -> bool:
    """True for a linear without its zero rows and columns, of our class or of the code of a checkpoint."""
    return type(module).__name__ == CompactLinear.__name__


def model_size(model: PreTrainedModel, input_ids: Tensor) -> dict[str, float]:
    """``parameters``; ``macs`` of all linears for one token; ``bytes`` of weights; ``seconds`` of a forward pass.

    The pass is over (at most 512 tokens of) one sequence ``input_ids`` ``[1, T]``: the median of three.
    """
    parameters = list(model.parameters())
    linears = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) or is_compact(module)]
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "macs": sum(linear.get_parameter("weight").numel() for linear in linears),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "seconds": statistics.median(_times([model], input_ids, _REPEATS)[0]),
    }


def latencies(models: Sequence[PreTrainedModel], input_ids: Tensor) -> list[dict[str, float]]:
    """Seconds of a forward pass of each of ``models``, which take turns, so that what else the machine does hits all.

    ``seconds`` is the median of seven, ``seconds_low`` and ``seconds_high`` are the quartiles; the pass is that of
    :func:`model_size`.
    """
    quartiles = [statistics.quantiles(times, n=4) for times in _times(models, input_ids, _TURNS)]
    return [dict(zip(("seconds_low", "seconds", "seconds_high"), three, strict=True)) for three in quartiles]


def copy_in_main_memory(model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy of ``model``, to compare a smaller one with; ``None`` where it does not fit or lies on several devices."""
    tensors = [*model.parameters(), *model.buffers()]
    # As much must be left for what follows.
    if len({t.device for t in tensors}) > 1 or available_memory("cpu") < 2 * sum(t.nbytes for t in tensors):
        return None
    copies = {id(t): t.detach().to("cpu", copy=True) for t in tensors}
    for t in tensors:
        if isinstance(t, nn.Parameter):
            copies[id(t)] = nn.Parameter(copies[id(t)], requires_grad=False)
    return copy.deepcopy(model, copies)


def compare_latencies(
    dense: PreTrainedModel | None, smaller: PreTrainedModel, input_ids: Tensor
) -> dict[str, dict[str, float]]:
    """:func:`latencies` by state, ``"before"`` and ``"after"``; nothing where both models have no room together."""
    device = smaller.get_input_embeddings().weight.device
    if dense is None or (
        device.type != "cpu" and available_memory(device) < 1.5 * sum(p.nbytes for p in dense.parameters())
    ):
        return {}
    return dict(zip(("before", "after"), latencies([dense.to(device), smaller], input_ids), strict=True))


class SizeComparison:
    """Sizes of a model before and after it is made smaller in place, latencies side by side.

    Args:
        model: as it is before.
        input_ids: ``[n, T]``, see :func:`model_size`.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        self._input_ids, self._before = input_ids, model_size(model, input_ids)
        self._dense: PreTrainedModel | None = None

    def keep(self, model: PreTrainedModel) -> None:
        """Copy ``model``, whose sizes are still those before, where there is room: latency is a matter of sizes."""
        self._dense = copy_in_main_memory(model)

    def sizes(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """:func:`model_size` ``"before"`` and ``"after"``, with :func:`compare_latencies` where there was room."""
        found = {"before": self._before, "after": model_size(model, self._input_ids)}
        for when, latency in compare_latencies(self._dense, model, self._input_ids).items():
            found[when] |= latency
        return found


@torch.no_grad()
def _times(models: Sequence[PreTrainedModel], input_ids: Tensor, repeats: int) -> list[list[float]]:
    """``repeats`` durations of a forward pass for each model."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(1 + repeats):  # the first one starts libraries up
        for model, own in zip(models, times, strict=True):
            device = model.get_input_embeddings().weight.device
            ids = input_ids[:1, :_TOKENS].to(device)
            with evaluation_mode(model):
                begun = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:
                    own.append(time.perf_counter() - begun)
    return times
