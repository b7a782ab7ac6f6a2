"""Modules made small, to try on a few numbers what they compute."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def shallow_copy(module: nn.Module, **attributes: dict[str, Any]) -> nn.Module:
    """``module`` with other parameters or children; called by its class's forward, no hook notices."""
    probe = copy.copy(module)
    vars(probe).update(attributes)
    return probe


def small_linear(columns: int, rows: int, scale: float) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=False, device="meta")  # draws no random numbers
    linear.weight = nn.Parameter(scale * numbers(rows, columns))
    return linear


def numbers(*shape: int) -> Tensor:
    """Numbers in [-1, 1] without any pattern, on the CPU."""
    count = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32, device="cpu")
    return torch.sin(count.square()).view(shape)
