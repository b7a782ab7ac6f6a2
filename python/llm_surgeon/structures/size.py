"""What a model takes: parameters, multiply-accumulates, memory, latency."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.models import evaluation_mode
from llm_surgeon.structures.modeling_pruned import CompactLinear

_TOKENS = 512
_REPEATS = 3


def is_compact(module: nn.Module) -> bool:
    """Whether it is a linear without its zero rows and columns, of our class or of the code of a checkpoint."""
    return type(module).__name__ == CompactLinear.__name__


@torch.no_grad()
def model_size(model: PreTrainedModel, input_ids: Tensor) -> dict[str, float]:
    """``parameters``; ``macs`` of all linears for one token; ``bytes`` of weights; ``seconds`` of a forward pass.

    The pass is over (at most 512 tokens of) one sequence ``input_ids`` ``[1, T]``: the median of three.
    """
    parameters = list(model.parameters())
    linears = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) or is_compact(module)]
    device = model.get_input_embeddings().weight.device
    ids = input_ids[:1, :_TOKENS].to(device)
    seconds = []
    with evaluation_mode(model):
        for _ in range(1 + _REPEATS):  # the first one starts libraries up
            begun = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "macs": sum(linear.get_parameter("weight").numel() for linear in linears),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "seconds": statistics.median(seconds[1:]),
    }
