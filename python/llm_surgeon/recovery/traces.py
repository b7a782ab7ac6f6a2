"""Traces of training through Trainer beside trained weights, put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from llm_surgeon.interrupts import uninterrupted
from llm_surgeon.models.state import ModelState


@contextmanager
def traceless(model: nn.Module) -> Iterator[None]:
    """After the block, in any case, only weights of ``model`` differ from what was before.

    Trainer sets ``use_cache`` of the configuration and training flags, wraps ``forward`` where it computes in bfloat16,
    exports variables of the environment, and makes the process-wide states of accelerate its own.
    """
    state, environment = ModelState(model), dict(os.environ)
    shared = [
        (kind._shared_state, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)
    ]

    def restore() -> None:
        for name in os.environ.keys() - environment.keys():
            os.environ.pop(name, None)
        os.environ.update(environment)
        for own, before in shared:
            own.clear()
            own.update(before)

    try:
        yield
    finally:
        state.restore_around_weights()
        uninterrupted(restore)
