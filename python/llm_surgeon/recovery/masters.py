"""Weights of 16 bits, trained in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llm_surgeon.interrupts import uninterrupted


@contextmanager
def float32_masters(model: nn.Module) -> Iterator[None]:
    """Context manager: parameters of 16 bits are float32; on exit each is rounded to its own dtype and storage.

    16 bits would round away most of what a step changes.
    """
    halves = [(p, p.data) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]

    def restore() -> None:
        for parameter, data in halves:
            if parameter.data is not data:
                data.copy_(parameter.data)
            parameter.grad, parameter.data = None, data

    try:
        for parameter, data in halves:
            parameter.grad, parameter.data = None, data.float()
        yield
    finally:
        uninterrupted(restore)
