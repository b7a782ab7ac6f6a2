"""One small linear with curvature of full rank, with and without bias, for tests against dense mathematics."""

import torch

from llm_surgeon.curvature.estimate import Curvature
from llm_surgeon.models.decoder import PrunableLinear
from surgeon_kernels import SymmetricAccumulator, gram_accumulate_

R, C = 5, 8
CPU = torch.device("cpu")


def layer(bias: bool, dtype: torch.dtype = torch.float64):
    """A linear with its curvature, both factors of full rank."""
    torch.manual_seed(1)
    module = torch.nn.Linear(C, R, bias=bias, dtype=dtype)
    linear = PrunableLinear("layers.0.proj", module, 0, "proj", "layers.0.proj")
    a, g = torch.randn(50, C + bias, dtype=dtype), torch.randn(50, R, dtype=dtype)
    if bias:
        a[:, -1] = 1.0
    return linear, Curvature(1.0, 50, {linear.name: accumulated(a)}, {linear.name: accumulated(g)})


def accumulated(rows: torch.Tensor) -> SymmetricAccumulator:
    sums = SymmetricAccumulator.zeros(rows.shape[1], dtype=rows.dtype)
    gram_accumulate_(sums, rows)
    return sums


def damped(M: torch.Tensor, damping: float) -> torch.Tensor:
    return M + damping * M.diagonal().mean() * torch.eye(len(M), dtype=M.dtype)
