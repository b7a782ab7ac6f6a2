"""Keep a run apart from what its process does: autocast, gradient modes, defaults, random numbers, other threads."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy
import torch

_lock = threading.RLock()


def _unlocked() -> None:
    """In a child process no thread runs that could give up what it held when the process was forked."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlocked)


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """PyTorch computes as in a new process: no autocast, no inference mode, gradients on, new tensors float32, on CPU.

    Afterwards all of it is as it was.
    """
    accelerator = torch.accelerator.current_accelerator()
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in {"cpu"} if accelerator is None else {"cpu", accelerator.type}:
            # Nor do autocasts in here keep weights that they have cast: weights change, and only the end of the
            # outermost autocast would forget them.
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        # What autocast outside has cast and kept may be weights that are changed here.
        stack.callback(torch.clear_autocast_cache)
        yield


@contextmanager
def isolated() -> Iterator[None]:
    """:func:`plain_arithmetic`, compiled modules running eagerly, and random states put back; one thread at a time.

    Other threads that come here wait: parts of models are replaced for all models of a class (:mod:`fused_pointwise`),
    as transformers does while it loads one.
    """
    with _lock, plain_arithmetic(), ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled: hooks do not run in graphs
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(random.setstate, random.getstate())
        stack.callback(numpy.random.set_state, numpy.random.get_state())
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        stack.enter_context(torch.random.fork_rng(devices))
        yield
